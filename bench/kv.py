# SPDX-License-Identifier: Apache-2.0
"""`python -m bench kv`: write_kv and copy_blocks against plain PyTorch and a plain copy.

"copy" moves as many bytes from one contiguous tensor to another: the least that any write pays.
What a fork replaces is the last provider of copy_blocks: reordering the whole cache by row.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from bench.harness import Call
from bench.run import OURS, Run, parser_of
from ivg_fast.ops.block_copy import BlockCopier
from ivg_fast.ops.kv_cache import BLOCK_SIZE, write_kv

HEADS, HEAD_SIZE, LAYERS = 8, 64, 4
NUM_BLOCKS = 1024
CONTEXT = 256  # tokens a row of the cache that is reordered
CONFIG = f"float32, {HEADS} heads of {HEAD_SIZE}"


def new_pool(device: str) -> Tensor:
    return torch.randn(NUM_BLOCKS, HEADS, BLOCK_SIZE, HEAD_SIZE, device=device)


def plain_copy(num_bytes: int, device: str) -> Call:
    """A copy of so many bytes."""
    source = torch.randn(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def writing(run: Run, num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    states = torch.randn(num_tokens, HEADS, HEAD_SIZE, device=run.device)
    slots = torch.randperm(NUM_BLOCKS * BLOCK_SIZE, generator=generator)[:num_tokens]
    slots = slots.to(run.device)
    narrow, blocks, offsets = slots.int(), slots // BLOCK_SIZE, slots % BLOCK_SIZE
    pool = new_pool(run.device)
    by_slot = new_pool(run.device).view(-1, HEADS, HEAD_SIZE)

    def index_put() -> None:
        pool[blocks, :, offsets] = states

    providers: dict[str, Call] = {
        OURS: lambda: write_kv(states, pool, narrow),
        "index_put, same pool": index_put,
        "index_copy, pool by slot": lambda: by_slot.index_copy_(0, slots, states),
        "copy": plain_copy(states.nbytes, run.device),
    }
    run.compare(
        "write_kv",
        {"tokens": num_tokens},
        providers,
        CONFIG + ", slots at random",
        num_bytes=2 * states.nbytes,
        limit="copy",
    )


def copying(run: Run, num_pairs: int) -> None:
    generator = torch.Generator().manual_seed(num_pairs)
    pools = [new_pool(run.device) for _ in range(2 * LAYERS)]
    blocks = torch.randperm(NUM_BLOCKS, generator=generator)[: 2 * num_pairs].view(-1, 2)
    sources, targets = blocks.T.contiguous().to(run.device)
    pairs = blocks.int()
    copier = BlockCopier(pools)
    cache_shape = (num_pairs, HEADS, CONTEXT, HEAD_SIZE)
    caches = [torch.randn(cache_shape, device=run.device) for _ in pools]
    order = torch.randint(num_pairs, (num_pairs,), generator=generator).to(run.device)

    def index_copy() -> None:
        for pool in pools:
            pool.index_copy_(0, targets, pool.index_select(0, sources))

    num_bytes = num_pairs * copier.bytes_per_block
    providers: dict[str, Call] = {
        OURS: lambda: copier.copy(pairs),
        "index_copy, pool by pool": index_copy,
        "clone of the blocks": lambda: [pool[:num_pairs].clone() for pool in pools],
        "copy": plain_copy(num_bytes, run.device),
        f"reorder whole rows of {CONTEXT}": lambda: [c.index_select(0, order) for c in caches],
    }
    run.compare(
        "copy_blocks",
        {"pairs": num_pairs},
        providers,
        f"{CONFIG}, {len(pools)} pools",
        num_bytes=2 * num_bytes,
        limit="copy",
    )


def main() -> None:
    argv = sys.argv[1:]
    options = parser_of(__doc__).parse_args()
    run = Run("kv", options, argv)
    run.measure_limits()
    for num_tokens in (64, 1024) if options.quick else (1, 16, 64, 256, 1024, 4096):
        writing(run, num_tokens)
    for num_pairs in (1, 16) if options.quick else (1, 4, 16, 64):
        copying(run, num_pairs)
    run.finish()
