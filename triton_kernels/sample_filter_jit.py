# SPDX-License-Identifier: Apache-2.0
"""The filter kernels of guided_sample.py, where it is told how they fit together."""

import triton
import triton.language as tl

from ivg_fast.triton_kernels.guided_sample_jit import NEG_INF, _combine, _parameter, _scale


@triton.jit
def _ordered(z):
    # Unsigned keys in the order of the floats; both zeros are one.
    bits = tl.where(z == 0, 0.0, z).to(tl.uint32, bitcast=True)
    return tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def _unordered(key):
    bits = tl.where(key >= 0x80000000, key ^ 0x80000000, key ^ 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _row_max(stats, i, num_blocks, PADDED_BLOCKS: tl.constexpr):
    blocks = tl.arange(0, PADDED_BLOCKS)
    maxima = tl.load(stats + i * num_blocks + blocks, mask=blocks < num_blocks, other=NEG_INF)
    return tl.max(maxima, 0)


@triton.jit
def _is_searched(
    i, top_k, top_p, temperature, vocab_size, IS_MASS: tl.constexpr,
    TOP_K_TENSOR: tl.constexpr, TOP_P_TENSOR: tl.constexpr, TEMPERATURE_TENSOR: tl.constexpr,
):  # fmt: skip
    if IS_MASS:
        is_limited = _parameter(top_p, i, TOP_P_TENSOR) < 1
    else:
        k = _parameter(top_k, i, TOP_K_TENSOR)
        is_limited = (k > 0) & (k < vocab_size)
    return is_limited & (_parameter(temperature, i, TEMPERATURE_TENSOR) > 0)


@triton.jit
def _advance(
    partials, bounds, wanteds, top_k, top_p, i, num_samples, num_blocks, step,
    IS_MASS: tl.constexpr, TOP_K_TENSOR: tl.constexpr, TOP_P_TENSOR: tl.constexpr,
    PADDED_BLOCKS: tl.constexpr, NUM_PIVOTS: tl.constexpr,
):  # fmt: skip
    """The bound and the wanted statistic before pass `step` >= 1, from what pass step - 1 left."""
    blocks = tl.arange(0, PADDED_BLOCKS)
    pivots = tl.arange(0, NUM_PIVOTS)
    parity = (step - 1) % 2
    origin = partials + (parity * num_samples + i) * num_blocks * NUM_PIVOTS
    statistics = tl.load(
        origin + blocks[:, None] * NUM_PIVOTS + pivots[None, :],
        mask=blocks[:, None] < num_blocks,
        other=0.0,
    )
    above = tl.sum(statistics, 0)
    bound = tl.load(bounds + (step - 1) * num_samples + i).to(tl.uint32, bitcast=True)
    if step == 1:
        if IS_MASS:
            everything = tl.sum(tl.where(pivots == 0, above, 0.0), 0)
            wanted = _parameter(top_p, i, TOP_P_TENSOR) * everything
        else:
            wanted = _parameter(top_k, i, TOP_K_TENSOR).to(tl.float32)
    else:
        wanted = tl.load(wanteds + i)
    digit = tl.sum(((above >= wanted) & (pivots > 0)).to(tl.uint32), 0)
    return bound + (digit << (32 - 4 * step).to(tl.uint32)), wanted


@triton.jit(do_not_specialize=["top_k", "step"])
def _narrow(
    base, tuned, untuned, base_stride, tuned_stride, untuned_stride,
    rows, positions, banned_ids, banned_until, weight, temperature, stats,
    top_k, top_p, thresholds, partials, bounds, wanteds,
    vocab_size, num_samples, step,
    HAS_ROWS: tl.constexpr, HAS_TUNED: tl.constexpr, HAS_UNTUNED: tl.constexpr,
    NUM_BANNED: tl.constexpr, HAS_UNTIL: tl.constexpr, WEIGHT_TENSOR: tl.constexpr,
    TEMPERATURE_TENSOR: tl.constexpr, TOP_K_TENSOR: tl.constexpr, TOP_P_TENSOR: tl.constexpr,
    IS_MASS: tl.constexpr, BLOCK: tl.constexpr, PADDED_BLOCKS: tl.constexpr,
    NUM_PIVOTS: tl.constexpr,
):  # fmt: skip
    """Pass `step`: this block's statistic above each of 16 pivots between two bounds of the key."""
    i = tl.program_id(0)
    block = tl.program_id(1)
    num_blocks = tl.num_programs(1)
    if not _is_searched(
        i, top_k, top_p, temperature, vocab_size, IS_MASS,
        TOP_K_TENSOR, TOP_P_TENSOR, TEMPERATURE_TENSOR,
    ):  # fmt: skip
        return
    bound = (i * 0).to(tl.uint32)
    if step > 0:
        bound, wanted = _advance(
            partials, bounds, wanteds, top_k, top_p, i, num_samples, num_blocks, step,
            IS_MASS, TOP_K_TENSOR, TOP_P_TENSOR, PADDED_BLOCKS, NUM_PIVOTS,
        )  # fmt: skip
        if (block == 0) & (step == 1):
            tl.store(wanteds + i, wanted)
    if block == 0:
        tl.store(bounds + step * num_samples + i, bound.to(tl.int32, bitcast=True))
    shift = (28 - 4 * step).to(tl.uint32)
    parity = step % 2
    out = partials + ((parity * num_samples + i) * num_blocks + block) * NUM_PIVOTS
    block_top = _ordered(tl.load(stats + i * num_blocks + block))
    first_pivot = ((shift * 0 + 1) << shift) + bound
    if (step > 0) & (block_top < first_pivot):
        tl.store(out + tl.arange(0, NUM_PIVOTS), tl.zeros((NUM_PIVOTS,), tl.float32))
        return
    columns = block * BLOCK + tl.arange(0, BLOCK)
    _, _, _, z = _combine(
        base, tuned, untuned, base_stride, tuned_stride, untuned_stride,
        rows, positions, banned_ids, banned_until, weight, i, columns, vocab_size,
        HAS_ROWS, HAS_TUNED, HAS_UNTUNED, NUM_BANNED, HAS_UNTIL, WEIGHT_TENSOR,
    )  # fmt: skip
    if IS_MASS:
        top = _row_max(stats, i, num_blocks, PADDED_BLOCKS)
        scale = _scale(_parameter(temperature, i, TEMPERATURE_TENSOR))
        statistic = tl.where(z >= tl.load(thresholds + i), tl.exp2((z - top) * scale), 0.0)
    else:
        statistic = tl.where(z > NEG_INF, 1.0, 0.0)
    key = _ordered(z)
    for p in tl.static_range(NUM_PIVOTS):
        pivot = ((shift * 0 + p) << shift) + bound
        tl.store(out + p, tl.sum(tl.where(key >= pivot, statistic, 0.0), 0))


@triton.jit(do_not_specialize=["top_k", "num_passes"])
def _close(
    top_k, top_p, temperature, thresholds, partials, bounds, wanteds,
    vocab_size, num_samples, num_blocks, num_passes,
    IS_MASS: tl.constexpr, TEMPERATURE_TENSOR: tl.constexpr, TOP_K_TENSOR: tl.constexpr,
    TOP_P_TENSOR: tl.constexpr, PADDED_BLOCKS: tl.constexpr, NUM_PIVOTS: tl.constexpr,
):  # fmt: skip
    """Raise sample i's threshold to what the search found."""
    i = tl.program_id(0)
    if _is_searched(
        i, top_k, top_p, temperature, vocab_size, IS_MASS,
        TOP_K_TENSOR, TOP_P_TENSOR, TEMPERATURE_TENSOR,
    ):  # fmt: skip
        bound, _ = _advance(
            partials, bounds, wanteds, top_k, top_p, i, num_samples, num_blocks, num_passes,
            IS_MASS, TOP_K_TENSOR, TOP_P_TENSOR, PADDED_BLOCKS, NUM_PIVOTS,
        )  # fmt: skip
        found = _unordered(bound)
        found = tl.where(found == found, found, NEG_INF)
        tl.store(thresholds + i, tl.maximum(tl.load(thresholds + i), found))


@triton.jit
def _mask(
    base, tuned, untuned, base_stride, tuned_stride, untuned_stride,
    rows, positions, banned_ids, banned_until, weight, temperature, stats,
    min_p, thresholds, final_thresholds, vocab_size, num_samples,
    HAS_ROWS: tl.constexpr, HAS_TUNED: tl.constexpr, HAS_UNTUNED: tl.constexpr,
    NUM_BANNED: tl.constexpr, HAS_UNTIL: tl.constexpr, WEIGHT_TENSOR: tl.constexpr,
    TEMPERATURE_TENSOR: tl.constexpr, MIN_P_TENSOR: tl.constexpr, BLOCK: tl.constexpr,
    PADDED_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Join min-p's threshold to the others, and leave in the block's sum of z only what stays."""
    i = tl.program_id(0)
    block = tl.program_id(1)
    num_blocks = tl.num_programs(1)
    t = _parameter(temperature, i, TEMPERATURE_TENSOR)
    p = _parameter(min_p, i, MIN_P_TENSOR)
    threshold = tl.load(thresholds + i)
    if (p > 0) & (t > 0):
        top = _row_max(stats, i, num_blocks, PADDED_BLOCKS)
        threshold = tl.minimum(tl.maximum(threshold, top + tl.log(p) * t), top)
    if block == 0:
        tl.store(final_thresholds + i, threshold)
    if threshold == NEG_INF:
        return
    at = stats + i * num_blocks + block
    block_top = tl.load(at)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    total = 0.0
    if block_top >= threshold:
        _, _, _, z = _combine(
            base, tuned, untuned, base_stride, tuned_stride, untuned_stride,
            rows, positions, banned_ids, banned_until, weight, i, columns, vocab_size,
            HAS_ROWS, HAS_TUNED, HAS_UNTUNED, NUM_BANNED, HAS_UNTIL, WEIGHT_TENSOR,
        )  # fmt: skip
        mass = tl.exp2((z - block_top) * _scale(t))
        total = tl.sum(tl.where(z >= threshold, mass, 0.0), 0)
    # A sum that is no number says that the row is not valid: it must live on.
    previous = tl.load(at + num_samples * num_blocks)
    tl.store(at + num_samples * num_blocks, tl.where(previous - previous == 0, total, previous))
