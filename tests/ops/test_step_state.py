# SPDX-License-Identifier: Apache-2.0
"""A decode step's state on the device: what a draw leaves for the next one."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from engine_cases import fresh_seed
from ops.step_cases import advanced, clone, make_state, unequal

from ivg_fast.ops.guided_sample import guided_sample
from ivg_fast.ops.step_state import StepState, sample_step

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

SEED = fresh_seed()
# Triton's interpreter is off where there is a GPU.
TRITON = "cuda" if torch.cuda.is_available() else "cpu"
VOCAB = 11  # small: stop tokens are drawn often


def arguments(rng: random.Random, num_rows: int, device: str = "cpu") -> dict:
    return {
        "seeds": torch.tensor([rng.randrange(2**62) for _ in range(num_rows)], device=device),
        "candidate_ids": torch.arange(num_rows, device=device),
        "weight": torch.rand(num_rows, device=device),
        "temperature": torch.rand(num_rows, device=device) + 0.5,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
    }


def logits_of(num_rows: int, device: str = "cpu") -> list[torch.Tensor]:
    logits = [torch.randn(num_rows, VOCAB, device=device) for _ in range(3)]
    logits[0][1] = torch.nan
    return logits


@pytest.mark.parametrize("backend", ["cpu", "torch", "triton"])
@pytest.mark.parametrize("attempt", range(3))
def test_a_step_leaves_the_next_one(backend: str, attempt: int) -> None:
    rng = random.Random(f"{SEED} {attempt}")
    torch.manual_seed(rng.randrange(2**31))
    device = TRITON if backend == "triton" else "cpu"
    state = make_state(rng, 12, VOCAB, device)
    given, logits = arguments(rng, 12, device), logits_of(12, device)
    for _ in range(2):
        drawn = guided_sample(*logits, **given, positions=state.positions, backend=backend)
        expected = advanced(state, drawn)
        sample_step(*logits, state, **given, backend=backend)
        assert unequal(state, expected) == []


def test_rows_that_share_logits() -> None:
    rng = random.Random(f"{SEED} shared")
    torch.manual_seed(rng.randrange(2**31))
    state = make_state(rng, 6, VOCAB, TRITON)
    given, logits = arguments(rng, 6, TRITON), logits_of(2, TRITON)
    given["logit_rows"] = torch.tensor([0, 0, 1, 1, 0, 0], device=TRITON)
    copy = clone(state)
    sample_step(*logits, state, **given, backend="triton")
    drawn = guided_sample(*logits, **given, positions=copy.positions, backend="triton")
    assert unequal(state, advanced(copy, drawn)) == []


def test_a_measure_takes_the_place_of_the_value() -> None:
    rng = random.Random(f"{SEED} measure")
    torch.manual_seed(rng.randrange(2**31))
    state, given, logits = make_state(rng, 8, VOCAB), arguments(rng, 8), logits_of(8)
    drawn = guided_sample(*logits, **given, positions=state.positions)
    expected = advanced(state, drawn._replace(value=drawn.token_ids.float() * 3))
    sample_step(*logits, state, **given, measure=lambda tokens: tokens.float() * 3)
    assert unequal(state, expected) == []


class KeepsItsSlot(StepState):
    """The planted bug: a row that ends goes on writing."""

    __slots__ = ()

    def advance(self, drawn) -> None:
        before = self.slot_mapping.clone()
        super().advance(drawn)
        self.slot_mapping.copy_(torch.where(self.slot_mapping < 0, before, self.slot_mapping))


def test_the_oracle_sees_a_row_that_does_not_end() -> None:
    rng = random.Random(f"{SEED} planted")
    torch.manual_seed(rng.randrange(2**31))
    state, given, logits = make_state(rng, 40, VOCAB), arguments(rng, 40), logits_of(40)
    drawn = guided_sample(*logits, **given, positions=state.positions)
    expected = advanced(state, drawn)
    bad = KeepsItsSlot(*(getattr(state, name) for name in StepState.__slots__))
    sample_step(*logits, bad, **given)
    assert unequal(bad, expected) == ["slot_mapping"]
    good = replace(clone(expected), slot_mapping=expected.slot_mapping)
    assert unequal(good, expected) == []
