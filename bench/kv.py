# SPDX-License-Identifier: Apache-2.0
"""`python -m bench kv`: write_kv and copy_blocks against plain PyTorch and a plain copy.

"copy" moves as many bytes from one contiguous tensor to another: the least that any write pays.
What a fork replaces is the last provider of copy_blocks: reordering the whole cache by row.

On a GPU the pools are those of well-known models, bfloat16, all layers of all roles; single calls
count what the host takes to launch them, "graph" is the device's time alone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.harness import Call, cache_bytes, num_cold_sets
from bench.model_shapes import FAMILIES, KVShape, kv_shape
from bench.run import OURS, Run, parser_of
from ivg_fast.ops.block_copy import BlockCopier
from ivg_fast.ops.kv_cache import BLOCK_SIZE, write_kv

CONTEXT = 256  # tokens a row of the cache that is reordered
MAX_REORDERED = 8 << 30  # bytes


@dataclass(frozen=True, slots=True)
class Pools:
    """The pools that a fork copies in.

    Attributes:
        name: in a record's configuration.
        models: of each model the shape of its keys and values.
        num_blocks: of each pool.
        family: in a record's kernel, where there are several.
    """

    name: str
    models: Sequence[KVShape]
    dtype: torch.dtype
    num_blocks: int
    family: str = ""

    def new(self, device: str) -> list[Tensor]:
        return [
            new_pool(device, self.num_blocks, model.num_heads, model.head_size, self.dtype)
            for model in self.models
            for _ in range(2 * model.num_layers)
        ]


CPU_POOLS = Pools("float32, 8 heads of 64", [KVShape(4, 8, 64)], torch.float32, 1024)


def gpu_pools(family: str, num_blocks: int = 256) -> Pools:
    """Those of a family's three models."""
    roles = FAMILIES[family].roles.values()
    name = f"bfloat16, keys and values of {', '.join(roles)}"
    return Pools(name, [kv_shape(shape) for shape in roles], torch.bfloat16, num_blocks, family)


def new_pool(
    device: str, num_blocks: int, num_heads: int, head_size: int, dtype: torch.dtype
) -> Tensor:
    shape = (num_blocks, num_heads, BLOCK_SIZE, head_size)
    return torch.randn(shape, device=device, dtype=dtype)


def plain_copy(num_bytes: int, device: str) -> Call:
    """A copy of so many bytes."""
    source = torch.randn(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def writing(run: Run, pools: Pools, num_tokens: int) -> None:
    """Of one layer's keys."""
    model, dtype = pools.models[0], pools.dtype
    heads, size = model.num_heads, model.head_size
    generator = torch.Generator().manual_seed(num_tokens)
    states = torch.randn(num_tokens, heads, size, device=run.device, dtype=dtype)
    slots = torch.randperm(pools.num_blocks * BLOCK_SIZE, generator=generator)[:num_tokens]
    slots = slots.to(run.device)
    narrow, blocks, offsets = slots.int(), slots // BLOCK_SIZE, slots % BLOCK_SIZE
    pool = new_pool(run.device, pools.num_blocks, heads, size, dtype)
    by_slot = new_pool(run.device, pools.num_blocks, heads, size, dtype).view(-1, heads, size)

    def index_put() -> None:
        pool[blocks, :, offsets] = states

    providers: dict[str, Call] = {
        OURS: lambda: write_kv(states, pool, narrow),
        "index_put, same pool": index_put,
        "index_copy, pool by slot": lambda: by_slot.index_copy_(0, slots, states),
        "copy": plain_copy(states.nbytes, run.device),
    }
    config = f"{str(dtype)[6:]}, {heads} heads of {size}, slots at random"
    num_bytes, x = 2 * states.nbytes, {"tokens": num_tokens}
    run.compare("write_kv", x, providers, config, num_bytes=num_bytes, limit="copy")
    if run.uses_graphs:
        run.compare_in_graphs("write_kv", x, [providers], config, num_bytes=num_bytes)


def copying(run: Run, shape: Pools, num_pairs: int) -> None:
    """All layers of all roles; `num_pairs` is at most half of the blocks."""
    generator = torch.Generator().manual_seed(num_pairs)
    pools = shape.new(run.device)
    copier = BlockCopier(pools)
    num_bytes = num_pairs * copier.bytes_per_block
    x, config = {"pairs": num_pairs}, f"{shape.name}, {len(pools)} pools"
    kernel = f"copy_blocks, {shape.family}" if shape.family else "copy_blocks"

    def providers_of(blocks: Tensor) -> dict[str, Call]:
        """Args: block ids [2 * num_pairs]."""
        pairs = blocks.view(-1, 2).int()
        sources, targets = blocks.view(-1, 2).T.contiguous().to(run.device)

        def index_copy() -> None:
            for pool in pools:
                pool.index_copy_(0, targets, pool.index_select(0, sources))

        return {OURS: lambda: copier.copy(pairs), "index_copy, pool by pool": index_copy}

    order = torch.randperm(shape.num_blocks, generator=generator)
    providers = providers_of(order[: 2 * num_pairs])
    providers["copy"] = plain_copy(num_bytes, run.device)
    eager = dict(providers)
    eager["clone of the blocks"] = lambda: [pool[:num_pairs].clone() for pool in pools]
    if num_bytes * (CONTEXT // BLOCK_SIZE) <= MAX_REORDERED:
        caches = [
            torch.empty(num_pairs, p.shape[1], CONTEXT, p.shape[3], device=p.device, dtype=p.dtype)
            for p in pools
        ]
        rows = torch.randint(num_pairs, (num_pairs,), generator=generator).to(run.device)
        name = f"reorder whole rows of {CONTEXT}"
        eager[name] = lambda: [cache.index_select(0, rows) for cache in caches]
    run.compare(kernel, x, eager, config, num_bytes=2 * num_bytes, limit="copy")
    if not run.uses_graphs:
        return
    if copier.backend == "triton":  # it brings the pairs to the device in a copy that may wait
        run.leave_out(f"{kernel} pairs={num_pairs} in a graph", "no CUDA kernels in this build")
        del providers[OURS]
    sets = [providers]
    num_sets = num_cold_sets(2 * num_bytes, cache_bytes(run.device))
    others = order[2 * num_pairs :].split(2 * num_pairs)
    for blocks in others[: max(num_sets - 1, 0)]:
        if len(blocks) == 2 * num_pairs:
            sets.append(providers_of(blocks) | {"copy": plain_copy(num_bytes, run.device)})
    sets = [{name: each[name] for name in providers} for each in sets]
    if len(sets) < num_sets or num_sets == 0:
        sets = sets[:1]  # too few to be cold
    run.compare_in_graphs(kernel, x, sets, config, num_bytes=2 * num_bytes)


def main() -> None:
    argv = sys.argv[1:]
    parser = parser_of(__doc__, has_cuda=True)
    parser.add_argument(
        "--families", nargs="+", choices=FAMILIES, default=["llama2", "llama3", "gpt2"],
        help="whose pools, on a GPU",
    )  # fmt: skip
    options = parser.parse_args()
    run = Run("kv", options, argv)
    run.measure_limits()
    if run.device == "cpu":
        families = {"": CPU_POOLS}
    else:
        families = {name: gpu_pools(name) for name in options.families}
    pairs = (1, 16) if options.quick else (1, 4, 16, 64)
    if run.device == "cuda":  # what a fork of W, K = 4, 4 and 8, 8 copies
        pairs = (12, 56) if options.quick else (12, 56, 1, 4)
    for name, pools in families.items():
        for num_pairs in pairs:
            if run.has_time(f"copy_blocks {name} pairs={num_pairs}"):
                copying(run, pools, num_pairs)
    for num_tokens in (64, 1024) if options.quick else (1, 16, 64, 256, 1024, 4096):
        if run.has_time(f"write_kv tokens={num_tokens}"):
            writing(run, next(iter(families.values())), num_tokens)
    run.finish()
