# SPDX-License-Identifier: Apache-2.0
"""Where the kernels of these tests run; tests/conftest.py has chosen."""

import pytest
import torch


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
