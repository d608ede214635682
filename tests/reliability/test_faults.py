# SPDX-License-Identifier: Apache-2.0
"""Whatever fails, at whichever call: the books hold, the others return what they return alone, and
the next request works."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from engine_cases import Family
from faults import (
    PROMPTS,
    BadScorer,
    FailsAt,
    Fault,
    check_next,
    each_alone,
    make_engine,
    mixed_params,
    on_scheduler,
    run_all,
    said,
    searched,
    watched,
)

from ivg_fast import Engine, RequestOutput, ScorerError
from ivg_fast import burst as burst_module
from ivg_fast.models.runner import ModelRunner
from ivg_fast.scorer_threads import MAX_AT_WORK

FAMILY = Family("llama", seed=5, eos_token_id=7)


@pytest.fixture(scope="module")
def alone() -> list[list[tuple]]:
    return each_alone(FAMILY, mixed_params())


@pytest.fixture
def released() -> Iterator[threading.Event]:
    """What hangs waits for this event; it is set at the end."""
    event = threading.Event()
    yield event
    event.set()


def on_object(find: Callable[[Engine], Any], name: str) -> Callable[[Any, Engine], FailsAt]:
    def plant(monkeypatch: Any, engine: Engine) -> FailsAt:
        owner = find(engine)
        fault = FailsAt(getattr(owner, name), Fault("planted"))
        monkeypatch.setattr(owner, name, fault)
        return fault

    return plant


# What fails of a whole batch: nobody can say for which of its requests.
OF_A_BATCH = {
    "forward of a language model": on_object(lambda _: ModelRunner, "forward"),
    "forward of a value model": on_object(lambda _: ModelRunner, "hidden"),
    "sampling": on_object(lambda _: burst_module, "guided_sample"),
    "copies of a fork": on_object(lambda engine: engine._loop._burst, "copy_blocks"),
}
# What fails of one request.
OF_ONE = {
    "plan": on_scheduler("plan"),
    "plan_scores": on_scheduler("plan_scores"),
    "commit_tokens": on_scheduler("commit_tokens"),
    "commit_scores": on_scheduler("commit_scores"),
    "take_result": on_scheduler("take_result"),
    "decode": on_object(lambda engine: engine.tokenizer, "decode"),
}


@pytest.mark.parametrize("part", [*OF_A_BATCH, *OF_ONE])
def test_a_part_fails_at_any_call(monkeypatch, alone, part: str) -> None:
    num_failed = 0
    with make_engine(FAMILY) as engine:
        fault = {**OF_A_BATCH, **OF_ONE}[part](monkeypatch, engine)
        for k in itertools.count(1):
            fault.at, fault.num_calls = k, 0
            with watched(monkeypatch) as at_work:
                ended, index = run_all(engine, mixed_params())
            has_failed = fault.num_calls >= k
            fault.at = 0
            failed = {i for i, output in ended.items() if not isinstance(output, RequestOutput)}
            assert all(ended[i] is fault.error for i in failed)
            assert bool(failed) == has_failed
            suspects = {index[request_id] for request_id in at_work}
            assert failed <= suspects if part in OF_A_BATCH else len(failed) <= 1
            for i in set(ended) - failed:
                assert said(ended[i]) == alone[i], f"call {k}, request {i}"
            check_next(engine, alone)
            num_failed += len(failed)
            if not has_failed:
                break
    assert k > 3
    assert num_failed >= k - 1


def test_commits_that_the_scheduler_refuses(monkeypatch, alone) -> None:
    """Not for want of memory: the requests of that burst fail, nobody else."""
    with make_engine(FAMILY) as engine:
        at_work: list[int] = []
        real = engine._loop._burst.run

        def run(plan: Any, *rest: Any) -> Any:
            at_work[:] = [*plan.request_ids.tolist(), *plan.prefill_request_ids.tolist()]
            return real(plan, *rest)

        def refuse(*arrays: Any) -> None:
            refused.extend(at_work)
            raise error

        monkeypatch.setattr(engine._loop._burst, "run", run)
        fault = on_scheduler("commit_tokens")(monkeypatch, engine)
        commit, error = fault.real, ValueError("planted")
        num_failed: list[int] = []
        for k in itertools.count(1):
            refused: list[int] = []
            fault.at = fault.num_calls = 0
            fault.real = lambda *arrays, k=k: (refuse if fault.num_calls == k else commit)(*arrays)
            ended, index = run_all(engine, mixed_params())
            fault.real = commit
            failed = {i for i, output in ended.items() if output is error}
            assert failed == {index[request_id] for request_id in refused}
            for i in set(ended) - failed:
                assert said(ended[i]) == alone[i], f"call {k}, request {i}"
            check_next(engine, alone)
            if not failed:
                break
            num_failed.append(len(failed))
        assert min(num_failed) < len(PROMPTS)


@pytest.mark.parametrize(
    ("how", "is_threaded"),
    [
        *itertools.product(["raises", "nan", "too many", "none"], [False, True]),
        ("hangs", True),  # without a limit nobody looks
    ],
)
def test_a_scorer_fails_at_any_call(alone, released, how: str, is_threaded: bool) -> None:
    limit = {"scorer_timeout_s": 1.0 if how == "hangs" else 60.0} if is_threaded else {}
    with make_engine(FAMILY, **limit) as engine:
        for k in itertools.count(1):
            params = mixed_params()
            bad = BadScorer(how, k, released)
            params[0] = searched(bad)
            ended, _ = run_all(engine, params)
            has_failed = bad.num_calls >= k
            assert isinstance(ended[0], ScorerError) == has_failed
            for i in range(has_failed, len(params)):
                assert said(ended[i]) == alone[i], f"call {k}, request {i}"
            check_next(engine, alone)
            if not has_failed:
                break
    assert k == 4  # three chunks, three calls


def test_threads_that_hang_are_so_many_in_all(alone, released) -> None:
    """More scorers hang, all at once, than threads may be left behind."""
    with make_engine(FAMILY, max_num_rows=120, scorer_timeout_s=0.5) as engine:
        bad = [BadScorer("hangs", 1, released) for _ in range(MAX_AT_WORK + 9)]
        ids = {engine.add_request(PROMPTS[0], searched(scorer)) for scorer in bad}
        other = engine.add_request(PROMPTS[3], mixed_params()[3], seed=3)
        ended: dict[int, Any] = {}
        most, threads = 0, engine._loop._threads
        while engine.has_unfinished:
            ended.update(engine.step())
            most = max(most, len(threads._at_work) + threads.num_abandoned)
        assert said(ended[other]) == alone[3]
        assert {type(ended[i]) for i in ids} == {ScorerError}
        assert most == MAX_AT_WORK
        (refused,) = engine.generate([PROMPTS[3]], mixed_params()[3], seeds=[3])
        assert said(refused) == alone[3]
        with pytest.raises(ScorerError, match="late calls are still at work"):
            engine.generate([PROMPTS[0]], mixed_params()[0])
        late = list(threads._abandoned)
        released.set()
        for thread in late:
            thread.join(60)
        check_next(engine, alone)


def test_no_thread_can_be_had_for_a_scorer(monkeypatch, alone) -> None:
    with make_engine(FAMILY, scorer_timeout_s=60.0) as engine:
        start = FailsAt(threading.Thread.start, RuntimeError("can't start new thread"))
        for k in itertools.count(1):
            start.at, start.num_calls = k, 0
            with monkeypatch.context() as patch:
                patch.setattr(threading.Thread, "start", start)
                ended, _ = run_all(engine, mixed_params())
            failed = [i for i, output in ended.items() if not isinstance(output, RequestOutput)]
            assert len(failed) == (start.num_calls >= k)
            for i, output in ended.items():
                if i in failed:
                    assert isinstance(output, ScorerError)
                    assert "can't start new thread" in str(output)
                else:
                    assert said(output) == alone[i]
            check_next(engine, alone)
            if not failed:
                break
    assert k > 3
