# SPDX-License-Identifier: Apache-2.0
"""Faster forms of a decoder's modules, of the same weights and formulas, while a runner has it.

- GPT-2's GELU: eight element-wise operators in transformers, one in torch. Its linear layers: one
  operator instead of four. Dropout, which does nothing here: no operator.
- float32 linear layers on the CPU: weights packed once for oneDNN. IVG of one prompt with the
  bundled family takes 1.1 s instead of 1.3 s on two threads with AVX2; with AVX-512 where MKL keeps
  to AVX2 a layer takes less than half the time of addmm. A single row is faster unpacked. The
  packed copy takes as much memory again: a model above MAX_PACKED_BYTES stays as it is.
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
        if can_pack is None:
            can_pack = packing_pays(model)
        found = ((module, _fast_forward(module, can_pack)) for module in model.modules())
        self._forwards = {module: forward for module, forward in found if forward is not None}

    def install(self) -> None:
        """From now on the modules run their faster forms."""
        for module, forward in self._forwards.items():
            # One that has a forward of its own has it from another runner, or from its owner.
            vars(module).setdefault("forward", forward)

    def remove(self) -> None:
        """Gives every module its own forward back; twice is fine."""
        for module, forward in self._forwards.items():
            if vars(module).get("forward") is forward:
                del vars(module)["forward"]


def packing_pays(model: nn.Module) -> bool:
    """Whether this torch can pack linear layers, and the model is small enough to be held twice."""
    if not torch.backends.mkldnn.is_available():
        return False
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    return num_bytes <= MAX_PACKED_BYTES and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _fast_forward(module: nn.Module, can_pack: bool) -> Any:
    if isinstance(module, NewGELUActivation):
        return _gelu_tanh
    if type(module) is nn.Dropout:
        return _identity
    is_transposed = type(module) is Conv1D
    if not is_transposed and type(module) is not nn.Linear:
        return None
    weight: Any = module.weight
    is_plain = type(weight) is nn.Parameter and type(weight.data) is torch.Tensor  # not quantised
    if can_pack and is_plain and weight.device.type == "cpu" and weight.dtype == torch.float32:
        return _packed_forward(module, weight.T if is_transposed else weight)
    return _conv1d_forward(module) if is_transposed else None


def _identity(x: torch.Tensor) -> torch.Tensor:
    return x


def _conv1d_forward(module: Any) -> Any:
    weight, bias = module.weight.T, module.bias  # a view: the weights stay where they are
    return lambda x: functional.linear(x, weight, bias)


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return functional.gelu(x, approximate="tanh")


def _packed_forward(module: Any, weight: torch.Tensor) -> Any:
    """x [..., in] -> [..., out] with weight [out, in] in oneDNN's layout."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
    bias = None if module.bias is None else module.bias.detach()
    plain = type(module).forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        if x.numel() == x.shape[-1]:
            return plain(module, x)
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")

    return forward
