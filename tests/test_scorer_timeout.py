# SPDX-License-Identifier: Apache-2.0
"""Scorers that take too long fail their request, and nobody else's."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace

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
from ivg_fast.loop import RequestLoop
from ivg_fast.scorer_threads import MAX_ABANDONED, MAX_AT_WORK, ScorerThreads


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
    assert [said(output) for output in outputs[0]] == [said(output) for output in outputs[1]]


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
        (
            lambda inputs: engines[0].step(),
            ScorerError,
            "cannot run or close the engine that waits",
        ),
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

    ended = threading.Event()
    threads = ScorerThreads(0.01, ended.set)

    def outcomes(count: int) -> dict:
        found: dict = {}
        while len(found) < count:
            found.update(threads.take_ended())
        return found

    for i in range(MAX_ABANDONED):
        threads.start(i, lambda inputs: hangs(inputs), [])
    for error in outcomes(MAX_ABANDONED).values():
        assert "took longer" in str(error)
    assert threads.num_abandoned == MAX_ABANDONED
    assert not threads.has_calls
    before = threading.active_count()
    threads.start(99, hangs, [])
    assert f"not called: {MAX_ABANDONED} late calls" in str(outcomes(1)[99])
    assert threading.active_count() == before
    late = list(threads._abandoned)
    released.set()
    for thread in late:
        thread.join(60)
    assert threads.num_abandoned == 0
    threads = ScorerThreads(60.0, ended.set)
    ended.clear()
    threads.start(100, lambda inputs: [1.5], [None])
    assert ended.wait(60)
    assert outcomes(1)[100].tolist() == [1.5]


class _Busy:
    """A scorer that must not be called twice at a time; it waits for its event."""

    def __init__(self, event: threading.Event, counts: list[int]) -> None:
        self._event, self._counts = event, counts
        self._at_work = 0

    def score(self, inputs) -> list[float]:
        self._at_work += 1
        self._counts.append(self._at_work)
        self._event.wait()
        self._at_work -= 1
        return [float(len(inputs))] * len(inputs)


def test_one_call_of_a_scorer_at_a_time_and_so_many_of_all(released: threading.Event) -> None:
    counts: list[int] = []
    scorers = [_Busy(released, counts) for _ in range(MAX_AT_WORK + 3)]
    wake = threading.Event()
    threads = ScorerThreads(None, wake.set)
    num_calls = 3 * len(scorers)
    for i in range(num_calls):
        threads.start(i, scorers[i % len(scorers)].score, [None] * (i + 1))
    assert len(threads._at_work) == MAX_AT_WORK
    forgotten = range(2 * len(scorers), num_calls, 2)  # they have not begun
    for i in forgotten:
        threads.forget(i)
    num_calls -= len(forgotten)
    released.set()
    scores: dict = {}
    while threads.has_calls:
        wake.clear()
        scores.update(threads.take_ended())
        if threads.has_calls:
            assert wake.wait(60)
    assert len(scores) == num_calls
    assert all(s.tolist() == [i + 1.0] * (i + 1) for i, s in scores.items())
    assert counts == [1] * num_calls


def test_a_late_scorer_keeps_nobody_waiting(released: threading.Event) -> None:
    """Others of every kind run to their ends, in their cohorts, while its first call is at work."""
    with with_engine(60.0) as engine:
        (alone,) = engine.generate("hello", searched(text_score))

        def waits(inputs):
            released.wait()
            return text_score(inputs)

        slow = engine.add_request("hello", searched(waits))
        others = {
            engine.add_request("hello", params)
            for params in (
                searched(text_score),
                SearchParams(max_tokens=30, seed=3),
                SearchParams.best_of_n(3, max_tokens=5, scorer=text_score, seed=3),
            )
        }
        while others:
            others -= {request_id for request_id, _ in engine.step()}
        assert engine.stats()["num_requests_running"] == 1
        released.set()
        ended: dict = {}
        while engine.has_unfinished:
            ended.update(engine.step())
        assert said(ended[slow]) == said(alone)


def test_late_scorers_of_one_chunk_length_share_their_bursts(monkeypatch) -> None:
    """Those whose scores are there run together, in whatever phase they are."""
    sizes = []
    run = RequestLoop._run_burst
    take = RequestLoop._take_late_scores

    def spy(self, plan, prefill, taking_part):
        sizes.append(len(taking_part))
        run(self, plan, prefill, taking_part)

    def waits_for_all(self):
        for call in list(self._threads._at_work):
            call.join(60)
        take(self)

    monkeypatch.setattr(RequestLoop, "_run_burst", spy)
    monkeypatch.setattr(RequestLoop, "_take_late_scores", waits_for_all)
    config = EngineConfig(num_blocks=80, num_threads=1, max_burst_steps=2, scorer_timeout_s=60.0)
    params = [
        replace(searched(lambda inputs: text_score(inputs)), ignore_eos=True, max_tokens=12)
        for _ in range(3)
    ]
    with Engine(tiny_model("gpt2", seed=1), tiny_tokenizer(), config=config) as engine:
        first = engine.add_request("hello", params[0])
        engine.step()
        rest = [engine.add_request("hello", p) for p in params[1:]]
        ended: dict = {}
        while engine.has_unfinished:
            ended.update(engine.step())
        assert set(ended) == {first, *rest}
    # The first is two steps ahead of the others, which do not wait for its boundary.
    assert sizes == [1, *[3] * (len(sizes) - 2), 2]


def test_deadlines_and_aborts_of_requests_that_wait_for_scores(released: threading.Event) -> None:
    called = threading.Event()

    def hangs(inputs):
        called.set()
        released.wait()
        return [0.0] * len(inputs)

    with with_engine(60.0) as engine:
        late = replace(searched(hangs), deadline_s=0.2)
        ids = [engine.add_request("hello", params) for params in (late, searched(hangs))]
        aborts = threading.Thread(target=lambda: called.wait() and engine.abort(ids[1]))
        aborts.start()
        ended: dict = {}
        while engine.has_unfinished:  # a step waits, but neither for the scorer nor its time limit
            ended.update(engine.step())
        aborts.join()
        reasons = [ended[i].outputs[0].finish_reason for i in ids]
        assert reasons == ["deadline", "abort"]
        assert engine.stats()["num_blocks_used"] == 0


@pytest.mark.parametrize(
    "fields", [{"scorer_timeout_s": 0}, {"scorer_timeout_s": "1"}, {"compile": 1}]
)
def test_bad_config(fields) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        EngineConfig(**fields)
    assert {caught.value.parameter: caught.value.value} == fields
