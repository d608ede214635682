# SPDX-License-Identifier: Apache-2.0
"""`python -m bench attention`: paged attention against torch's SDPA on gathered contexts.

B rows share a prompt of P tokens and have a response of R = 32 each; q queries a row are its last.

- "sdpa, gathered before": a row's context lies contiguous already, at no cost: P + R keys a row;
- "flash, gathered before": the same by torch's flash attention (on a GPU, one query a row);
- "gather + sdpa": the same, with the gathering from the paged pool that it takes;
- "sdpa, rows folded": all rows as queries of one row under a mask: P + B * R keys in all, the
  prompt once, which is the most that plain PyTorch can share.

Shares are of read bandwidth, for keys and values read once: the prompt once, not once a row.

On a GPU it is device time in graphs, the layers' pools in turn so that none is in the L2, as when a
model decodes. There ours is measured three ways: rows share the prompt always, never, and as
WorkListOptions() has it; the last line of stdout says from which prompt and rows on sharing pays.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.crossover import NEVER, Point, best_switch, first_rows, regret
from bench.harness import Call, as_x, cache_bytes, num_cold_sets
from bench.run import OURS, Run, parser_of
from ivg_fast.ops.attention_metadata import AttentionMetadata
from ivg_fast.ops.kv_cache import BLOCK_SIZE
from ivg_fast.ops.paged_attention import WorkListOptions, paged_attention_prepared

RESPONSE = 32
HEAD_SIZE = 64  # on a CPU
# (prompt tokens, rows, queries a row): along the prompt, along rows, along queries
QUICK = ((256, 16, 1), (1024, 1, 1), (1024, 16, 1), (256, 16, 5))
PROMPTS = tuple((prompt, 16, 1) for prompt in (64, 256, 1024, 4096))
ROWS = tuple((1024, rows, 1) for rows in (1, 4, 16, 64))
QUERIES = tuple((256, 16, queries) for queries in (1, 5, 16))
Heads = tuple[int, int, int]  # of the queries, of the keys; head size
# Of Llama-3-8B and of Llama-2-7B.
GPU_HEADS: tuple[Heads, ...] = ((32, 8, 128), (32, 32, 128))
GPU_QUICK = ((1024, 16, 1), (256, 16, 1), (4096, 64, 1), (256, 4, 1))
_GPU_GRID = tuple((p, b, 1) for p in (256, 1024, 4096, 64, 8192) for b in (4, 16, 64, 1, 256))
GPU_SHAPES = (*GPU_QUICK, *(shape for shape in _GPU_GRID if shape not in GPU_QUICK))
ALONE, SHARED = f"{OURS}, rows apart", f"{OURS}, rows together"
WORK_LISTS = {
    OURS: None,
    ALONE: WorkListOptions(min_shared_rows=NEVER, min_shared_tokens=NEVER),
    SHARED: WorkListOptions(min_shared_rows=2, min_shared_tokens=BLOCK_SIZE),
}
# Of the free memory, what gathered contexts may take.
MAX_GATHERED = 0.25


class Rows:
    """Rows of one prompt: pools, tables, queries, and their contexts gathered.

    Args:
        prompt: tokens, a multiple of 16.
        rows, queries: B and q.
        heads, kv_heads, head_size: of the queries, of the keys, elements of each.
        num_layers: pools of their own.
    """

    def __init__(
        self,
        prompt: int,
        rows: int,
        queries: int,
        heads: int,
        kv_heads: int,
        head_size: int = HEAD_SIZE,
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        num_layers: int = 1,
    ) -> None:
        self.rows, self.queries = rows, queries
        prompt_blocks, own_blocks = prompt // BLOCK_SIZE, RESPONSE // BLOCK_SIZE
        num_blocks = prompt_blocks + rows * own_blocks
        generator = torch.Generator().manual_seed(prompt + rows)
        ids = torch.randperm(num_blocks, generator=generator)
        shared = ids[:prompt_blocks].expand(rows, -1)
        table = torch.cat([shared, ids[prompt_blocks:].view(rows, own_blocks)], dim=1)
        self.table = table.to(device)
        torch.manual_seed(prompt + rows)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, dtype=dtype)

        self.layers = [
            [drawn(num_blocks, kv_heads, BLOCK_SIZE, head_size) for _ in range(2)]
            for _ in range(num_layers)
        ]
        self.query = drawn(rows * queries, heads, head_size)
        self.by_row = self.query.view(rows, queries, heads, head_size).transpose(1, 2).contiguous()
        self.scale = head_size**-0.5
        self.num_bytes = 2 * kv_heads * head_size * dtype.itemsize * (prompt + rows * RESPONSE)
        self.gathered_bytes = self.num_bytes // (prompt + rows * RESPONSE) * rows
        self.gathered_bytes *= prompt + RESPONSE

        def filled(value: int) -> Tensor:
            return torch.full((rows,), value, dtype=torch.int32)

        self.metadata = AttentionMetadata.build(
            block_table=table.int(),
            query_start_loc=torch.arange(rows + 1, dtype=torch.int32) * queries,
            prompt_lens=filled(prompt),
            response_lens=filled(RESPONSE),
            response_block_start=filled(prompt_blocks),
        )
        self.num_keys = prompt + RESPONSE
        key = torch.arange(self.num_keys)
        last = key[-queries:, None]
        self.mask = None if queries == 1 else (key <= last).to(device)
        folded_key = torch.arange(prompt + rows * RESPONSE) - prompt
        row = torch.arange(rows).repeat_interleave(queries)[:, None]
        seen = (folded_key // RESPONSE == row) & (
            folded_key % RESPONSE <= last.repeat(rows, 1) - prompt
        )
        mask = torch.zeros(seen.shape).masked_fill_(~(seen | (folded_key < 0)), -torch.inf)
        self.folded_mask = mask.to(device, dtype)

    def ours(self, layer: int = 0, **options: Any) -> Tensor:
        return paged_attention_prepared(
            self.query, *self.layers[layer], self.metadata, scale=self.scale, **options
        )

    def gather(self, layer: int = 0) -> list[Tensor]:
        """Keys and values [B, Hkv, P + R, D]."""
        pools = self.layers[layer]
        return [pool[self.table].transpose(1, 2).flatten(2, 3).contiguous() for pool in pools]

    def attend(self, keys: Tensor, values: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            self.by_row, keys, values, attn_mask=self.mask, enable_gqa=True
        )

    def flash(self, keys: Tensor, values: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return self.attend(keys, values)

    def folded(self, layer: int = 0) -> Call:
        own = self.table[:, -(RESPONSE // BLOCK_SIZE) :].flatten()
        order = torch.cat([self.table[0, : -(RESPONSE // BLOCK_SIZE)], own])
        keys, values = (p[order].transpose(0, 1).flatten(1, 2)[None] for p in self.layers[layer])
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

    def graph_providers(
        self, layer: int, backend: str = "auto", *, can_gather: bool
    ) -> dict[str, Call]:
        """Those of one layer, on a GPU; without the gathered ones where they would not fit."""
        found: dict[str, Call] = {
            name: lambda options=options: self.ours(layer, work_list=options, backend=backend)
            for name, options in WORK_LISTS.items()
        }
        found["sdpa, rows folded"] = self.folded(layer)
        if can_gather:
            keys, values = self.gather(layer)
            found["sdpa, gathered before"] = lambda: self.attend(keys, values)
            if self.queries == 1:
                found["flash, gathered before"] = lambda: self.flash(keys, values)
            found["gather + sdpa"] = lambda: self.attend(*self.gather(layer))
        return found


def on_gpu(
    run: Run,
    all_heads: Sequence[Heads],
    shapes: Sequence[tuple[int, int, int]],
    dtype: torch.dtype,
    backend: str = "auto",
) -> dict[str, Any]:
    """Every shape in graphs; by heads the switch that their times speak for."""
    points: dict[Heads, list[Point]] = {heads: [] for heads in all_heads}
    for prompt, num_rows, queries in shapes:
        for heads in all_heads:
            kernel = f"paged_attention, {heads[0]}/{heads[1]} heads"
            x = {"P": prompt, "B": num_rows, "q": queries}
            if not run.has_time(f"{kernel} {as_x(x)}"):
                continue
            place = prompt, num_rows, queries, *heads
            seconds = _one_place(run, kernel, x, place, dtype, backend)
            if queries == 1 and {ALONE, SHARED} <= set(seconds):
                points[heads].append(Point(prompt, num_rows, seconds[ALONE], seconds[SHARED]))
    return {
        f"{heads[0]}/{heads[1]} heads of {heads[2]}": switch_of(found)
        for heads, found in points.items()
        if found
    }


def _one_place(
    run: Run,
    kernel: str,
    x: dict[str, int],
    place: tuple[int, int, int, int, int, int],
    dtype: torch.dtype,
    backend: str,
) -> dict[str, float]:
    """Median seconds by provider, from a cold cache where there can be one."""
    rows = Rows(*place, dtype=dtype, device=run.device)
    num_sets = num_cold_sets(rows.num_bytes, cache_bytes(run.device)) or 1
    can_gather = True
    if run.device == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
        # Kept for each layer, and gathered once more for the calls that do so.
        can_gather = (num_sets + 2) * rows.gathered_bytes <= MAX_GATHERED * free
    if not can_gather:
        run.leave_out(f"{kernel} {as_x(x)}: gathered", "too little memory")
    rows = Rows(*place, dtype=dtype, device=run.device, num_layers=num_sets)
    sets = [
        rows.graph_providers(layer, backend, can_gather=can_gather) for layer in range(num_sets)
    ]
    config = (
        f"{str(dtype)[6:]}, {place[3]} heads, {place[4]} of keys, of {place[5]}; "
        f"one prompt shared, {RESPONSE} response tokens a row"
    )
    found = run.compare_in_graphs(
        kernel, x, sets, config, num_bytes=rows.num_bytes, limit="read", is_cold=True
    )
    (seconds,) = found.values()
    return seconds


def switch_of(points: Sequence[Point]) -> dict[str, Any]:
    """What the last line of stdout says of one kind of heads."""
    default, best = WorkListOptions(), best_switch(points)
    of_default = regret(points, default.min_shared_rows, default.min_shared_tokens)
    return {
        "best min_shared_rows": best.min_shared_rows,
        "best min_shared_tokens": best.min_shared_tokens,
        "its regret": round(best.regret, 4),
        "regret of the default": round(of_default, 4),
        "regret of never sharing": round(regret(points, NEVER, NEVER), 4),
        "first rows that pay, by prompt": first_rows(points),
    }


def main() -> None:
    argv = sys.argv[1:]
    parser = parser_of(__doc__, has_cuda=True)
    parser.add_argument("--heads", type=int, default=8, help="of the queries, on a CPU")
    parser.add_argument("--kv-heads", type=int, default=8, help="on a CPU")
    options = parser.parse_args()
    # A graph holds many calls already.
    run = Run("attention", options, argv, (10, 5) if options.device == "cuda" else (30, 8))
    run.measure_limits()
    if run.device == "cuda":
        shapes = GPU_QUICK if options.quick else GPU_SHAPES
        run.finish(crossover=on_gpu(run, GPU_HEADS, shapes, torch.bfloat16))
        return
    shapes = QUICK if options.quick else tuple(dict.fromkeys((*PROMPTS, *ROWS, *QUERIES)))
    for prompt, num_rows, queries in shapes:
        if not run.has_time(f"P={prompt} B={num_rows} q={queries}"):
            continue
        rows = Rows(prompt, num_rows, queries, options.heads, options.kv_heads)
        config = (
            f"float32, {options.heads} heads, {options.kv_heads} of keys, of {HEAD_SIZE}; "
            f"one prompt shared, {RESPONSE} response tokens a row"
        )
        run.compare(
            "paged_attention",
            {"P": prompt, "B": num_rows, "q": queries},
            rows.providers(),
            config,
            num_bytes=rows.num_bytes,
        )
    run.finish()
