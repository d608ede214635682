# SPDX-License-Identifier: Apache-2.0
"""Sampling with one uniform a token: cumsum and searchsorted over the unnormalised weights."""

from __future__ import annotations

import torch
from torch import Tensor

from ivg_fast.params import SearchParams


def draw(logits: Tensor, uniforms: Tensor, params: SearchParams) -> Tensor:
    """Samples `C` tokens from each row.

    Args:
        logits: float32 [R, V], the combined ones.
        uniforms: float32 [R, C] in [0, 1).
        params: temperature, top_k, top_p and min_p apply in this order.

    Returns:
        int64 [R, C]; the argmax where temperature is 0.
    """
    if params.temperature == 0:
        return logits.argmax(dim=-1, keepdim=True).expand_as(uniforms)
    vocab_size = logits.shape[-1]
    ids = None
    if 0 < params.top_k < vocab_size:
        logits, ids = logits.topk(params.top_k, dim=-1)
    elif params.top_p < 1:
        logits, ids = logits.sort(dim=-1, descending=True)
    highest = logits[:, :1] if ids is not None else logits.amax(dim=-1, keepdim=True)
    weights = ((logits - highest) / params.temperature).exp_()
    if params.top_p < 1:
        before = weights.cumsum(dim=-1) - weights
        limit = params.top_p * weights.sum(dim=-1, keepdim=True)
        weights.masked_fill_(before >= limit, 0.0)
    if params.min_p > 0:
        weights.masked_fill_(weights < params.min_p, 0.0)
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1:]
    # u * total may round up to total, which would fall behind the last token that has any weight.
    targets = torch.minimum(uniforms * total, total * (1 - 2.0**-23))
    tokens = torch.searchsorted(cumulative, targets, right=True)
    return tokens if ids is None else ids.gather(1, tokens)
