# SPDX-License-Identifier: Apache-2.0
"""Integrated Value Guidance, fast: steer a frozen language model while it decodes."""

# torch comes first: its OpenMP runtime is the one that the extension then shares.
import torch  # noqa: F401

__version__ = "0.1.0"
