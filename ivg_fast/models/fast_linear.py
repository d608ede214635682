# SPDX-License-Identifier: Apache-2.0
"""A linear layer's faster form: packed for oneDNN, or one operator where transformers has four."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

_ops: Any = torch.ops.mkldnn


class FastLinear:
    """x [..., in] -> [..., out] by the weight and bias that a module had when this was made.

    A single row goes through the plain layer, which reads the weight faster than oneDNN does.

    Args:
        weight: [out, in]; may be a view of what the module stores.
        bias: [out] or None.
        is_packed: whether oneDNN gets a copy in its own layout; float32 on the CPU only.
    """

    __slots__ = ("_bias", "_packed", "_weight")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, is_packed: bool) -> None:
        self._weight, self._bias = weight, bias
        self._packed = None
        if is_packed:
            self._packed = _ops._reorder_linear_weight(weight.detach().contiguous(), None)
            self._bias = None if bias is None else bias.detach()

    @classmethod
    def of(cls, module: nn.Module, can_pack: bool) -> FastLinear | None:
        """That of a Linear or Conv1D; None where there is nothing to gain."""
        if type(module) not in (nn.Linear, Conv1D):
            return None
        linear: Any = module
        stored, bias = linear.weight, linear.bias
        is_plain = type(stored) is nn.Parameter and type(stored.data) is torch.Tensor  # unquantised
        can_pack &= is_plain and stored.device.type == "cpu" and stored.dtype == torch.float32
        if type(module) is Conv1D:
            return cls(stored.T, bias, can_pack)
        return cls(stored, bias, True) if can_pack else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._packed is None or x.numel() == x.shape[-1]:
            return functional.linear(x, self._weight, self._bias)
        return _ops._linear_pointwise(x, self._packed, self._bias, "none", [], "")

    def gelu(self, x: torch.Tensor) -> torch.Tensor:
        """GELU by tanh of the layer's output."""
        if self._packed is None or x.numel() == x.shape[-1]:
            return functional.gelu(self(x), approximate="tanh")
        return _ops._linear_pointwise(x, self._packed, self._bias, "gelu", [], "tanh")

    def plus(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """The layer's output plus `other` of the same shape."""
        if self._packed is None or x.numel() == x.shape[-1]:
            return self(x) + other
        return _ops._linear_pointwise.binary(x, other, self._packed, self._bias, "add")
