# SPDX-License-Identifier: Apache-2.0
"""Faster forms of a decoder's modules, of the same weights and formulas, while a runner has it.

- GPT-2's GELU: eight element-wise operators in transformers, one in torch. Its linear layers: one
  operator instead of four. Dropout, which does nothing here: no operator.
- float32 linear layers on the CPU: weights packed once for oneDNN, which pays most with AVX-512
  where MKL keeps to AVX2. A single row is faster unpacked. The packed copy takes as much memory
  again: a model above MAX_PACKED_BYTES stays as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

MAX_PACKED_BYTES = 2 * 2**30


class FastModules:
    """Gives modules of a model a faster forward, and takes it away again.

    A module keeps its weights, its class and its place; only the instance's `forward` changes. The
    weights must not change meanwhile.

    Args:
        model: in eval mode.
        can_pack: whether linear layers may be packed; None: where it pays.
    """

    def __init__(self, model: nn.Module, *, can_pack: bool | None = None) -> None:
        self._modules = list(model.modules())
        self._can_pack = packing_pays(model) if can_pack is None else can_pack
        self._forwards: dict[nn.Module, Any] = {}

    def install(self) -> None:
        """From now on the modules run their faster forms."""
        for module in self._modules:
            # One that has a forward of its own has it from another runner, or from its owner: it is
            # not packed a second time either.
            if "forward" in vars(module):
                continue
            if module not in self._forwards:
                self._forwards[module] = _fast_forward(module, self._can_pack)
            if self._forwards[module] is not None:
                vars(module)["forward"] = self._forwards[module]

    def remove(self) -> None:
        """Gives every module its own forward back; twice is fine."""
        for module, forward in self._forwards.items():
            if forward is not None and vars(module).get("forward") is forward:
                del vars(module)["forward"]


def packing_pays(model: nn.Module) -> bool:
    """Whether this torch can pack linear layers, and the model is small enough to be held twice."""
    if not torch.backends.mkldnn.is_available():
        return False
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    return num_bytes <= MAX_PACKED_BYTES and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _fast_forward(module: nn.Module, can_pack: bool) -> Any:
    """The faster form; None: there is none."""
    if isinstance(module, NewGELUActivation):
        return _gelu_tanh
    if type(module) is nn.Dropout:
        return _identity
    is_transposed = type(module) is Conv1D
    if not is_transposed and type(module) is not nn.Linear:
        return None
    linear: Any = module
    stored, bias = linear.weight, linear.bias
    weight = stored.T if is_transposed else stored  # a view, [out, in]
    is_plain = type(stored) is nn.Parameter and type(stored.data) is torch.Tensor  # not quantised
    if can_pack and is_plain and stored.device.type == "cpu" and stored.dtype == torch.float32:
        return _packed_linear(weight.detach(), None if bias is None else bias.detach())
    return (lambda x: functional.linear(x, weight, bias)) if is_transposed else None


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return functional.gelu(x, approximate="tanh")


def _identity(x: torch.Tensor) -> torch.Tensor:
    return x


def _packed_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
    """x [..., in] -> [..., out] with weight [out, in] in oneDNN's layout."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)

    def forward(x: torch.Tensor) -> torch.Tensor:
        if x.numel() == x.shape[-1]:
            return functional.linear(x, weight, bias)
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")

    return forward
