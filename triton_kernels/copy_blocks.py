# SPDX-License-Identifier: Apache-2.0
"""copy_blocks in Triton, for builds without the CUDA kernel: one launch for all pools."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # 4-byte words a program moves


@triton.jit
def _copy(pools, block_bytes, pairs, BLOCK: tl.constexpr):
    """Program (stretch of a block, pair, pool)."""
    pair = pairs + tl.program_id(1) * 2
    # Blocks are whole vectors of 16 bytes, and so is where they begin.
    num_words = tl.multiple_of(tl.load(block_bytes + tl.program_id(2)) // 4, 4)
    pool = tl.load(pools + tl.program_id(2)).to(tl.pointer_type(tl.int32))
    pool = tl.multiple_of(pool, 16)
    word = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_there = word < num_words
    src = pool + tl.load(pair).to(tl.int64) * num_words + word
    dst = pool + tl.load(pair + 1).to(tl.int64) * num_words + word
    tl.store(dst, tl.load(src, mask=is_there), mask=is_there)


def copy_blocks(pools: Tensor, block_bytes: Tensor, max_block_bytes: int, pairs: Tensor) -> None:
    """pool[dst] = pool[src] for each (src, dst) of `pairs` and each pool.

    Args:
        pools: int64 [num_pools], addresses on the device of the tensors given here.
        block_bytes: int64 [num_pools], multiples of 16, as the addresses are.
        max_block_bytes: the largest of them.
        pairs: int32 [num_pairs, 2]; no dst occurs twice or as a src.
    """
    grid = (triton.cdiv(max_block_bytes, 4 * BLOCK), pairs.shape[0], pools.shape[0])
    if 0 not in grid:
        _copy[grid](pools, block_bytes, pairs, BLOCK=BLOCK)
