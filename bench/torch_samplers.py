# SPDX-License-Identifier: Apache-2.0
"""What one writes in plain PyTorch instead of guided_sample: the same token and the same measures.

Each function takes base, tuned, untuned [B, V], a weight, a temperature and (where it filters)
top_k and top_p, and returns token, logprob, base_logprob, implicit_reward. The measures use
logsumexp and a gather, which is cheaper than log_softmax of whole rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 1024
Drawn = tuple[Tensor, Tensor, Tensor, Tensor]


def combine(base: Tensor, tuned: Tensor, untuned: Tensor, weight: float, t: float) -> Tensor:
    return (base.float() + weight * (tuned.float() - untuned.float())) / t


def log_p(logits: Tensor, at: Tensor) -> Tensor:
    logits = logits.float()
    return logits.gather(1, at)[:, 0] - logits.logsumexp(1)


def measured(token: Tensor, logprob: Tensor, base: Tensor, tuned: Tensor, untuned: Tensor) -> Drawn:
    at = token[:, None]
    return token, logprob, log_p(base, at), log_p(tuned, at) - log_p(untuned, at)


def multinomial(base: Tensor, tuned: Tensor, untuned: Tensor, weight: float, t: float) -> Drawn:
    p = combine(base, tuned, untuned, weight, t).softmax(1)
    at = torch.multinomial(p, 1)
    return measured(at[:, 0], p.gather(1, at)[:, 0].log(), base, tuned, untuned)


def inverse_cdf(
    base: Tensor, tuned: Tensor, untuned: Tensor, weight: float, t: float, u: Tensor
) -> Drawn:
    p = combine(base, tuned, untuned, weight, t).softmax(1)
    cumulative = p.cumsum(1)
    at = torch.searchsorted(cumulative, u[:, None] * cumulative[:, -1:]).clamp(max=p.shape[1] - 1)
    return measured(at[:, 0], p.gather(1, at)[:, 0].log(), base, tuned, untuned)


def hierarchical(
    base: Tensor, tuned: Tensor, untuned: Tensor, weight: float, t: float, u: Tensor
) -> Drawn:
    """Block sums, then one block: written for torch.compile."""
    z = combine(base, tuned, untuned, weight, t)
    num_rows, vocab_size = z.shape
    num_blocks = -(-vocab_size // BLOCK)
    padded = torch.nn.functional.pad(z, (0, num_blocks * BLOCK - vocab_size), value=-torch.inf)
    blocks = padded.view(num_rows, num_blocks, BLOCK)
    top = z.amax(1, keepdim=True)
    sums = (blocks - top[:, :, None]).exp().sum(2)
    cumulative = sums.cumsum(1)
    target = u[:, None] * cumulative[:, -1:]
    block = (cumulative <= target).sum(1, keepdim=True).clamp(max=num_blocks - 1)
    before = cumulative.gather(1, block) - sums.gather(1, block)
    chosen = blocks.gather(1, block[:, :, None].expand(-1, 1, BLOCK))[:, 0]
    inside = ((chosen - top).exp().cumsum(1) <= target - before).sum(1, keepdim=True)
    at = (block * BLOCK + inside).clamp(max=vocab_size - 1)
    logprob = z.gather(1, at)[:, 0] - top[:, 0] - cumulative[:, -1].log()
    return measured(at[:, 0], logprob, base, tuned, untuned)


def sorted_filters(
    base: Tensor,
    tuned: Tensor,
    untuned: Tensor,
    weight: float,
    t: float,
    top_k: int,
    top_p: float,
) -> Drawn:
    """The usual sort-based chain."""
    z, ids = combine(base, tuned, untuned, weight, t).sort(dim=1, descending=True)
    if top_k:
        z[:, top_k:] = -torch.inf
    p = z.softmax(1)
    if top_p < 1:
        p = torch.where(p.cumsum(1) - p < top_p, p, 0.0)
        p = p / p.sum(1, keepdim=True)
    rank = torch.multinomial(p, 1)
    token = ids.gather(1, rank)[:, 0]
    return measured(token, p.gather(1, rank)[:, 0].log(), base, tuned, untuned)


def topk_filter(
    base: Tensor, tuned: Tensor, untuned: Tensor, weight: float, t: float, top_k: int
) -> Drawn:
    z, ids = combine(base, tuned, untuned, weight, t).topk(top_k, dim=1)
    p = z.softmax(1)
    rank = torch.multinomial(p, 1)
    token = ids.gather(1, rank)[:, 0]
    return measured(token, p.gather(1, rank)[:, 0].log(), base, tuned, untuned)
