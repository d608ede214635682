# SPDX-License-Identifier: Apache-2.0
"""write_kv in Triton: the keys and values of all new tokens of a layer in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

SLOTS_PER_BLOCK = tl.constexpr(16)
BLOCK = 1024  # elements a program moves


@triton.jit
def _write_one(
    src, token_stride, head_stride, pool, token, slot, NUM_HEADS: tl.constexpr, SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    head = element // SIZE
    column = element % SIZE
    is_there = head < NUM_HEADS
    at = token * token_stride + head.to(tl.int64) * head_stride
    moved = tl.load(src + at + column, mask=is_there)
    block = (slot // SLOTS_PER_BLOCK) * NUM_HEADS + head
    to = (block * SLOTS_PER_BLOCK + slot % SLOTS_PER_BLOCK) * SIZE
    tl.store(pool + to + column, moved, mask=is_there)


@triton.jit
def _write(
    key, key_token_stride, key_head_stride, key_pool,
    value, value_token_stride, value_head_stride, value_pool, slots,
    NUM_HEADS: tl.constexpr, KEY_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr,
    HAS_VALUE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (token, stretch of its elements); a slot of -1 is a pad."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    if slot >= 0:
        _write_one(
            key, key_token_stride, key_head_stride, key_pool, token, slot,
            NUM_HEADS, KEY_SIZE, BLOCK,
        )  # fmt: skip
        if HAS_VALUE:
            _write_one(
                value, value_token_stride, value_head_stride, value_pool, token, slot,
                NUM_HEADS, VALUE_SIZE, BLOCK,
            )  # fmt: skip


def write_kv(
    key: Tensor,
    key_pool: Tensor,
    slot_mapping: Tensor,
    value: Tensor | None = None,
    value_pool: Tensor | None = None,
) -> None:
    """ivg_fast.ops.write_kv on arguments that were checked, of keys and, in one go, of values."""
    num_tokens, num_heads, key_size = key.shape
    if value is None or value_pool is None:
        value, value_pool, has_value = key, key_pool, False
    else:
        has_value = True
    value_size = value.shape[2]
    if num_tokens == 0 or num_heads == 0:
        return
    stretches = triton.cdiv(num_heads * max(key_size, value_size), BLOCK)
    _write[(num_tokens, stretches)](
        *(key, key.stride(0), key.stride(1), key_pool),
        *(value, value.stride(0), value.stride(1), value_pool),
        slot_mapping,
        NUM_HEADS=num_heads,
        KEY_SIZE=key_size,
        VALUE_SIZE=value_size,
        HAS_VALUE=has_value,
        BLOCK=BLOCK,
    )
