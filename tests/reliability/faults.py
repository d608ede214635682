# SPDX-License-Identifier: Apache-2.0
"""Parts of an engine that fail at their k-th call, and requests that run beside each other."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from engine_cases import Family, text_score

from ivg_fast import Engine, RequestOutput, SearchParams
from ivg_fast.loop import RequestLoop
from ivg_fast.params import ScoreInput

PROMPTS = [[9, 12, 10], [11, 8], [20, 21, 22, 23], [8, 9], [15, 14, 13]]


class Fault(Exception):
    """What is planted."""


class FailsAt:
    """A callable that raises at its k-th call, counted from 1.

    Attributes:
        at: the call that fails; 0: none.
        num_calls: calls so far.
    """

    def __init__(self, real: Callable[..., Any], error: Exception) -> None:
        self.real, self.error = real, error
        self.at = self.num_calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.num_calls += 1
        if self.num_calls == self.at:
            raise self.error
        return self.real(*args, **kwargs)

    def __get__(self, owner: Any, _: Any = None) -> Callable[..., Any]:
        """As a method: the k-th call of all objects."""
        return lambda *args, **kwargs: self(owner, *args, **kwargs)


class SchedulerProxy:
    """A scheduler of which one method can be replaced."""

    def __init__(self, real: Any) -> None:
        self.real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


class BadScorer:
    """text_score, but at its k-th call something else.

    Attributes:
        how: "raises", "nan", "too many", "none" or "hangs".
    """

    def __init__(self, how: str, at: int, released: threading.Event) -> None:
        self.how, self.at, self.released = how, at, released
        self.num_calls = 0

    def __call__(self, inputs: list[ScoreInput]) -> Any:
        self.num_calls += 1
        scores = text_score(inputs)
        if self.num_calls != self.at:
            return scores
        if self.how == "raises":
            raise Fault("planted")
        if self.how == "hangs":
            self.released.wait()
        return {"nan": [float("nan")] * len(scores), "too many": [*scores, 1.0]}.get(self.how)


def searched(scorer: Any, **fields: Any) -> SearchParams:
    options = {"max_tokens": 5, "chunk_length": 2, "n": 4, "ignore_eos": True, **fields}
    return SearchParams.cbs(beam_width=2, num_candidates=2, scorer=scorer, **options)


def mixed_params() -> list[SearchParams]:
    """One request of each way through the engine, for PROMPTS."""
    return [
        searched(text_score),
        searched("explicit", max_tokens=4),
        searched("implicit", max_tokens=4, guidance="implicit"),
        SearchParams(max_tokens=5, ignore_eos=True),
        SearchParams.best_of_n(2, max_tokens=3, scorer=text_score, stop=["zz", "q#"]),
    ]


def make_engine(family: Family, **config: Any) -> Engine:
    options = {"num_blocks": 400, "max_num_rows": 9, "max_burst_steps": 2, "max_prefill_tokens": 9}
    return family.engine(**{**options, **config})


def said(output: RequestOutput) -> list[tuple]:
    """Scores may differ in their last bits: a batch of another size rounds otherwise."""
    return [
        (o.token_ids, o.finish_reason, pytest.approx(o.score, abs=1e-4)) for o in output.outputs
    ]


def each_alone(family: Family, params: list[SearchParams]) -> list[list[tuple]]:
    """What each of PROMPTS returns when nobody else is there."""
    with make_engine(family) as engine:
        return [
            said(engine.generate([prompt], p, seeds=[i])[0])
            for i, (prompt, p) in enumerate(zip(PROMPTS, params, strict=False))
        ]


def check_next(engine: Engine, alone: list[list[tuple]]) -> None:
    (output,) = engine.generate([PROMPTS[3]], mixed_params()[3], seeds=[3])
    assert said(output) == alone[3]
    engine.check_integrity()
    assert engine.stats()["num_blocks_used"] == 0


def on_scheduler(name: str) -> Callable[[Any, Engine], FailsAt]:
    def plant(monkeypatch: Any, engine: Engine) -> FailsAt:
        proxy = SchedulerProxy(engine._scheduler)
        fault = FailsAt(getattr(engine._scheduler, name), MemoryError("planted"))
        setattr(proxy, name, fault)
        monkeypatch.setattr(engine._loop, "_scheduler", proxy)
        return fault

    return plant


def add_all(engine: Engine, params: list[SearchParams]) -> dict[int, int]:
    """Index of each request by its id."""
    pairs = enumerate(zip(PROMPTS, params, strict=False))
    return {engine.add_request(prompt, p, seed=i): i for i, (prompt, p) in pairs}


def run_all(engine: Engine, params: list[SearchParams]) -> tuple[dict[int, Any], dict[int, int]]:
    """Runs all beside each other, books checked at each step: output or error by index, once; and
    the index of each request id."""
    index = add_all(engine, params)
    ended: dict[int, Any] = {}
    while engine.has_unfinished:
        for request_id, output in engine.step():
            assert index[request_id] not in ended
            ended[index[request_id]] = output
        engine.check_integrity()
    assert len(ended) == len(params)
    held = {k: v for k, v in engine.stats().items() if k != "num_blocks" and v}
    assert not held, f"left behind: {held}"
    return ended, index


@contextmanager
def watched(monkeypatch: Any) -> Iterator[set[int]]:
    """The requests whose work is at work when it fails, by id; filled as they run."""
    at_work: set[int] = set()
    real = RequestLoop._attempt

    def attempt(loop: RequestLoop, requests: Any, work: Callable[[], Any]) -> Any:
        def watched_work() -> Any:
            try:
                return work()
            except BaseException:
                at_work.update(request.request_id for request in requests)
                raise

        return real(loop, requests, watched_work)

    with monkeypatch.context() as patch:
        patch.setattr(RequestLoop, "_attempt", attempt)
        yield at_work
