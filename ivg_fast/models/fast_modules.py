# SPDX-License-Identifier: Apache-2.0
"""Faster forms of a decoder's modules, of the same weights and formulas, while a runner has it.

- GPT-2: see `fast_gpt2`. Where its blocks are not the usual ones, its GELU: eight element-wise
  operators in transformers, one in torch; and dropout, which does nothing here: no operator.
- float32 linear layers on the CPU: weights packed once for oneDNN, which pays most with AVX-512
  where MKL keeps to AVX2. The packed copy takes as much memory again: a model above
  MAX_PACKED_BYTES stays as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.activations import NewGELUActivation

from ivg_fast.models.fast_gpt2 import fast_block, fast_decoder
from ivg_fast.models.fast_linear import FastLinear

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
        for module in reversed(self._modules):  # parts before the whole
            # One that has a forward of its own has it from another runner, or from its owner: it is
            # not packed a second time either.
            if "forward" in vars(module):
                continue
            if module not in self._forwards:
                self._forwards[module] = self._fast_forward(module)
            if self._forwards[module] is not None:
                vars(module)["forward"] = self._forwards[module]

    def _fast_forward(self, module: nn.Module) -> Any:
        """The faster form; None: there is none."""
        if isinstance(module, NewGELUActivation):
            return _gelu_tanh
        if type(module) is nn.Dropout:
            return _identity
        linears = {m: f for m, f in self._forwards.items() if isinstance(f, FastLinear)}
        return (
            FastLinear.of(module, self._can_pack)
            or fast_block(module, linears)
            or fast_decoder(module)
        )

    def remove(self) -> None:
        """Gives every module its own forward back; twice is fine."""
        for module, forward in self._forwards.items():
            if forward is not None and vars(module).get("forward") is forward:
                del vars(module)["forward"]

    def forget(self) -> None:
        """`remove`, and the next `install` reads the weights again: they may change until then."""
        self.remove()
        self._forwards = {}


def packing_pays(model: nn.Module) -> bool:
    """Whether this torch can pack linear layers, and the model is small enough to be held twice."""
    if not torch.backends.mkldnn.is_available():
        return False
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    return num_bytes <= MAX_PACKED_BYTES and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return functional.gelu(x, approximate="tanh")


def _identity(x: torch.Tensor) -> torch.Tensor:
    return x
