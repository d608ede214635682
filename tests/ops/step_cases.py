# SPDX-License-Identifier: Apache-2.0
"""Random step states, and what drawing does to them told row by row in plain Python."""

from __future__ import annotations

import random
from dataclasses import fields

import torch

from ivg_fast.ops._sample_args import GuidedSample
from ivg_fast.ops.step_state import RECORDS, StepState


def make_state(
    rng: random.Random, num_rows: int, vocab_size: int, device: str = "cpu", num_steps: int = 4
) -> StepState:
    """Rows at different steps of a burst, some of them pads, slices of wider buffers."""
    extra = 3  # rows behind, which nothing may touch
    size, width, num_roles = num_rows + extra, 6, 3
    first = [rng.randrange(40) for _ in range(size)]
    step = [rng.randrange(num_steps) for _ in range(size)]
    prompt_blocks = [rng.randrange(1, 3) for _ in range(size)]
    is_pad = [rng.random() < 0.25 for _ in range(size)]

    def ints(values: list, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    positions = [a + b for a, b in zip(first, step, strict=True)]
    stops = [
        [rng.randrange(vocab_size), rng.choice([-1, rng.randrange(vocab_size)])] for _ in first
    ]
    state = StepState(
        input_ids=ints([rng.randrange(vocab_size) for _ in first], torch.int64),
        positions=ints(positions),
        model_positions=ints(
            [[p + 7 * r for p in positions] for r in range(num_roles)], torch.int64
        ),
        slot_mapping=ints([-1 if pad else rng.randrange(500) for pad in is_pad]),
        block_table=ints([[rng.randrange(90) for _ in range(width)] for _ in first]),
        prompt_blocks=ints(prompt_blocks),
        first_positions=ints(first),
        limits=ints([rng.randint(s + 1, num_steps) for s in step]),
        stop_ids=ints(stops, torch.int64),
        records=torch.full(
            (len(RECORDS), num_steps, size), 12345, dtype=torch.int32, device=device
        ),
    )
    return state.rows(0, num_rows)


def clone(state: StepState) -> StepState:
    return StepState(*(getattr(state, f.name).clone() for f in fields(StepState)))


def advanced(state: StepState, drawn: GuidedSample) -> StepState:
    """What `state` should become, by the class's docstring."""
    new = clone(state)
    for b in range(len(state.input_ids)):
        if int(state.slot_mapping[b]) < 0:
            continue
        t, first = int(state.positions[b]), int(state.first_positions[b])
        token = int(drawn.token_ids[b])
        for plane, values in zip(new.records, drawn, strict=True):
            value = values[b]
            bits = value.view(torch.int32) if value.is_floating_point() else value.int()
            plane[t - first, b] = bits
        is_last = t - first + 1 >= int(state.limits[b])
        if not bool(drawn.valid[b]) or token in state.stop_ids[b].tolist() or is_last:
            new.slot_mapping[b] = -1
            continue
        new.input_ids[b] = token
        block = int(state.block_table[b, int(state.prompt_blocks[b]) + t // 16])
        new.slot_mapping[b] = block * 16 + t % 16
        new.positions[b] += 1
        new.model_positions[:, b] += 1
    return new


def unequal(a: StepState, b: StepState) -> list[str]:
    """Names of the buffers that differ; NaNs are compared by their bits."""
    names = [f.name for f in fields(StepState)]
    return [n for n in names if not torch.equal(getattr(a, n), getattr(b, n))]
