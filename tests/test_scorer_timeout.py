# SPDX-License-Identifier: Apache-2.0
"""Scorers that take too long fail their request, and nobody else's."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from engine_cases import text_score
from tiny_models import tiny_model, tiny_tokenizer

from ivg_fast import (
    Engine,
    EngineConfig,
    InvalidParameterError,
    RequestOutput,
    ScorerError,
    SearchParams,
)
from ivg_fast.scorer_threads import MAX_ABANDONED, ScorerThreads


def searched(scorer) -> SearchParams:
    return SearchParams.cbs(
        max_tokens=9, beam_width=2, num_candidates=2, chunk_length=3, scorer=scorer, seed=4, n=4
    )


def said(output: RequestOutput) -> list[tuple[list[int], float]]:
    return [(candidate.token_ids, candidate.score) for candidate in output.outputs]


@pytest.fixture
def released() -> Iterator[threading.Event]:
    """Hanging scorers wait for this event; it is set at the end."""
    event = threading.Event()
    yield event
    event.set()


def with_engine(timeout_s: float | None) -> Engine:
    config = EngineConfig(num_blocks=80, num_threads=1, scorer_timeout_s=timeout_s)
    return Engine(tiny_model("gpt2", seed=1), tiny_tokenizer(), config=config)


def test_a_late_scorer_fails_its_request_alone(released: threading.Event) -> None:
    def hangs(inputs):
        released.wait()
        return [0.0] * len(inputs)

    with with_engine(None) as engine:
        (alone,) = engine.generate("hello", searched(text_score))
    with with_engine(0.2) as engine:
        with pytest.raises(ScorerError, match=r"hangs took longer than .* = 0\.2") as caught:
            engine.generate(["hello", "hello"], [searched(hangs), searched(text_score)])
        assert caught.value.outputs[0] is None
        assert said(caught.value.outputs[1]) == said(alone)
        engine.check_integrity()
        assert engine.stats()["num_blocks_used"] == 0
        assert said(engine.generate("hello", searched(text_score))[0]) == said(alone)


def test_a_scorer_in_time_is_the_same_as_without_a_limit() -> None:
    outputs = []
    for timeout_s in (None, 60.0):
        with with_engine(timeout_s) as engine:
            outputs.append(engine.generate(["a", "b"], searched(text_score), seeds=[1, 2]))
    assert [o.outputs for o in outputs[0]] == [o.outputs for o in outputs[1]]


def test_which_thread_calls_and_how() -> None:
    seen = []

    def spy(inputs):
        thread = threading.current_thread()
        seen.append((thread is threading.main_thread(), thread.daemon, torch.get_num_threads()))
        seen.append(torch.is_inference_mode_enabled())
        return [0.0] * len(inputs)

    params = SearchParams.best_of_n(2, max_tokens=2, scorer=spy)
    for timeout_s in (None, 60.0):
        with with_engine(timeout_s) as engine:
            engine.generate("a", params)
    assert seen == [(True, False, 1), True, (False, True, 1), True]


@pytest.mark.parametrize(
    ("scorer", "error", "message"),
    [
        (lambda inputs: 1 / 0, ScorerError, "raised ZeroDivisionError"),
        (lambda inputs: [1.0], ScorerError, "must return 4 scores, got 1"),
        (lambda inputs: engines[0].step(), ScorerError, "cannot run the engine that waits"),
    ],
)
def test_errors_of_a_scorer_on_its_thread(scorer, error, message: str) -> None:
    with with_engine(60.0) as engine:
        engines[:] = [engine]
        with pytest.raises(error, match=message):
            engine.generate("a", searched(scorer))
        assert engine.stats()["num_blocks_used"] == 0


engines: list[Engine] = []


def test_an_interrupt_reaches_the_engines_thread() -> None:
    def interrupts(inputs):
        raise KeyboardInterrupt

    with with_engine(60.0) as engine:
        with pytest.raises(KeyboardInterrupt):
            engine.generate("a", searched(interrupts))
        assert not engine.has_unfinished


def test_only_so_many_threads_are_left_behind(released: threading.Event) -> None:
    def hangs(inputs):
        released.wait()
        return [0.0]

    threads = ScorerThreads(0.01)
    for _ in range(MAX_ABANDONED):
        with pytest.raises(ScorerError, match="took longer"):
            threads.call(hangs, [])
    assert threads.num_abandoned == MAX_ABANDONED
    before = threading.active_count()
    with pytest.raises(ScorerError, match=f"not called: {MAX_ABANDONED} late calls"):
        threads.call(hangs, [])
    assert threading.active_count() == before
    late = list(threads._abandoned)
    released.set()
    for thread in late:
        thread.join(60)
    assert threads.num_abandoned == 0
    assert ScorerThreads(60.0).call(lambda inputs: [1.5], [None]).tolist() == [1.5]


@pytest.mark.parametrize(
    "fields", [{"scorer_timeout_s": 0}, {"scorer_timeout_s": "1"}, {"compile": 1}]
)
def test_bad_config(fields) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        EngineConfig(**fields)
    assert {caught.value.parameter: caught.value.value} == fields
