# SPDX-License-Identifier: Apache-2.0
"""The faster forms of a decoder's modules that stock PyTorch offers on a GPU, in place of HF's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.activations import GELUTanh, NewGELUActivation
from transformers.models.llama.modeling_llama import LlamaRMSNorm

# transformers takes names that hold "sdpa" for its own.
FOLDED = "bench_folded"


class FusedRMSNorm(nn.Module):
    """torch's own RMSNorm, one kernel where transformers launches six."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def use_fused_modules(model: nn.Module) -> None:
    """Replaces Llama's norms and GPT-2's eight-op GELU by PyTorch's own."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LlamaRMSNorm):
                setattr(module, name, FusedRMSNorm(child.weight, child.variance_epsilon))
            elif isinstance(child, NewGELUActivation):
                setattr(module, name, GELUTanh())


def folded_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """SDPA with a group's heads as more queries of one head, so that no key is repeated.

    Args:
        query: [A, Hq, q, D].
        key, value: [A, Hkv, S, D].
        attention_mask: additive [A, 1, q, S].

    Returns:
        [A, q, Hq, D].
    """
    rows, num_heads, num_queries, size = query.shape
    kv_heads = key.shape[1]
    group = num_heads // kv_heads
    if group > 1:
        query = query.reshape(rows, kv_heads, group * num_queries, size)
        attention_mask = attention_mask.repeat(1, 1, group, 1)
    out = F.scaled_dot_product_attention(query, key, value, attention_mask, scale=scaling)
    return out.reshape(rows, num_heads, num_queries, size).transpose(1, 2), None


def attention_for(device: torch.device) -> str:
    """The fastest attention implementation under an explicit mask."""
    if device.type != "cuda":
        return "eager"
    AttentionInterface.register(FOLDED, folded_attention)
    return FOLDED
