# SPDX-License-Identifier: Apache-2.0
"""Shared by all tests; its place also puts this folder on the import path."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
