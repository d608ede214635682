# SPDX-License-Identifier: Apache-2.0
"""What Triton's interpreter cannot do with the versions at hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is for Linux")
# Seen with Triton 3.6, gone in 3.9: int() of an array with one dimension, which NumPy 2.4 refuses.
CANNOT_LOOP = (
    not torch.cuda.is_available()
    and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)
    and tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4)
)
needs_loops = pytest.mark.skipif(
    CANNOT_LOOP, reason="this Triton's interpreter cannot loop with this NumPy"
)
