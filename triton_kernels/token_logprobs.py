# SPDX-License-Identifier: Apache-2.0
"""token_logprobs in Triton: one program a (token, vocabulary block), then one a token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ivg_fast.triton_kernels.guided_sample_jit import LOG2E, _log_sum, _logits, _store_stats

BLOCK = 2048  # vocabulary entries a program reads


@triton.jit
def _measure_rows(
    logits, minus, logits_stride, minus_stride, rows, stats, vocab_size, num_tokens,
    HAS_ROWS: tl.constexpr, HAS_MINUS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    block = tl.program_id(1)
    num_blocks = tl.num_programs(1)
    num_items = num_tokens * num_blocks
    row = i.to(tl.int64)
    if HAS_ROWS:
        row = tl.load(rows + i).to(tl.int64)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    at = stats + i * num_blocks + block
    _store_stats(at, _logits(logits, logits_stride, row, columns, vocab_size), LOG2E, num_items)
    if HAS_MINUS:
        x = _logits(minus, minus_stride, row, columns, vocab_size)
        _store_stats(at + 2 * num_items, x, LOG2E, num_items)


@triton.jit
def _gather_logprobs(
    logits, minus, logits_stride, minus_stride, rows, stats, token_ids, out, num_tokens, num_blocks,
    HAS_ROWS: tl.constexpr, HAS_MINUS: tl.constexpr, PADDED_BLOCKS: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    num_items = num_tokens * num_blocks
    row = i.to(tl.int64)
    if HAS_ROWS:
        row = tl.load(rows + i).to(tl.int64)
    token = tl.load(token_ids + i)
    x = tl.load(logits + row * logits_stride + token).to(tl.float32).to(tl.float64)
    result = x - _log_sum(stats, i, num_items, num_blocks, PADDED_BLOCKS)
    if HAS_MINUS:
        y = tl.load(minus + row * minus_stride + token).to(tl.float32).to(tl.float64)
        stats += 2 * num_items
        result -= y - _log_sum(stats, i, num_items, num_blocks, PADDED_BLOCKS)
    tl.store(out + i, result.to(tl.float32))


def token_logprobs(
    logits: Tensor,
    minus: Tensor | None,
    token_ids: Tensor,
    logit_rows: Tensor | None,
) -> Tensor:
    """ivg_fast.ops.token_logprobs (less those of `minus`) on arguments that were checked.

    Returns:
        float32[N].
    """
    num_tokens = token_ids.shape[0]
    out = torch.empty(num_tokens, dtype=torch.float32, device=logits.device)
    if num_tokens == 0:
        return out
    vocab_size = logits.shape[1]
    num_blocks = triton.cdiv(vocab_size, BLOCK)
    stats = torch.empty(4, num_tokens, num_blocks, dtype=torch.float32, device=logits.device)
    other = logits if minus is None else minus
    rows = token_ids if logit_rows is None else logit_rows
    sources = (logits, other, logits.stride(0), other.stride(0), rows, stats)
    flags = {"HAS_ROWS": logit_rows is not None, "HAS_MINUS": minus is not None}
    _measure_rows[(num_tokens, num_blocks)](*sources, vocab_size, num_tokens, **flags, BLOCK=BLOCK)
    _gather_logprobs[(num_tokens,)](
        *(*sources, token_ids, out, num_tokens, num_blocks),
        **flags,
        PADDED_BLOCKS=triton.next_power_of_2(num_blocks),
    )
    return out
