# SPDX-License-Identifier: Apache-2.0
"""`python -m bench attention`: paged attention against torch's SDPA on gathered contexts.

B rows share a prompt of P tokens and have a response of R = 32 each; q queries a row are its last.

- "sdpa, gathered before": a row's context lies contiguous already, at no cost: P + R keys a row;
- "gather + sdpa": the same, with the gathering from the paged pool that it takes;
- "sdpa, rows folded": all rows as queries of one row under a mask: P + B * R keys in all, the
  prompt once, which is the most that plain PyTorch can share.

Shares are of read bandwidth, for keys and values read once: the prompt once, not once a row.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Call
from bench.run import OURS, Run, parser_of
from ivg_fast.ops.attention_metadata import AttentionMetadata
from ivg_fast.ops.kv_cache import BLOCK_SIZE
from ivg_fast.ops.paged_attention import paged_attention_prepared

RESPONSE = 32
HEAD_SIZE = 64
# (prompt tokens, rows, queries a row): along the prompt, along rows, along queries
QUICK = ((256, 16, 1), (1024, 1, 1), (1024, 16, 1), (256, 16, 5))
PROMPTS = tuple((prompt, 16, 1) for prompt in (64, 256, 1024, 4096))
ROWS = tuple((1024, rows, 1) for rows in (1, 4, 16, 64))
QUERIES = tuple((256, 16, queries) for queries in (1, 5, 16))


class Rows:
    """Rows of one prompt: pools, tables, queries, and their contexts gathered.

    Args:
        prompt: tokens, a multiple of 16.
        rows, queries: B and q.
        heads, kv_heads: of the queries, of the keys.
    """

    def __init__(self, prompt: int, rows: int, queries: int, heads: int, kv_heads: int) -> None:
        self.rows, self.queries = rows, queries
        prompt_blocks, own_blocks = prompt // BLOCK_SIZE, RESPONSE // BLOCK_SIZE
        num_blocks = prompt_blocks + rows * own_blocks
        generator = torch.Generator().manual_seed(prompt + rows)
        ids = torch.randperm(num_blocks, generator=generator)
        shared = ids[:prompt_blocks].expand(rows, -1)
        self.table = torch.cat([shared, ids[prompt_blocks:].view(rows, own_blocks)], dim=1)
        shape = (num_blocks, kv_heads, BLOCK_SIZE, HEAD_SIZE)
        self.pools = [torch.randn(shape, generator=generator) for _ in range(2)]
        self.query = torch.randn(rows * queries, heads, HEAD_SIZE, generator=generator)
        self.by_row = self.query.view(rows, queries, heads, HEAD_SIZE).transpose(1, 2).contiguous()
        self.scale = HEAD_SIZE**-0.5
        self.num_bytes = 2 * kv_heads * HEAD_SIZE * 4 * (prompt + rows * RESPONSE)

        def filled(value: int) -> Tensor:
            return torch.full((rows,), value, dtype=torch.int32)

        self.metadata = AttentionMetadata.build(
            block_table=self.table.int(),
            query_start_loc=torch.arange(rows + 1, dtype=torch.int32) * queries,
            prompt_lens=filled(prompt),
            response_lens=filled(RESPONSE),
            response_block_start=filled(prompt_blocks),
        )
        self.num_keys = prompt + RESPONSE
        key = torch.arange(self.num_keys)
        last = key[-queries:, None]
        self.mask = None if queries == 1 else (key <= last)
        folded_key = torch.arange(prompt + rows * RESPONSE) - prompt
        row = torch.arange(rows).repeat_interleave(queries)[:, None]
        seen = (folded_key // RESPONSE == row) & (
            folded_key % RESPONSE <= last.repeat(rows, 1) - prompt
        )
        self.folded_mask = torch.zeros(seen.shape).masked_fill_(
            ~(seen | (folded_key < 0)), -torch.inf
        )

    def ours(self) -> Tensor:
        return paged_attention_prepared(self.query, *self.pools, self.metadata, scale=self.scale)

    def gather(self) -> list[Tensor]:
        """Keys and values [B, Hkv, P + R, D]."""
        return [pool[self.table].transpose(1, 2).flatten(2, 3).contiguous() for pool in self.pools]

    def attend(self, keys: Tensor, values: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            self.by_row, keys, values, attn_mask=self.mask, enable_gqa=True
        )

    def folded(self) -> Call:
        own = self.table[:, -(RESPONSE // BLOCK_SIZE) :].flatten()
        order = torch.cat([self.table[0, : -(RESPONSE // BLOCK_SIZE)], own])
        keys, values = (p[order].transpose(0, 1).flatten(1, 2)[None] for p in self.pools)
        query = self.query.transpose(0, 1)[None].contiguous()
        return lambda: F.scaled_dot_product_attention(
            query, keys, values, attn_mask=self.folded_mask, enable_gqa=True
        )

    def providers(self) -> dict[str, Call]:
        keys, values = self.gather()
        return {
            OURS: self.ours,
            "sdpa, gathered before": lambda: self.attend(keys, values),
            "gather + sdpa": lambda: self.attend(*self.gather()),
            "sdpa, rows folded": self.folded(),
        }


def main() -> None:
    argv = sys.argv[1:]
    parser = parser_of(__doc__)
    parser.add_argument("--heads", type=int, default=8, help="of the queries")
    parser.add_argument("--kv-heads", type=int, default=8)
    options = parser.parse_args()
    run = Run("attention", options, argv)
    run.measure_limits()
    shapes = QUICK if options.quick else tuple(dict.fromkeys((*PROMPTS, *ROWS, *QUERIES)))
    config = (
        f"float32, {options.heads} heads, {options.kv_heads} of keys, of {HEAD_SIZE}; "
        f"one prompt shared, {RESPONSE} response tokens a row"
    )
    for prompt, num_rows, queries in shapes:
        rows = Rows(prompt, num_rows, queries, options.heads, options.kv_heads)
        run.compare(
            "paged_attention",
            {"P": prompt, "B": num_rows, "q": queries},
            rows.providers(),
            config,
            num_bytes=rows.num_bytes,
        )
    run.finish()
