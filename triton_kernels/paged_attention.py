# SPDX-License-Identifier: Apache-2.0
"""paged_attention in Triton: two launches, whatever the batch.

`_attend` (item, KV head) attends one tile of queries to one split of keys and leaves, for each
query and head, the maximum of the scores, the sum of their exponentials and the values mixed by
these. `_merge` (token, head) joins a query's splits. Which tiles and splits there are is the work
list's business: see ivg_fast/ops/paged_plan.py.

Every length and index is read on the device, and a launch has as many programs as the plan has
room for items, so that a captured graph can be replayed while the responses grow.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ivg_fast.ops.paged_plan import PagedPlan
from ivg_fast.triton_kernels import paged_attention_jit as jit

SPLITS_AT_ONCE = 8  # that _merge has in flight
NUM_WARPS = 4
NUM_STAGES = 2


@dataclass(frozen=True, slots=True)
class Tiles:
    """How a layer's work is cut for the registers and the shared memory of one program.

    Attributes:
        group: query heads a KV head.
        key_size, value_size: elements of a head.
        item_bytes: of an element.
    """

    group: int
    key_size: int
    value_size: int
    item_bytes: int

    @classmethod
    def of_layer(cls, query: Tensor, key_pool: Tensor, value_pool: Tensor) -> Tiles:
        """Args: as of `paged_attention`."""
        group = query.shape[1] // key_pool.shape[1]
        return cls(group, key_pool.shape[3], value_pool.shape[3], query.element_size())

    @property
    def widest(self) -> int:
        return max(16, triton.next_power_of_2(max(self.key_size, self.value_size)))

    @property
    def largest(self) -> int:
        """Pairs of a query and a head that a tile has room for."""
        # What a program keeps in registers grows with both; float32 has no tensor cores besides.
        return 64 if self.widest <= 128 and self.item_bytes == 2 else 16

    @property
    def tile_heads(self) -> int:
        """Heads of a group that share a tile."""
        return min(self.group, self.largest)

    @property
    def tile_tokens(self) -> int:
        """Queries that may share a tile."""
        return self.largest // self.tile_heads

    def constants(self, tile_tokens: int) -> dict[str, int]:
        """What `_attend` is compiled for, for items of up to `tile_tokens` queries."""
        small = max(16, triton.next_power_of_2(self.tile_heads))
        # 8 KB of keys and as much of values at a time, twice for the pipeline: more takes registers
        # that another program could use.
        num_keys = 8192 // (self.widest * self.item_bytes)
        return {
            "GROUP": self.group,
            "TILE_HEADS": self.tile_heads,
            "KEY_SIZE": self.key_size,
            "VALUE_SIZE": self.value_size,
            "PADDED_KEY": max(16, triton.next_power_of_2(self.key_size)),
            "PADDED_VALUE": max(16, triton.next_power_of_2(self.value_size)),
            "SMALL_M": small,
            "LARGE_M": max(small, triton.next_power_of_2(self.tile_heads * tile_tokens)),
            "BLOCK_N": min(64, max(16, num_keys)),
        }


def paged_attention(
    query: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    plan: PagedPlan,
    out: Tensor,
    *,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    sinks: Tensor | None,
) -> None:
    """ivg_fast.ops.paged_attention on arguments that were checked; no call waits for the device."""
    num_tokens, num_heads, _ = query.shape
    num_kv_heads, value_size = key_pool.shape[1], value_pool.shape[3]
    if num_tokens == 0 or num_heads == 0:
        return
    tiles = Tiles.of_layer(query, key_pool, value_pool)
    shape = (plan.num_partials, num_heads)
    stats = torch.empty(2, *shape, dtype=torch.float32, device=query.device)
    partials = torch.empty(*shape, value_size, dtype=torch.float32, device=query.device)
    num_stats = plan.num_partials * num_heads
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if plan.num_items:
        head_tiles = triton.cdiv(tiles.group, tiles.tile_heads)
        jit._attend[(plan.num_items, num_kv_heads * head_tiles)](
            *(query, query.stride(0), query.stride(1), key_pool, value_pool, partials, stats),
            *(plan.items, plan.token_rows, plan.partial_starts, plan.query_start_loc),
            *(plan.prompt_lens, plan.response_lens, plan.response_block_start),
            *(plan.block_table, plan.table_width, num_stats),
            *(scale, soft_cap or 1.0, sliding_window or 0),
            **tiles.constants(plan.tile_tokens),
            HAS_CAP=soft_cap is not None,
            HAS_WINDOW=sliding_window is not None,
            # The interpreter's own arithmetic has no bfloat16.
            UPCAST=is_interpreted,
            num_warps=NUM_WARPS,
            num_stages=NUM_STAGES,
        )
    jit._merge[(num_tokens, num_heads)](
        *(partials, stats, plan.partial_starts, stats if sinks is None else sinks, out, num_stats),
        VALUE_SIZE=value_size,
        PADDED_VALUE=triton.next_power_of_2(value_size),
        NUM_AT_ONCE=SPLITS_AT_ONCE,
        HAS_SINKS=sinks is not None,
        num_warps=2,
    )
