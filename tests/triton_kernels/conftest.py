# SPDX-License-Identifier: Apache-2.0
"""Triton kernels run on the GPU where there is one, else in Triton's interpreter on the CPU.

The choice must be made before a kernel's module is imported.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
