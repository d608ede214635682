# SPDX-License-Identifier: Apache-2.0
"""Any order of calls: the scheduler against a naive book-keeper, on a naive KV memory.

Hypothesis adds requests, runs bursts, scores late, ends requests by abort and deadline, also inside
a burst, fills queue and pool, and calls out of order. The book-keeper knows who waits, who runs and
who may start; the search model knows what each request returns.
"""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from kv_model import Device, blocks_for, snapshot
from search_model import ABORT, DEADLINE, NUM_ROLES, Request, search
from test_scheduler import assert_same, random_request

from ivg_fast import _C
from ivg_fast.errors import CapacityError, InvalidParameterError, IVGError, QueueFullError

SETTINGS = settings(
    max_examples=40,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def worst_case(request: Request) -> tuple[int, int]:
    """Blocks and rows that the design reserves for a request."""
    rows = request.beam_width * request.num_candidates
    length, chunk = request.max_tokens, request.chunk_length
    extra = request.scorer == "scalar_head"  # the slot of an end of text that is scored
    prompt = blocks_for(max(request.prompt_lens))
    if rows == 1 or chunk == 0 or chunk >= length:
        return prompt + rows * blocks_for(length + extra), rows
    survivors = request.beam_width * blocks_for(length + extra)
    return prompt + survivors + rows * blocks_for(15 + chunk + extra), rows


def request_of(seed: int) -> Request:
    """Half of them small and of one cohort, so that there is somebody to wait for."""
    request = random_request(random.Random(seed))
    if request.scorer == "none" or seed % 4 < 2:
        return request
    small = {"beam_width": 1, "num_candidates": 2, "num_outputs": 1, "eos_rate": 0}
    return dataclasses.replace(request, chunk_length=9, max_tokens=30, **small)


class SchedulerMachine(RuleBasedStateMachine):
    bug = ""
    make_scheduler: Any = _C.Scheduler

    @initialize(
        num_blocks=st.integers(25, 160),
        max_num_rows=st.integers(4, 24),
        max_burst_steps=st.integers(1, 8),
        max_join_steps=st.integers(-1, 4),
        max_prefill_tokens=st.sampled_from([-1, 1, 7, 30]),
        max_queued_requests=st.integers(-1, 4),
    )
    def start(self, **config: int) -> None:
        self.config = config
        self.scheduler = self.make_scheduler(num_roles=NUM_ROLES, **config)
        self.requests: dict[int, Request] = {}
        self.device = Device(config["num_blocks"], self.requests, self.bug)
        self.queue: list[int] = []
        self.running: list[int] = []
        self.waited: dict[int, int] = {}  # steps of others while one could have started
        self.read: dict[int, int] = {}  # prompt tokens
        self.ended_by: dict[int, int] = {}  # ABORT or DEADLINE, by id
        self.in_flight: list[int] = []
        self.committed: dict[str, np.ndarray] | None = None
        self.to_score: dict[int, tuple] = {}
        self.decided: dict[int, tuple[int, ...]] = {}
        self.results: dict[int, dict] = {}

    # What happens

    @rule(seed=st.integers(0, 2**32))
    def add(self, seed: int) -> None:
        request = request_of(seed)
        blocks, rows = worst_case(request)
        limit = self.config["max_queued_requests"]
        if blocks > self.config["num_blocks"] or rows > self.config["max_num_rows"]:
            with pytest.raises(CapacityError):
                self.scheduler.add_request(**request.kwargs())
        elif 0 <= limit <= len(self.queue):
            with pytest.raises(QueueFullError):
                self.scheduler.add_request(**request.kwargs())
        else:
            is_late = bool(seed % 2) and request.scorer != "none"
            request_id = self.scheduler.add_request(**request.kwargs(), is_scored_late=is_late)
            assert request_id == len(self.requests)
            self.requests[request_id] = request
            self.queue.append(request_id)
            self.decided[request_id] = ()
            self.read[request_id] = 0

    @precondition(lambda self: self.committed is None)
    @rule()
    def plan(self) -> None:
        self.admit()
        plan = self.scheduler.plan()
        view = snapshot(plan)
        self.check_prefill(view)
        self.check_who_waits(view)
        committed = self.device.run(plan)
        self.in_flight = view.request_ids.tolist()
        if committed["num_tokens"].size:
            self.committed = committed

    def admit(self) -> None:
        """First come, first served: whoever is at the head of the queue waits for room."""
        while self.queue:
            totals = np.sum([worst_case(self.requests[i]) for i in self.running], axis=0)
            blocks, rows = totals + worst_case(self.requests[self.queue[0]])
            if blocks > self.config["num_blocks"] or rows > self.config["max_num_rows"]:
                return
            self.running.append(self.queue.pop(0))
            self.waited[self.running[-1]] = 0

    def check_prefill(self, view: Any) -> None:
        """Prompts are read in order of arrival, as far as the budget goes."""
        budget = self.config["max_prefill_tokens"]
        left = budget if budget > 0 else 10**9
        expected = []
        for i in self.running:
            num_tokens = min(left, max(self.requests[i].prompt_lens) - self.read[i])
            if num_tokens > 0:
                expected.append((i, self.read[i], self.read[i] + num_tokens))
                self.read[i] += num_tokens
                left -= num_tokens
        columns = view.prefill_request_ids, view.prefill_begin, view.prefill_end
        assert list(zip(*(c.tolist() for c in columns), strict=True)) == expected

    def check_who_waits(self, view: Any) -> None:
        starting = [i for i in self.waited if self.is_read(i)]
        for i in view.request_ids.tolist():
            assert i in self.running
            self.waited.pop(i, None)
        for i in starting:
            if i in self.waited:
                self.waited[i] += view.num_steps
                assert self.waited[i] <= self.config["max_join_steps"] or (
                    self.config["max_join_steps"] < 0
                )
        assert len(view.request_ids) or not starting, "nobody runs, yet one could"

    def is_read(self, request_id: int) -> bool:
        return self.read[request_id] == max(self.requests[request_id].prompt_lens)

    @precondition(lambda self: self.committed is not None)
    @rule()
    def commit(self) -> None:
        self.scheduler.commit_tokens(**self.committed)
        self.committed, self.in_flight = None, []

    @precondition(lambda self: self.in_flight)
    @rule(is_rare=st.integers(0, 4))
    def give_up(self, is_rare: int) -> None:
        if is_rare:
            return
        ended = self.scheduler.give_up()
        assert set(self.in_flight) <= set(ended) <= set(self.running)
        for i in ended:
            self.ended_by.setdefault(i, ABORT)
        self.committed, self.in_flight = None, []

    @precondition(lambda self: self.committed is None)
    @rule()
    def score(self) -> None:
        plan = self.scheduler.plan_scores()
        self.check_twins(snapshot(plan))
        given = self.device.score(plan)
        assert not given.keys() & self.to_score.keys()
        self.to_score.update(given)

    def check_twins(self, plan: Any) -> None:
        first: dict[tuple, int] = {}
        for row, index in enumerate(plan.row_request.tolist()):
            request_id = int(plan.request_ids[index])
            tokens = self.scheduler.history(request_id, int(plan.row_candidate[row])).tolist()
            assert plan.row_twin[row] == first.setdefault((request_id, *tokens), row)

    @precondition(lambda self: self.to_score)
    @rule(data=st.data())
    def commit_scores(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.to_score)))
        scores, rewards = self.to_score[request_id]
        is_live = request_id in self.running
        if is_live:
            for wrong in (scores[:-1], np.append(scores, 0.0), np.full_like(scores, np.nan)):
                with pytest.raises(InvalidParameterError):
                    self.scheduler.commit_scores(request_id, wrong)
        assert self.scheduler.commit_scores(request_id, scores, rewards) == is_live
        del self.to_score[request_id]
        if is_live:
            self.waited[request_id] = 0

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), is_deadline=st.booleans())
    def end(self, data: st.DataObject, is_deadline: bool) -> None:
        request_id = data.draw(st.integers(0, len(self.requests) - 1))
        is_live = request_id in self.queue or request_id in self.running
        assert self.scheduler.abort(request_id, is_deadline=is_deadline) == is_live
        if is_live:
            self.ended_by.setdefault(request_id, DEADLINE if is_deadline else ABORT)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def take_decided(self, data: st.DataObject) -> None:
        request_id = data.draw(st.integers(0, len(self.requests) - 1))
        tokens = self.scheduler.take_decided(request_id).tolist()
        assert not tokens or request_id in self.running
        self.decided[request_id] += tuple(tokens)

    @rule()
    def out_of_order(self) -> None:
        calls = [lambda: self.scheduler.take_result(len(self.requests))]
        if self.committed is None:
            empty = np.zeros((0, 0), np.float32)
            none = np.zeros(0, np.int32)
            arrays = (empty.astype(np.int32), empty, empty, empty, none, none.astype(np.uint8))
            calls.append(lambda: self.scheduler.commit_tokens(*arrays, none))
        else:
            calls += [self.scheduler.plan, self.scheduler.plan_scores]
        for call in calls:
            with pytest.raises((InvalidParameterError, RuntimeError)):
                call()

    # What must hold

    @invariant()
    def books_agree(self) -> None:
        self.scheduler.check_integrity()
        for request_id in self.scheduler.take_finished():
            assert request_id not in self.results
            for place in (self.queue, self.running):
                if request_id in place:
                    place.remove(request_id)
            self.waited.pop(request_id, None)
            self.results[request_id] = self.scheduler.take_result(request_id)
            self.check_result(request_id)
        for i in self.ended_by:
            assert i in self.results or i in self.in_flight
        stats = self.scheduler.stats()
        reserved = [worst_case(self.requests[i]) for i in self.running]
        assert stats["num_requests_waiting"] == len(self.queue)
        assert stats["num_requests_running"] == len(self.running)
        assert stats["num_rows"] == sum(rows for _, rows in reserved)
        assert stats["num_blocks_used"] <= sum(blocks for blocks, _ in reserved)

    def check_result(self, request_id: int) -> None:
        result, request = self.results[request_id], self.requests[request_id]
        decided, candidates = self.decided[request_id], result["candidates"]
        said = [tuple(candidate["token_ids"].tolist()) for candidate in candidates]
        assert said[0][: len(decided)] == decided, "what was decided has been taken back"
        if request_id not in self.ended_by:
            assert_same(result, request)
            return
        histories = search(request).histories
        assert all(any(h[: len(tokens)] == tokens for h in histories) for tokens in said)
        reasons = {candidate["finish"] for candidate in candidates}
        assert reasons & {ABORT, DEADLINE} <= {self.ended_by[request_id]}

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for _ in range(3000):
            if not self.scheduler.has_unfinished:
                break
            if self.committed is None:
                self.plan()
            self.books_agree()
            if self.committed is not None:
                self.commit()
            self.books_agree()
            self.score()
            for request_id, (scores, rewards) in self.to_score.items():
                if self.scheduler.commit_scores(request_id, scores, rewards):
                    self.waited[request_id] = 0
            self.to_score.clear()
            self.books_agree()
        assert sorted(self.results) == list(range(len(self.requests)))
        assert self.scheduler.stats()["num_blocks_used"] == 0


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = SETTINGS


class LosesAnAbort:
    """A scheduler with a mistake: every second abort is forgotten."""

    def __init__(self, **config: int) -> None:
        self.real = _C.Scheduler(**config)
        self.num_aborts = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def abort(self, request_id: int, is_deadline: bool) -> bool:
        self.num_aborts += 1
        if self.num_aborts % 2 == 0:
            return True
        return self.real.abort(request_id, is_deadline=is_deadline)


def _forgets(name: str) -> Any:
    """A scheduler that does not keep to one of its limits."""
    return lambda **config: _C.Scheduler(**{**config, name: -1})


@pytest.mark.parametrize(
    "planted",
    [
        "skip_copies",
        LosesAnAbort,
        _forgets("max_join_steps"),
        _forgets("max_prefill_tokens"),
        _forgets("max_queued_requests"),
    ],
)
def test_planted_bug_is_caught(planted: Any) -> None:
    class Planted(SchedulerMachine):
        bug = planted if isinstance(planted, str) else ""
        make_scheduler = staticmethod(_C.Scheduler if isinstance(planted, str) else planted)

    quick = settings(
        SETTINGS, database=None, max_examples=200, phases=[Phase.generate], derandomize=True
    )
    with pytest.raises((AssertionError, IVGError)):
        run_state_machine_as_test(Planted, settings=quick)
