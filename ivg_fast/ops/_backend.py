# SPDX-License-Identifier: Apache-2.0
"""Which implementation of an op runs."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ivg_fast.errors import InvalidParameterError

Backend = Literal["auto", "cpu", "triton", "torch"]
_BY_DEVICE = {"cpu": "cpu", "cuda": "triton"}


def choose_backend(backend: str, tensor: Tensor) -> str:
    """ "cpu", "triton" or "torch"; "auto" goes by the device of the tensor."""
    if backend == "auto":
        device = getattr(getattr(tensor, "device", None), "type", "cpu")
        chosen = _BY_DEVICE.get(device)
        if chosen is None:
            requirement = f"must be 'torch' on a device of type {device!r}"
            raise InvalidParameterError("backend", backend, requirement)
        return chosen
    if backend not in ("cpu", "triton", "torch"):
        requirement = "must be 'auto', 'cpu', 'triton' or 'torch'"
        raise InvalidParameterError("backend", backend, requirement)
    return backend
