# SPDX-License-Identifier: Apache-2.0
"""Host arrays on their way to a device, without waiting for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGNMENT = 16


def upload(array: NDArray[Any], device: torch.device | str) -> Tensor:
    """The array as a tensor on the device; on the CPU it shares the array's memory.

    A GPU is not waited for: the copy goes through pinned memory of torch's cache, which keeps it
    until the copy is done.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if torch.device(device).type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


class PackedArrays:
    """Arrays in one device buffer, filled by one copy and never moved.

    Each begins at 16 bytes, or Triton would compile a kernel once for every way in which its
    pointers may not.

    Args:
        device: where they are.
        specs: by name, shape and dtype.

    Attributes:
        views: the tensors by name; zeros at first.
    """

    def __init__(
        self,
        device: torch.device | str,
        specs: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    ) -> None:
        self._parts: dict[str, tuple[slice, torch.dtype]] = {}
        end = 0
        for name, (shape, dtype) in specs.items():
            size = math.prod(shape) * dtype.itemsize
            self._parts[name] = slice(end, end + size), dtype
            end += -(-size // _ALIGNMENT) * _ALIGNMENT
        self._buffer = torch.zeros(end, dtype=torch.uint8, device=device)
        self.views = {
            name: self._buffer[part].view(dtype).view(specs[name][0])
            for name, (part, dtype) in self._parts.items()
        }

    def fill(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Puts these values in, without waiting for the device. Of a longer array than is given the
        rest becomes 0, as does every array that is not given."""
        # Pinned memory comes from torch's cache, which waits until a copy is done with it.
        host = torch.zeros(len(self._buffer), dtype=torch.uint8, pin_memory=self._buffer.is_cuda)
        for name, array in arrays.items():
            part, dtype = self._parts[name]
            values = torch.from_numpy(np.ascontiguousarray(array)).reshape(-1).to(dtype)
            host[part].view(dtype)[: len(values)] = values
        self._buffer.copy_(host, non_blocking=True)
