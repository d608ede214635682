# SPDX-License-Identifier: Apache-2.0
"""guided_sample in Triton: two launches without filters, a fixed number more with them.

`_measure` (sample, block) reads the rows once and leaves, for each vocabulary block, the maximum
and the sum of exponentials of z, base, tuned and untuned. `_draw` (sample) merges them, picks a
block with the uniform, scans that block alone, gathers the measures and may prepare the next step.

top-k and top-p are one question: the largest threshold t with stat{z >= t} >= wanted, the
statistic being a count or a mass. `_narrow` answers it four bits of t at a time, over all blocks in
parallel; nothing is sorted, and the same inputs always give the same bits. `_mask` applies the
threshold to the blocks' sums, so that `_draw` need not know how it came about.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ivg_fast.ops.step_state import StepState
from ivg_fast.triton_kernels import guided_sample_jit as jit
from ivg_fast.triton_kernels import sample_filter_jit as filter_jit

BLOCK = 2048  # vocabulary entries a program reads
DIGIT_BITS = 4
NUM_PIVOTS = 16
NUM_PASSES = 8


def _parameter(values: Any, dtype: torch.dtype, device: torch.device) -> tuple[Any, bool]:
    """A number as it is, per-sample values as a contiguous tensor; and whether it is a tensor."""
    if isinstance(values, Tensor):
        return values.to(device=device, dtype=dtype).contiguous(), True
    return values, False


def guided_sample(
    base: Tensor,
    tuned: Tensor | None,
    untuned: Tensor | None,
    *,
    weight: Tensor | float,
    temperature: Tensor | float,
    top_k: Tensor | int,
    top_p: Tensor | float,
    min_p: Tensor | float,
    seeds: Tensor,
    candidate_ids: Tensor,
    positions: Tensor,
    logit_rows: Tensor | None,
    banned_ids: Tensor | None,
    banned_until: Tensor | None,
    step_state: StepState | None = None,
) -> tuple[Tensor, ...]:
    """ivg_fast.ops.guided_sample on arguments that were checked: every tensor on base's device.

    A sampling parameter that is a number is known to the host, and a filter that it turns off costs
    nothing; one that is a tensor is read on the device only, so that its filter's launches are made
    (and return at once where a sample does not want them). No call waits for the device.

    Args:
        step_state: what to advance for the next decode step, a row a sample; its positions are
            passed as `positions` too.

    Returns:
        The fields of GuidedSample, in order.
    """
    device = base.device
    num_samples = base.shape[0] if logit_rows is None else logit_rows.shape[0]
    vocab_size = base.shape[1]
    outputs = (
        torch.empty(num_samples, dtype=torch.int64, device=device),
        *(torch.empty(num_samples, dtype=torch.float32, device=device) for _ in range(4)),
        torch.empty(num_samples, dtype=torch.bool, device=device),
    )
    if num_samples == 0:
        return outputs
    num_blocks = triton.cdiv(vocab_size, BLOCK)
    padded = triton.next_power_of_2(num_blocks)
    stats = torch.empty(8, num_samples, num_blocks, dtype=torch.float32, device=device)
    w, weight_tensor = _parameter(weight, torch.float32, device)
    t, temperature_tensor = _parameter(temperature, torch.float32, device)
    k, top_k_tensor = _parameter(top_k, torch.int32, device)
    p, top_p_tensor = _parameter(top_p, torch.float32, device)
    m, min_p_tensor = _parameter(min_p, torch.float32, device)
    tuned_or_base = base if tuned is None else tuned
    untuned_or_base = base if untuned is None else untuned
    source = (
        *(base, tuned_or_base, untuned_or_base),
        *(base.stride(0), tuned_or_base.stride(0), untuned_or_base.stride(0)),
        *(positions if logit_rows is None else logit_rows.contiguous(), positions),
        *(positions if banned_ids is None else banned_ids.contiguous(),),
        *(positions if banned_until is None else banned_until.contiguous(),),
        *(w, t, stats),
    )
    flags = {
        "HAS_ROWS": logit_rows is not None,
        "HAS_TUNED": tuned is not None,
        "HAS_UNTUNED": untuned is not None,
        "NUM_BANNED": 0 if banned_ids is None else banned_ids.shape[1],
        "HAS_UNTIL": banned_until is not None,
        "WEIGHT_TENSOR": weight_tensor,
        "TEMPERATURE_TENSOR": temperature_tensor,
        "BLOCK": BLOCK,
    }
    grid = (num_samples, num_blocks)
    jit._measure[grid](*source, vocab_size, num_samples, **flags)

    searches = []
    if top_k_tensor or 0 < top_k < vocab_size:
        searches.append(False)
    if top_p_tensor or top_p < 1:
        searches.append(True)
    has_thresholds = bool(searches) or min_p_tensor or min_p > 0
    thresholds = stats
    if has_thresholds:
        found = torch.full((num_samples,), float("-inf"), dtype=torch.float32, device=device)
        if searches:
            partials = torch.empty(
                2, num_samples, num_blocks, NUM_PIVOTS, dtype=torch.float32, device=device
            )
            bounds = torch.empty(NUM_PASSES, num_samples, dtype=torch.int32, device=device)
            wanteds = torch.empty(num_samples, dtype=torch.float32, device=device)
        tensors = {
            "TEMPERATURE_TENSOR": temperature_tensor,
            "TOP_K_TENSOR": top_k_tensor,
            "TOP_P_TENSOR": top_p_tensor,
            "PADDED_BLOCKS": padded,
            "NUM_PIVOTS": NUM_PIVOTS,
        }
        for is_mass in searches:
            for step in range(NUM_PASSES):
                filter_jit._narrow[grid](
                    *(*source, k, p, found, partials, bounds, wanteds),
                    *(vocab_size, num_samples, step),
                    **(flags | tensors),
                    IS_MASS=is_mass,
                )
            filter_jit._close[(num_samples,)](
                *(k, p, t, found, partials, bounds, wanteds),
                *(vocab_size, num_samples, num_blocks, NUM_PASSES),
                **tensors,
                IS_MASS=is_mass,
            )
        thresholds = torch.empty_like(found)
        filter_jit._mask[grid](
            *(*source, m, found, thresholds, vocab_size, num_samples),
            **flags,
            MIN_P_TENSOR=min_p_tensor,
            PADDED_BLOCKS=padded,
        )

    if step_state is None:
        state = (*(outputs[0],) * 9, 0, 0, 0, 0)
        num_roles, num_stops = -1, 0
    else:
        s = step_state
        state = (
            *(s.input_ids, s.model_positions, s.slot_mapping, s.block_table, s.prompt_blocks),
            *(s.first_positions, s.limits, s.stop_ids, s.records),
            *(s.block_table.stride(0), s.model_positions.stride(0)),
            *(s.records.stride(0), s.records.stride(1)),
        )
        num_roles, num_stops = len(s.model_positions), s.stop_ids.shape[1]
    jit._draw[(num_samples,)](
        *(*source, thresholds, seeds, candidate_ids, *outputs, *state),
        *(vocab_size, num_samples, num_blocks),
        **flags,
        HAS_THRESHOLDS=has_thresholds,
        NUM_ROLES=num_roles,
        NUM_STOPS=num_stops,
        PADDED_BLOCKS=padded,
    )
    return outputs
