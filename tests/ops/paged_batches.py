# SPDX-License-Identifier: Apache-2.0
"""Random ragged batches on a poisoned pool, and what the tests compare attention with."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

BLOCK_SIZE = 16


@dataclass
class PagedBatch:
    """Arguments of `paged_attention`, and the same keys and values row by row in order."""

    query: Tensor
    key_pool: Tensor
    value_pool: Tensor
    rows: dict[str, Tensor]
    keys: list[Tensor] = field(default_factory=list)  # each [P + R, Hkv, D]
    values: list[Tensor] = field(default_factory=list)

    @property
    def args(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key_pool, self.value_pool

    def queries(self) -> list[Tensor]:
        starts = self.rows["query_start_loc"].tolist()
        return [self.query[a:b] for a, b in pairwise(starts)]


def make_batch(
    lens: list[tuple[int, int, int]],
    *,
    heads: tuple[int, int] = (4, 2),
    sizes: tuple[int, int] = (16, 16),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    share_prompt: bool = False,
    spread: float = 1.0,
) -> PagedBatch:
    """`lens` holds (prompt, response, queries) a row. Block ids are shuffled, every other row has a
    hole of a whole block before its response, and each slot that holds no key holds NaN."""
    g = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads = heads
    key_size, value_size = sizes
    prompt_blocks = [-(-prompt // BLOCK_SIZE) for prompt, _, _ in lens]
    starts = [n if share_prompt else n + i % 2 for i, n in enumerate(prompt_blocks)]
    width = 1 + max(s - (-r // BLOCK_SIZE) for s, (_, r, _) in zip(starts, lens, strict=True))
    num_blocks = len(lens) * width + 2
    table = torch.randperm(num_blocks, generator=g)[: len(lens) * width].view(len(lens), width)
    if share_prompt:
        table[:, : prompt_blocks[0]] = table[0, : prompt_blocks[0]]
    key_pool = torch.full((num_blocks, num_kv_heads, BLOCK_SIZE, key_size), float("nan"))
    value_pool = torch.full((num_blocks, num_kv_heads, BLOCK_SIZE, value_size), float("nan"))
    key_pool, value_pool = key_pool.to(dtype), value_pool.to(dtype)

    def random(*shape: int) -> Tensor:
        return (spread * torch.randn(*shape, generator=g)).to(dtype)

    batch = PagedBatch(torch.empty(0), key_pool, value_pool, {})
    for i, (prompt, response, _) in enumerate(lens):
        slots = torch.cat([torch.arange(prompt), starts[i] * BLOCK_SIZE + torch.arange(response)])
        blocks, offsets = table[i][slots // BLOCK_SIZE], slots % BLOCK_SIZE
        keys = random(prompt + response, num_kv_heads, key_size)
        values = random(prompt + response, num_kv_heads, value_size)
        if share_prompt and i:
            keys[:prompt], values[:prompt] = batch.keys[0][:prompt], batch.values[0][:prompt]
        key_pool[blocks, :, offsets], value_pool[blocks, :, offsets] = keys, values
        batch.keys.append(keys)
        batch.values.append(values)
    # Entries that no key lives in are not looked at, whatever they hold.
    for i, (_, response, _) in enumerate(lens):
        used = starts[i] - (-response // BLOCK_SIZE)
        table[i, prompt_blocks[i] : starts[i]] = -7
        table[i, used:] = 2**31 - 1
    num_tokens = sum(n for _, _, n in lens)
    batch.query = random(num_tokens, num_heads, key_size)

    def ints(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    batch.rows = {
        "block_table": table.int(),
        "query_start_loc": ints([0, *accumulate(n for _, _, n in lens)]),
        "prompt_lens": ints([p for p, _, _ in lens]),
        "response_lens": ints([r for _, r, _ in lens]),
        "response_block_start": ints(starts),
    }
    return batch


def random_lens(seed: int, num_rows: int = 6) -> list[tuple[int, int, int]]:
    """Fresh and chunked prompts, decodes, extensions, rows without a query or a prompt, with
    lengths around the block and segment sizes of the kernel."""
    g = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=g))

    lens = []
    for _ in range(num_rows):
        prompt = [draw(1, 40), 16 * draw(1, 3), draw(500, 560), 0][draw(0, 3)]
        response = [0, 16 * draw(1, 2), draw(1, 70)][draw(0, 2)] if prompt else draw(1, 50)
        total = prompt + response
        queries = [1, 0, min(draw(2, 40), total), total if total < 100 else 1][draw(0, 3)]
        lens.append((prompt, response, queries))
    return lens


def plain_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """One row with its keys in order, as eager PyTorch code writes it, in the dtype of `query`."""
    num_queries, num_heads, _ = query.shape
    group = num_heads // keys.shape[1]
    k = keys.transpose(0, 1).repeat_interleave(group, dim=0)
    v = values.transpose(0, 1).repeat_interleave(group, dim=0)
    scores = torch.matmul(query.transpose(0, 1), k.transpose(1, 2)) * scale
    if soft_cap is not None:
        scores = torch.tanh(scores / soft_cap) * soft_cap
    q_pos = torch.arange(len(keys) - num_queries, len(keys))[:, None]
    k_pos = torch.arange(len(keys))[None, :]
    allowed = k_pos <= q_pos
    if sliding_window is not None:
        allowed &= k_pos > q_pos - sliding_window
    scores = scores.masked_fill(~allowed, float("-inf"))
    if sinks is not None:
        column = sinks.to(scores.dtype).view(-1, 1, 1).expand(-1, num_queries, 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : len(keys)]
    return torch.matmul(weights, v).transpose(0, 1)


def plain_batch(batch: PagedBatch, dtype: torch.dtype, **options: Any) -> Tensor:
    rows = zip(batch.queries(), batch.keys, batch.values, strict=True)
    return torch.cat([plain_attention(*(t.to(dtype) for t in row), **options) for row in rows])
