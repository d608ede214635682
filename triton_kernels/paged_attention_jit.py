# SPDX-License-Identifier: Apache-2.0
"""The kernels of paged_attention.py, where it is told how they fit together.

Scores are kept in units of log 2, so that every exponential is an exp2.
"""

import math

import triton
import triton.language as tl

LOG2E = tl.constexpr(math.log2(math.e))
NEG_INF = tl.constexpr(float("-inf"))
SLOTS_PER_BLOCK = tl.constexpr(16)
ITEM_FIELDS = tl.constexpr(6)  # WorkItem of csrc/scheduler/work_list.h


@triton.jit
def _tanh(x):
    # 1 - 2 / (e^2x + 1) loses small arguments to cancellation. These have a polynomial, fitted to
    # (tanh(x) / x - 1) / x^2 on x^2 < 0.4: 1e-7 off, as a float32 is.
    square = x * x
    fitted = -0.053844994 + square * (0.020968205 - square * 0.0060537171)
    fitted = square * (-0.33333329 + square * (0.13332733 + square * fitted))
    return tl.where(square < 0.4, x + x * fitted, 1 - 2 / (tl.exp2(x * (2 * LOG2E)) + 1))


@triton.jit
def _block_of(position, prompt_len, prompt_blocks):
    behind = prompt_blocks + (position - prompt_len) // SLOTS_PER_BLOCK
    return tl.where(position < prompt_len, position // SLOTS_PER_BLOCK, behind)


@triton.jit
def _attend_tile(
    query, query_token_stride, query_head_stride, key_pool, value_pool, partials, stats,
    item, token_rows, partial_starts, query_start_loc, prompt_lens, response_lens, response_starts,
    block_table, table_width, num_stats, scale, soft_cap, sliding_window,
    GROUP: tl.constexpr, TILE_HEADS: tl.constexpr, KEY_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr, PADDED_KEY: tl.constexpr, PADDED_VALUE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """One item: BLOCK_M pairs of a query and a head of the group, against a run of key blocks."""
    TILES: tl.constexpr = (GROUP + TILE_HEADS - 1) // TILE_HEADS
    kv_head = tl.program_id(1) // TILES
    num_kv_heads = tl.num_programs(1) // TILES
    row = tl.load(item)
    first_token = tl.load(item + 1)
    num_tokens = tl.load(item + 2)
    first_block = tl.load(item + 3)
    end_block = tl.load(item + 4)
    prompt_len = tl.load(prompt_lens + row)
    prompt_blocks = (prompt_len + SLOTS_PER_BLOCK - 1) // SLOTS_PER_BLOCK
    # Key block j stands in column j, or, of the response, j + hole.
    hole = tl.load(response_starts + row) - prompt_blocks
    table = block_table + row.to(tl.int64) * table_width

    m = tl.arange(0, BLOCK_M)
    token = first_token + m // TILE_HEADS
    member = (tl.program_id(1) % TILES) * TILE_HEADS + m % TILE_HEADS
    head = kv_head * GROUP + member
    is_there = (m < num_tokens * TILE_HEADS) & (member < GROUP)
    partial = tl.load(partial_starts + token, mask=is_there, other=0) + tl.load(item + 5)
    is_there = is_there & (partial < tl.load(partial_starts + token + 1, mask=is_there, other=0))
    # A query's row may be another one than the item's: all of these rows share the blocks.
    token_row = tl.load(token_rows + token, mask=is_there, other=0)
    num_keys = tl.load(prompt_lens + token_row) + tl.load(response_lens + token_row)
    position = num_keys - (tl.load(query_start_loc + token_row + 1) - token)
    position = tl.where(is_there, position, -1)

    # Only blocks that some query sees now; there may be none, as lengths grow after the planning.
    last = tl.max(position, 0)
    if last >= 0:
        end_block = tl.minimum(end_block, _block_of(last, prompt_len, prompt_blocks) + 1)
    else:
        end_block = first_block
    if HAS_WINDOW:
        lowest = tl.min(tl.where(is_there, position, 2147483647), 0) - sliding_window + 1
        lowest = _block_of(tl.maximum(lowest, 0), prompt_len, prompt_blocks)
        # By whole steps, so that whoever shares the tile, a query's keys are added up alike.
        num_skipped = tl.maximum(lowest - first_block, 0) // (BLOCK_N // SLOTS_PER_BLOCK)
        first_block += num_skipped * (BLOCK_N // SLOTS_PER_BLOCK)

    key_column = tl.arange(0, PADDED_KEY)
    value_column = tl.arange(0, PADDED_VALUE)
    at = token.to(tl.int64) * query_token_stride + head.to(tl.int64) * query_head_stride
    q = tl.load(
        query + at[:, None] + key_column[None, :],
        mask=is_there[:, None] & (key_column < KEY_SIZE)[None, :],
        other=0.0,
    )
    if UPCAST:
        q = q.to(tl.float32)
    n = tl.arange(0, BLOCK_N)
    slot = n % SLOTS_PER_BLOCK
    top = tl.full((BLOCK_M,), NEG_INF, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    mixed = tl.zeros((BLOCK_M, PADDED_VALUE), tl.float32)
    for begin in range(first_block, end_block, BLOCK_N // SLOTS_PER_BLOCK):
        block = begin + n // SLOTS_PER_BLOCK
        is_prompt = block < prompt_blocks
        inside = block * SLOTS_PER_BLOCK + slot
        key_position = tl.where(
            is_prompt, inside, inside - prompt_blocks * SLOTS_PER_BLOCK + prompt_len
        )
        # What no query sees may never have been written: NaN times a weight of 0 is NaN.
        is_key = (block < end_block) & (key_position <= last)
        is_key = is_key & ((inside < prompt_len) | (block >= prompt_blocks))
        column = tl.where(is_prompt, block, block + hole)
        block_id = tl.load(table + column, mask=is_key, other=0).to(tl.int64)
        key = (block_id * num_kv_heads + kv_head) * SLOTS_PER_BLOCK + slot
        k = tl.load(
            key_pool + key[None, :] * KEY_SIZE + key_column[:, None],
            mask=is_key[None, :] & (key_column < KEY_SIZE)[:, None],
            other=0.0,
        )
        v = tl.load(
            value_pool + key[:, None] * VALUE_SIZE + value_column[None, :],
            mask=is_key[:, None] & (value_column < VALUE_SIZE)[None, :],
            other=0.0,
        )
        if UPCAST:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        score = tl.dot(q, k, input_precision="ieee")
        if HAS_CAP:
            score = soft_cap * _tanh(score * (scale / soft_cap)) * LOG2E
        else:
            score = score * (scale * LOG2E)
        is_seen = is_key[None, :] & (key_position[None, :] <= position[:, None])
        if HAS_WINDOW:
            is_seen = is_seen & (key_position[None, :] > (position - sliding_window)[:, None])
        score = tl.where(is_seen, score, NEG_INF)
        new_top = tl.maximum(top, tl.max(score, 1))
        reference = tl.where(new_top == NEG_INF, 0.0, new_top)
        weight = tl.exp2(score - reference[:, None])
        shrink = tl.exp2(top - reference)
        total = total * shrink + tl.sum(weight, 1)
        mixed = tl.dot(weight.to(v.dtype), v, mixed * shrink[:, None], input_precision="ieee")
        top = new_top

    result = partial.to(tl.int64) * (num_kv_heads * GROUP) + head
    tl.store(stats + result, top, mask=is_there)
    tl.store(stats + num_stats + result, total, mask=is_there)
    tl.store(
        partials + result[:, None] * VALUE_SIZE + value_column[None, :],
        mixed,
        mask=(is_there & (top > NEG_INF))[:, None] & (value_column < VALUE_SIZE)[None, :],
    )


@triton.jit(do_not_specialize=["table_width", "num_stats", "sliding_window"])
def _attend(
    query, query_token_stride, query_head_stride, key_pool, value_pool, partials, stats,
    items, token_rows, partial_starts, query_start_loc, prompt_lens, response_lens, response_starts,
    block_table, table_width, num_stats, scale, soft_cap, sliding_window,
    GROUP: tl.constexpr, TILE_HEADS: tl.constexpr, KEY_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr, PADDED_KEY: tl.constexpr, PADDED_VALUE: tl.constexpr,
    SMALL_M: tl.constexpr, LARGE_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Program (item, TILE_HEADS heads of a KV head's group). Items of few queries, most of them,
    do not pay for a large tile."""
    item = items + tl.program_id(0) * ITEM_FIELDS
    num_tokens = tl.load(item + 2)
    if num_tokens == 0:
        return
    if num_tokens * TILE_HEADS <= SMALL_M:
        _attend_tile(
            query, query_token_stride, query_head_stride, key_pool, value_pool, partials, stats,
            item, token_rows, partial_starts, query_start_loc, prompt_lens, response_lens,
            response_starts, block_table, table_width, num_stats, scale, soft_cap, sliding_window,
            GROUP, TILE_HEADS, KEY_SIZE, VALUE_SIZE, PADDED_KEY, PADDED_VALUE, SMALL_M, BLOCK_N,
            HAS_CAP, HAS_WINDOW, UPCAST,
        )  # fmt: skip
    elif LARGE_M > SMALL_M:
        _attend_tile(
            query, query_token_stride, query_head_stride, key_pool, value_pool, partials, stats,
            item, token_rows, partial_starts, query_start_loc, prompt_lens, response_lens,
            response_starts, block_table, table_width, num_stats, scale, soft_cap, sliding_window,
            GROUP, TILE_HEADS, KEY_SIZE, VALUE_SIZE, PADDED_KEY, PADDED_VALUE, LARGE_M, BLOCK_N,
            HAS_CAP, HAS_WINDOW, UPCAST,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_stats"])
def _merge(
    partials, stats, partial_starts, sinks, out, num_stats,
    VALUE_SIZE: tl.constexpr, PADDED_VALUE: tl.constexpr, NUM_AT_ONCE: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """Program (token, head): its partial results, by log-sum-exp; zeros where there are none."""
    token = tl.program_id(0)
    head = tl.program_id(1)
    num_heads = tl.num_programs(1)
    begin = tl.load(partial_starts + token)
    end = tl.load(partial_starts + token + 1)
    column = tl.arange(0, PADDED_VALUE)
    is_column = column < VALUE_SIZE
    top = tl.full((1,), NEG_INF, tl.float32)
    total = tl.zeros((1,), tl.float32)
    if HAS_SINKS:  # one more logit in the denominator, with no value
        top = total + tl.load(sinks + head) * LOG2E
        total += 1.0
    mixed = tl.zeros((PADDED_VALUE,), tl.float32)
    for first in range(begin, end, NUM_AT_ONCE):
        partial = first + tl.arange(0, NUM_AT_ONCE)
        index = partial.to(tl.int64) * num_heads + head
        tops = tl.load(stats + index, mask=partial < end, other=NEG_INF)
        totals = tl.load(stats + num_stats + index, mask=partial < end, other=0.0)
        values = tl.load(
            partials + index[:, None] * VALUE_SIZE + column[None, :],
            mask=(tops > NEG_INF)[:, None] & is_column[None, :],
            other=0.0,
        )
        new_top = tl.maximum(top, tl.max(tops, 0))
        reference = tl.where(new_top == NEG_INF, 0.0, new_top)
        weights = tl.exp2(tops - reference)
        shrink = tl.exp2(top - reference)
        total = total * shrink + tl.sum(weights * totals, 0)
        mixed = mixed * shrink + tl.sum(weights[:, None] * values, 0)
        top = new_top
    mixed = mixed / tl.where(total == 0, 1.0, total)
    at = (token.to(tl.int64) * num_heads + head) * VALUE_SIZE
    tl.store(out + at + column, mixed.to(out.dtype.element_ty), mask=is_column)
