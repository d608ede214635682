# SPDX-License-Identifier: Apache-2.0
"""The first and the last kernel of guided_sample.py, where it is told how they fit together."""

import math

import triton
import triton.language as tl

LOG2E = tl.constexpr(math.log2(math.e))
NEG_INF = tl.constexpr(float("-inf"))
SLOTS_PER_BLOCK = tl.constexpr(16)


@triton.jit
def _parameter(values, i, is_tensor: tl.constexpr):
    if is_tensor:
        values = tl.load(values + i)
    return values


@triton.jit
def _uniform(seed, candidate_id, position):
    # Philox4x32-10, key = seed, counter = (candidate_id, position, 0, 0).
    c0 = candidate_id.to(tl.uint32)
    c1 = position.to(tl.uint32)
    c2 = c0 * 0
    c3 = c0 * 0
    bits = seed.to(tl.uint64, bitcast=True)
    k0 = (bits & 0xFFFFFFFF).to(tl.uint32)
    k1 = (bits >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        left = c0.to(tl.uint64) * 0xD2511F53
        right = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (right >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = (right & 0xFFFFFFFF).to(tl.uint32)
        c2 = (left >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = (left & 0xFFFFFFFF).to(tl.uint32)
        k0 = (k0.to(tl.uint64) + 0x9E3779B9).to(tl.uint32)
        k1 = (k1.to(tl.uint64) + 0xBB67AE85).to(tl.uint32)
    return (c0.to(tl.float64) + 0.5) * 2.3283064365386963e-10


@triton.jit
def _logits(source, stride, row, columns, vocab_size):
    pointers = source + row * stride + columns
    return tl.load(pointers, mask=columns < vocab_size, other=NEG_INF).to(tl.float32)


@triton.jit
def _combine(
    base, tuned, untuned, base_stride, tuned_stride, untuned_stride,
    rows, positions, banned_ids, banned_until, weight,
    i, columns, vocab_size,
    HAS_ROWS: tl.constexpr, HAS_TUNED: tl.constexpr, HAS_UNTUNED: tl.constexpr,
    NUM_BANNED: tl.constexpr, HAS_UNTIL: tl.constexpr, WEIGHT_TENSOR: tl.constexpr,
):  # fmt: skip
    """base, tuned, untuned and z at some columns of sample i's row."""
    row = i.to(tl.int64)
    if HAS_ROWS:
        row = tl.load(rows + i).to(tl.int64)
    b = _logits(base, base_stride, row, columns, vocab_size)
    t = b
    u = b
    z = b
    if HAS_TUNED:
        w = _parameter(weight, i, WEIGHT_TENSOR)
        t = _logits(tuned, tuned_stride, row, columns, vocab_size)
        is_out = t == NEG_INF
        steer = t
        if HAS_UNTUNED:
            u = _logits(untuned, untuned_stride, row, columns, vocab_size)
            is_out = is_out | (u == NEG_INF)
            steer = t - u
        # One rounding, the same in every kernel: they compare z bit by bit.
        steered = tl.where(is_out, NEG_INF, tl.fma(steer, w, b))
        z = tl.where(w == 0, b, steered)
    if NUM_BANNED > 0:
        is_banning = True
        if HAS_UNTIL:
            is_banning = tl.load(positions + i) < tl.load(banned_until + i)
        for m in tl.static_range(NUM_BANNED):
            is_banned = (columns == tl.load(banned_ids + i * NUM_BANNED + m)) & is_banning
            z = tl.where(is_banned, NEG_INF, z)
    return b, t, u, z


@triton.jit
def _scale(temperature):
    return LOG2E / tl.where(temperature == 0, 1.0, temperature)


@triton.jit
def _store_stats(stats, x, scale, num_items):
    top = tl.max(x, 0)
    total = tl.sum(tl.exp2((x - tl.where(top == NEG_INF, 0.0, top)) * scale), 0)
    tl.store(stats, top)
    tl.store(stats + num_items, total)


@triton.jit
def _measure(
    base, tuned, untuned, base_stride, tuned_stride, untuned_stride,
    rows, positions, banned_ids, banned_until, weight, temperature, stats,
    vocab_size, num_samples,
    HAS_ROWS: tl.constexpr, HAS_TUNED: tl.constexpr, HAS_UNTUNED: tl.constexpr,
    NUM_BANNED: tl.constexpr, HAS_UNTIL: tl.constexpr, WEIGHT_TENSOR: tl.constexpr,
    TEMPERATURE_TENSOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    block = tl.program_id(1)
    num_blocks = tl.num_programs(1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    b, t, u, z = _combine(
        base, tuned, untuned, base_stride, tuned_stride, untuned_stride,
        rows, positions, banned_ids, banned_until, weight, i, columns, vocab_size,
        HAS_ROWS, HAS_TUNED, HAS_UNTUNED, NUM_BANNED, HAS_UNTIL, WEIGHT_TENSOR,
    )  # fmt: skip
    num_items = num_samples * num_blocks
    at = stats + i * num_blocks + block
    _store_stats(at, z, _scale(_parameter(temperature, i, TEMPERATURE_TENSOR)), num_items)
    _store_stats(at + 2 * num_items, b, LOG2E, num_items)
    if HAS_TUNED:
        _store_stats(at + 4 * num_items, t, LOG2E, num_items)
    if HAS_UNTUNED:
        _store_stats(at + 6 * num_items, u, LOG2E, num_items)


@triton.jit
def _merge(stats, i, num_items, num_blocks, scale, PADDED_BLOCKS: tl.constexpr):
    """A row's maximum, each block's share of its sum, and the sum, float64."""
    blocks = tl.arange(0, PADDED_BLOCKS)
    at = stats + i * num_blocks + blocks
    is_there = blocks < num_blocks
    maxima = tl.load(at, mask=is_there, other=NEG_INF)
    sums = tl.load(at + num_items, mask=is_there, other=0.0)
    top = tl.max(maxima, 0)
    shares = sums * tl.exp2((maxima - tl.where(top == NEG_INF, 0.0, top)) * scale)
    shares = shares.to(tl.float64)
    return top, shares, tl.sum(shares, 0)


@triton.jit
def _log_sum(stats, i, num_items, num_blocks, PADDED_BLOCKS: tl.constexpr):
    top, _, total = _merge(stats, i, num_items, num_blocks, LOG2E, PADDED_BLOCKS)
    return top.to(tl.float64) + tl.log(total)


@triton.jit
def _pick(cumulative, mass, target, indices, end):
    """The first index with mass whose cumulative mass exceeds the target, or the last with mass."""
    first = tl.min(tl.where((cumulative > target) & (mass > 0), indices, end), 0)
    last = tl.max(tl.where(mass > 0, indices, 0), 0)
    return tl.where(first < end, first, last)


@triton.jit
def _bits(x):
    return x.to(tl.float32).to(tl.int32, bitcast=True)


@triton.jit
def _advance_step(
    i, token, is_valid, log_p, log_base, reward, raw, position, input_ids, positions,
    model_positions, slot_mapping, block_table, prompt_blocks, first_positions, limits, stop_ids,
    records, table_width, role_stride, plane_stride, step_stride,
    NUM_ROLES: tl.constexpr, NUM_STOPS: tl.constexpr,
):  # fmt: skip
    """StepState.advance of row i."""
    if tl.load(slot_mapping + i) >= 0:
        step = position - tl.load(first_positions + i)
        record = records + step.to(tl.int64) * step_stride + i
        tl.store(record, token.to(tl.int32))
        tl.store(record + plane_stride, _bits(log_p))
        tl.store(record + 2 * plane_stride, _bits(log_base))
        tl.store(record + 3 * plane_stride, _bits(reward))
        tl.store(record + 4 * plane_stride, _bits(raw))
        tl.store(record + 5 * plane_stride, is_valid.to(tl.int32))
        goes_on = is_valid & (step + 1 < tl.load(limits + i))
        for m in tl.static_range(NUM_STOPS):
            goes_on = goes_on & (token != tl.load(stop_ids + i * NUM_STOPS + m))
        slot = position * 0 - 1
        if goes_on:
            tl.store(input_ids + i, token)
            tl.store(positions + i, position + 1)
            for role in tl.static_range(NUM_ROLES):
                at = model_positions + role * role_stride + i
                tl.store(at, tl.load(at) + 1)
            column = tl.load(prompt_blocks + i) + position // SLOTS_PER_BLOCK
            block = tl.load(block_table + i.to(tl.int64) * table_width + column)
            slot = block * SLOTS_PER_BLOCK + position % SLOTS_PER_BLOCK
        tl.store(slot_mapping + i, slot)


@triton.jit
def _draw(
    base, tuned, untuned, base_stride, tuned_stride, untuned_stride,
    rows, positions, banned_ids, banned_until, weight, temperature, stats,
    thresholds, seeds, candidate_ids,
    token_ids, logprob, base_logprob, implicit_reward, value, valid,
    input_ids, model_positions, slot_mapping, block_table, prompt_blocks,
    first_positions, limits, stop_ids, records,
    table_width, role_stride, plane_stride, step_stride,
    vocab_size, num_samples, num_blocks,
    HAS_ROWS: tl.constexpr, HAS_TUNED: tl.constexpr, HAS_UNTUNED: tl.constexpr,
    NUM_BANNED: tl.constexpr, HAS_UNTIL: tl.constexpr, WEIGHT_TENSOR: tl.constexpr,
    TEMPERATURE_TENSOR: tl.constexpr, HAS_THRESHOLDS: tl.constexpr, NUM_ROLES: tl.constexpr,
    NUM_STOPS: tl.constexpr, BLOCK: tl.constexpr, PADDED_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Draw sample i. NUM_ROLES < 0: no StepState."""
    i = tl.program_id(0)
    num_items = num_samples * num_blocks
    t = _parameter(temperature, i, TEMPERATURE_TENSOR)
    scale = _scale(t)
    top, shares, total = _merge(stats, i, num_items, num_blocks, scale, PADDED_BLOCKS)
    base_log_sum = _log_sum(stats + 2 * num_items, i, num_items, num_blocks, PADDED_BLOCKS)
    is_valid = (top > NEG_INF) & (total - total == 0) & (base_log_sum - base_log_sum == 0)
    log_sums = base_log_sum * 0
    if HAS_TUNED:
        tuned_sum = _log_sum(stats + 4 * num_items, i, num_items, num_blocks, PADDED_BLOCKS)
        is_valid = is_valid & (tuned_sum == tuned_sum) & (tuned_sum < float("inf"))
        if HAS_UNTUNED:
            untuned_sum = _log_sum(stats + 6 * num_items, i, num_items, num_blocks, PADDED_BLOCKS)
            is_valid = is_valid & (untuned_sum == untuned_sum) & (untuned_sum < float("inf"))
            log_sums = tuned_sum - untuned_sum

    # The block: by its share of the mass, or the first that holds the maximum.
    position = tl.load(positions + i)
    u = _uniform(tl.load(seeds + i), tl.load(candidate_ids + i), position)
    target = u * total
    blocks = tl.arange(0, PADDED_BLOCKS)
    drawn_block = _pick(tl.cumsum(shares, 0), shares, target, blocks, PADDED_BLOCKS)
    maxima = tl.load(stats + i * num_blocks + blocks, mask=blocks < num_blocks, other=NEG_INF)
    top_block = tl.min(tl.where(maxima == top, blocks, PADDED_BLOCKS - 1), 0)
    is_greedy = t == 0
    block = tl.where(is_greedy, top_block, drawn_block)
    before = tl.sum(tl.where(blocks < block, shares, 0.0), 0)

    columns = block * BLOCK + tl.arange(0, BLOCK)
    b, tu, un, z = _combine(
        base, tuned, untuned, base_stride, tuned_stride, untuned_stride,
        rows, positions, banned_ids, banned_until, weight, i, columns, vocab_size,
        HAS_ROWS, HAS_TUNED, HAS_UNTUNED, NUM_BANNED, HAS_UNTIL, WEIGHT_TENSOR,
    )  # fmt: skip
    mass = tl.exp2((z - top) * scale)
    if HAS_THRESHOLDS:
        mass = tl.where(z >= tl.load(thresholds + i), mass, 0.0)
    inside = tl.arange(0, BLOCK)
    local_target = (target - before).to(tl.float32)
    drawn = _pick(tl.cumsum(mass, 0), mass, local_target, inside, BLOCK)
    lowest = tl.min(tl.where(z == top, inside, BLOCK - 1), 0)
    chosen = tl.where(is_greedy, lowest, drawn)

    is_chosen = inside == chosen
    z_chosen = tl.sum(tl.where(is_chosen, z, 0.0), 0).to(tl.float64)
    temperature_or_one = tl.where(is_greedy, 1.0, t).to(tl.float64)
    log_p = (z_chosen - top.to(tl.float64)) / temperature_or_one - tl.log(total)
    log_base = tl.sum(tl.where(is_chosen, b, 0.0), 0).to(tl.float64) - base_log_sum
    raw = log_base * 0
    if HAS_TUNED:
        raw = tl.sum(tl.where(is_chosen, tu, 0.0), 0).to(tl.float64)
        if HAS_UNTUNED:
            raw -= tl.sum(tl.where(is_chosen, un, 0.0), 0).to(tl.float64)
    reward = log_base * 0
    if HAS_UNTUNED:
        reward = raw - log_sums
    nan = float("nan")
    token = tl.where(is_valid, (block * BLOCK + chosen).to(tl.int64), -1)
    log_p = tl.where(is_valid, log_p, nan)
    log_base = tl.where(is_valid, log_base, nan)
    reward = tl.where(is_valid, reward, nan)
    raw = tl.where(is_valid, raw, nan)
    tl.store(token_ids + i, token)
    tl.store(logprob + i, log_p.to(tl.float32))
    tl.store(base_logprob + i, log_base.to(tl.float32))
    tl.store(implicit_reward + i, reward.to(tl.float32))
    tl.store(value + i, raw.to(tl.float32))
    tl.store(valid + i, is_valid)
    if NUM_ROLES >= 0:
        _advance_step(
            i, token, is_valid, log_p, log_base, reward, raw, position, input_ids, positions,
            model_positions, slot_mapping, block_table, prompt_blocks, first_positions, limits,
            stop_ids, records, table_width, role_stride, plane_stride, step_stride,
            NUM_ROLES, NUM_STOPS,
        )  # fmt: skip
