# SPDX-License-Identifier: Apache-2.0
"""Bursts over static buffers, as a GPU runs them, on the CPU: what the naive search returns, and
what the engine's other loop counts."""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping
from typing import Any

import pytest
from engine_cases import (
    CELLS,
    SHAPES,
    Case,
    Family,
    cells_of,
    compare,
    fresh_seed,
    random_case,
    random_cases,
    run_arrivals,
    run_engine,
)
from naive_search import NaiveModels, NaiveResult

from ivg_fast.errors import NonFiniteLogitsError
from ivg_fast.graphs import EagerStep
from ivg_fast.models.runner import ModelRunner
from ivg_fast.models.values import TokenScorer
from ivg_fast.ops.step_state import StepState
from ivg_fast.params import EngineConfig
from ivg_fast.static_burst import StaticBursts
from ivg_fast.static_forward import StaticForward
from ivg_fast.static_rows import StaticRows

SEED = fresh_seed()
EOS = {"gpt2": 28, "llama": 7, "mistral": 28, "qwen3": 13, "gemma2": 0}


def family(shape: str, value: str = "vocabulary") -> Family:
    return Family(shape, seed=SEED, eos_token_id=EOS[shape], value=value)


@functools.cache
def naive(shape: str, value: str) -> NaiveModels:
    return family(shape, value).naive()


@functools.cache
def solved(shape: str, value: str = "vocabulary") -> tuple[list[Case], list[NaiveResult]]:
    rng = random.Random(f"{SEED} {shape} {value}")
    models, own = naive(shape, value), family(shape, value)
    cells = cells_of(value)
    cases = random_cases(rng, own, models, **cells)
    # One outlives the others, whose chunks may be of one token, and then decodes in long bursts.
    guidance, scorer = cells.get("cells", CELLS)[-1]
    lasting = {"max_tokens": 60, "min_tokens": 60, "chunk_length": None}
    cases.append(random_case(rng, own, guidance, scorer, **lasting))
    return cases, [case.solve(models) for case in cases]


@pytest.fixture(scope="module", autouse=True)
def _drop_models():
    yield
    solved.cache_clear()
    naive.cache_clear()


class CountedStep(EagerStep):
    """Counts replays of decode steps."""

    num_replays = 0

    def __init__(self, static: StaticRows | StaticForward) -> None:
        def step() -> None:
            CountedStep.num_replays += isinstance(static, StaticRows)
            static.step()

        super().__init__(step)


def make_static(monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """Engines made from here on run static bursts on the CPU."""
    options = {"make_step": CountedStep, **options}
    monkeypatch.setattr(CountedStep, "num_replays", 0)

    def static(
        runners: Mapping[str, ModelRunner], size: int, scorer: TokenScorer, config: EngineConfig
    ) -> StaticBursts:
        return StaticBursts(runners, size, scorer, max_steps=config.max_burst_steps, **options)

    monkeypatch.setattr(StaticBursts, "of_engine", static)


def assert_same(outputs, results, cases, allowed_ties: int = 3) -> None:
    found, num_near_ties = compare(outputs, results, cases)
    assert not found, f"seed {SEED}, {len(found)} of {len(cases)} differ\n" + "\n".join(found)
    assert num_near_ties <= allowed_ties


@pytest.mark.parametrize("burst", [1, 3, 16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_whole_grid_at_once(monkeypatch, shape: str, burst: int) -> None:
    make_static(monkeypatch)
    cases, results = solved(shape)
    with family(shape).engine(max_burst_steps=burst) as engine:
        assert_same(run_engine(engine, cases), results, cases)
    assert (CountedStep.num_replays > 5) == (burst > 1)


@pytest.mark.parametrize("value", ["scalar", "trunk", "scalar trunk", "text"])
def test_other_values(monkeypatch, value: str) -> None:
    make_static(monkeypatch)
    cases, results = solved("llama", value)
    with family("llama", value).engine(max_burst_steps=4) as engine:
        assert_same(run_engine(engine, cases), results, cases)
    assert CountedStep.num_replays > 5


def test_arrivals_in_between(monkeypatch) -> None:
    make_static(monkeypatch)
    cases, results = solved("gpt2")
    rng = random.Random(f"{SEED} arrivals")
    with family("gpt2").engine(max_burst_steps=4, max_prefill_tokens=9) as engine:
        assert_same(run_arrivals(engine, cases, rng), results, cases)
    assert CountedStep.num_replays > 5


def test_counters_are_those_of_the_other_loop(monkeypatch) -> None:
    """A finished row that the device goes on with as a pad is not counted."""
    cases, _ = solved("llama")
    with family("llama").engine(max_burst_steps=8) as engine:
        expected = run_engine(engine, cases)
    make_static(monkeypatch)
    with family("llama").engine(max_burst_steps=8) as engine:
        outputs = run_engine(engine, cases)
    assert [output.stats for output in outputs] == [output.stats for output in expected]
    assert any(output.stats.decode_tokens["base"] for output in outputs)


def test_the_oracle_sees_a_slot_that_is_one_off(monkeypatch) -> None:
    """The planted bug: the next token's keys go one slot too far."""
    advance = StepState.advance

    def off(self: StepState, drawn) -> None:
        advance(self, drawn)
        self.slot_mapping.add_(self.slot_mapping >= 0)

    make_static(monkeypatch)
    cases, results = solved("gpt2")
    monkeypatch.setattr(StepState, "advance", off)
    with family("gpt2").engine(max_burst_steps=16) as engine:
        for runner in engine._runners.values():  # or an engine before this one may have left them
            for pool in runner.pools:
                pool.normal_()
        try:
            found, _ = compare(run_engine(engine, cases), results, cases)
        except NonFiniteLogitsError:  # of keys that nobody has written
            return
    assert found
