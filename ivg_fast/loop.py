# SPDX-License-Identifier: Apache-2.0
"""RequestLoop: the scheduler's plans, run for live requests; closes the books when something
fails."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Container, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from ivg_fast.burst import BurstRunner
from ivg_fast.devices import on_device, torch_threads
from ivg_fast.draws import BurstResult
from ivg_fast.errors import QueueFullError
from ivg_fast.models.text_value import TextValueModel
from ivg_fast.models.values import call_scorer
from ivg_fast.one_thread import OneThread
from ivg_fast.outputs import RequestOutput
from ivg_fast.params import EngineConfig, ScoreInput, Scorer
from ivg_fast.request import LiveRequest
from ivg_fast.scorer_threads import ScorerThreads
from ivg_fast.scoring import ChunkScorer

T = TypeVar("T")
# Calls a request's scorer; None: its scores come later.
CallScorer = Callable[[LiveRequest, Scorer, list[ScoreInput]], NDArray[np.float64] | None]
# A request that has ended: its id, and its output or what it failed with.
Ended = tuple[int, RequestOutput | BaseException]


class RequestLoop:
    """Takes requests, runs them burst by burst, and hands out what has ended.

    `submit`, `abort` and `has_room` are for any thread, the rest for the one that steps.

    Args:
        scheduler: the C++ scheduler.
        burst: executes its plans.
        make_scorer: makes what executes its score plans, given a way to call scorers.
        tokenizer: the base model's, for the outputs' texts.
        config: of the engine.

    Attributes:
        is_busy: whether a step is at work: a scorer that it calls may not start another.
        uncollected: what has ended and waits for the next `step`.
    """

    def __init__(
        self,
        scheduler: Any,
        burst: BurstRunner,
        make_scorer: Callable[[CallScorer], ChunkScorer],
        tokenizer: Any,
        config: EngineConfig,
    ) -> None:
        self._scheduler = scheduler
        self._burst = burst
        self._scorer = make_scorer(self._call_scorer)
        self._tokenizer = tokenizer
        self._num_threads = config.num_threads
        self._max_queued = config.max_queued_requests
        self._live: dict[int, LiveRequest] = {}
        self._lock = threading.RLock()  # a request in a plan is in _live too
        self._wake = threading.Event()
        self.steps = OneThread()
        self._threads: ScorerThreads | None = None
        if config.scorer_timeout_s is not None:
            self.use_scorer_threads(config.scorer_timeout_s)
        self.uncollected: list[Ended] = []
        self.is_busy = False

    def use_scorer_threads(self, timeout_s: float | None) -> None:
        """From now on callables run on threads of their own, beside the steps."""
        self._threads = ScorerThreads(timeout_s, self._wake.set)

    @property
    def is_called_by_a_scorer(self) -> bool:
        """Whether a scorer asks that the engine waits for."""
        is_inside = self.is_busy and self.steps.is_mine
        return is_inside or (self._threads is not None and self._threads.is_current())

    @property
    def has_unfinished(self) -> bool:
        """Whether anything is left to run or to return."""
        return bool(self._live or self.uncollected)

    @property
    def has_room(self) -> bool:
        """Whether one more request may wait."""
        limit = self._max_queued
        return limit is None or self._scheduler.stats()["num_requests_waiting"] < limit

    def check(self, requests: Sequence[LiveRequest]) -> None:
        """Raises what `submit` would for one of them, a full queue aside."""
        for request in requests:
            self._scheduler.add_request(**request.spec(), only_check=True)

    def submit(self, request: LiveRequest) -> int:
        """Queues a request and returns its id.

        Raises:
            InvalidParameterError, CapacityError, QueueFullError: it is not queued.
        """
        is_model = isinstance(request.text_scorer, TextValueModel)  # it cannot hang
        request.is_scored_late = (
            self._threads is not None and request.text_scorer is not None and not is_model
        )
        with self._lock:
            request.request_id = self._scheduler.add_request(**request.spec())
            self._live[request.request_id] = request
        self._wake.set()
        return request.request_id

    def abort(self, request_id: int) -> bool:
        """Ends a request; the next step returns what it has. False if it has ended already."""
        is_live = self._scheduler.abort(request_id)
        self._wake.set()
        return is_live

    def run_all(
        self,
        requests: Sequence[LiveRequest],
        use_tqdm: bool,
        on_ended: Callable[[int, RequestOutput | BaseException], object] | None = None,
    ) -> list[RequestOutput]:
        """Runs these to their ends, beside what is there already; see Engine.generate."""
        with self.steps:
            return self._run_all(requests, use_tqdm, on_ended)

    def _run_all(
        self,
        requests: Sequence[LiveRequest],
        use_tqdm: bool,
        on_ended: Callable[[int, RequestOutput | BaseException], object] | None,
    ) -> list[RequestOutput]:
        self.check(requests)
        outputs: dict[int, RequestOutput] = {}
        failures: list[tuple[int, BaseException]] = []
        ids: dict[int, int] = {}
        pending = deque(enumerate(requests))
        try:
            with tqdm(total=len(requests), desc="ivg", unit="prompt", disable=not use_tqdm) as bar:
                while pending or ids:
                    ended: list[Ended] = []  # by index
                    while pending and self.has_room:
                        index, request = pending.popleft()
                        try:
                            ids[self.submit(request)] = index
                        except QueueFullError:  # others have taken its place since
                            pending.appendleft((index, request))
                            break
                        except Exception as refused:  # the others go on
                            ended.append((index, refused))
                    for request_id, output in self.run_step() if pending or ids else ():
                        if request_id in ids:
                            ended.append((ids.pop(request_id), output))
                        else:
                            self.uncollected.append((request_id, output))
                    for index, output in ended:
                        if isinstance(output, RequestOutput):
                            outputs[index] = output
                        else:
                            failures.append((index, output))
                        bar.update()
                        if on_ended is not None:
                            on_ended(index, output)
        finally:
            self.drop(ids)
        if failures:
            index, error = min(failures, key=lambda failure: failure[0])
            error.add_note(f"prompt {index} of {len(requests)} failed")
            every = [outputs.get(i) for i in range(len(requests))]
            vars(error).update(outputs=every, failures=dict(failures))
            raise error
        return [outputs[i] for i in range(len(requests))]

    def step(self) -> list[Ended]:
        """Runs one burst and the scoring behind it, or, where there is nothing but scorers to wait
        for, waits for one; what has ended since the last call."""
        with self.steps:
            ended, self.uncollected = self.uncollected, []
            try:
                return ended + self.run_step()
            except BaseException:
                self.uncollected = ended + self.uncollected
                raise

    def run_step(self) -> list[Ended]:
        """Like `step`, but leaves alone what waits from before."""
        self._wake.clear()  # what happens from here on wakes a wait
        try:
            self._end_overdue()
            self._take_late_scores()
            has_run = self._run_plan()
        except BaseException as error:  # an interrupt between two calls
            self._give_up(error)
            raise
        ended = self._collect()
        if not (ended or has_run):
            self._wait_for_scores()
        for _, output in ended:
            if not isinstance(output, RequestOutput | Exception):
                self.uncollected += ended
                raise output
        return ended

    def _run_plan(self) -> bool:
        """Runs what the scheduler plans; False if that is nothing."""
        with self._lock:
            plan = self._with_room(self._scheduler.plan)
            prefill = [self._live[i] for i in plan.prefill_request_ids.tolist()]
            taking_part = [self._live[i] for i in plan.request_ids.tolist()]
        if not (prefill or taking_part):
            return False
        self._run_burst(plan, prefill, taking_part)
        self._score()
        return True

    def _with_room(self, call: Callable[[], T]) -> T:
        """A call of the scheduler. Where it finds no memory it has changed nothing, and the
        youngest request ends to make room."""
        while True:
            try:
                return call()
            except MemoryError as error:
                with self._lock:
                    live = [r for r in self._live.values() if r.error is None]
                if not live:
                    raise
                self._fail(max(live, key=lambda request: request.request_id), error)

    def _give_up(self, error: BaseException) -> None:
        """Closes the books of a step that was broken off, nobody knows where: all requests end."""
        self.is_busy = False
        broken = set(self._scheduler.give_up())
        with self._lock:
            live = list(self._live.items())
        for request_id, request in live:
            if request_id in broken or self._scheduler.abort(request_id):
                request.error = request.error or error
        self.uncollected += self._collect()

    def _fail(self, request: LiveRequest, error: BaseException) -> None:
        request.error = error
        self._scheduler.abort(request.request_id)

    def _end_overdue(self) -> None:
        now = time.monotonic()
        with self._lock:
            live = list(self._live.values())
        for request in live:
            if request.deadline is not None and now >= request.deadline:
                self._scheduler.abort(request.request_id, is_deadline=True)

    def _run_burst(
        self, plan: Any, prefill: list[LiveRequest], taking_part: list[LiveRequest]
    ) -> None:
        result = self._attempt(
            (*taking_part, *prefill),
            lambda: self._burst.run(plan, taking_part, prefill, self._scheduler.history),
        )
        if result is None:
            result = BurstResult.empty(0, len(plan.sample_request))
        if not taking_part:
            return
        try:
            self._with_room(lambda: self._scheduler.commit_tokens(*result.drawn))
        except Exception as error:  # of the whole burst: nobody can say for which of them
            broken = set(self._scheduler.give_up())
            for request in (*taking_part, *prefill):
                if request.request_id in broken:
                    request.error = request.error or error

    def _score(self) -> None:
        plan = self._with_room(self._scheduler.plan_scores)
        requests = [self._live[i] for i in plan.request_ids.tolist()]
        if not requests:
            return
        scored = self._attempt(
            requests, lambda: self._scorer.run(plan, requests, self._scheduler.history)
        )
        if scored is None:
            return
        scores, rewards = scored
        begin = 0
        for request, num_rows in zip(requests, plan.num_rows.tolist(), strict=True):
            mine = slice(begin, begin + num_rows)
            begin += num_rows
            if request.error is None and not request.is_scored_late:
                measured = (
                    rewards[mine] if rewards is not None and request.is_scored_by_pair else None
                )
                self._commit_scores(request, scores[mine], measured)

    def _commit_scores(
        self, request: LiveRequest, scores: NDArray[np.float64], rewards: NDArray[Any] | None
    ) -> None:
        try:
            self._scheduler.commit_scores(request.request_id, scores, rewards)
        except Exception as error:  # else it would wait for its scores for ever
            self._fail(request, error)

    def _call_scorer(
        self, request: LiveRequest, scorer: Scorer, inputs: list[ScoreInput]
    ) -> NDArray[np.float64] | None:
        if not request.is_scored_late:
            return call_scorer(scorer, inputs)
        assert self._threads is not None
        self._threads.start(request.request_id, scorer, inputs)
        return None

    def _take_late_scores(self) -> None:
        if self._threads is None or not self._threads.has_calls:
            return
        for request_id, outcome in self._threads.take_ended():
            request = self._live.get(request_id)
            if request is None:
                continue  # it has ended meanwhile
            if isinstance(outcome, BaseException):
                self._fail(request, outcome)
            else:
                self._commit_scores(request, outcome, None)

    def _wait_for_scores(self) -> None:
        """Nothing runs before a scorer is done, a deadline is over, or somebody asks for more."""
        if self._threads is None or not self._threads.has_calls:
            return
        with self._lock:
            deadlines = [r.deadline for r in self._live.values() if r.deadline is not None]
        timeout_s = min([self._threads.deadline, *deadlines]) - time.monotonic()
        self._wake.wait(None if timeout_s == math.inf else max(0.0, timeout_s))

    def _attempt(self, requests: Sequence[LiveRequest], work: Callable[[], T]) -> T | None:
        """What work for these requests gives; None where it raises: they fail. Those with an error
        are ended."""
        result = None
        try:
            self.is_busy = True
            with (
                on_device(self._burst.runners["base"].device),
                torch_threads(self._num_threads),
                torch.inference_mode(),
                torch.profiler.record_function("ivg::step"),
            ):
                result = work()
        except BaseException as error:  # an interrupt too: the books must close first
            for request in requests:
                request.error = error
        finally:
            self.is_busy = False
        for request in requests:
            if request.error is not None:
                self._scheduler.abort(request.request_id)
        return result

    def _collect(self) -> list[Ended]:
        ended: list[Ended] = []
        for request_id in self._scheduler.take_finished():
            request = self._live.pop(request_id)
            if request.is_scored_late and self._threads is not None:
                self._threads.forget(request_id)
            output: RequestOutput | BaseException
            try:
                result = self._scheduler.take_result(request_id)
                output = request.error or request.output(result, self._tokenizer)
            except Exception as error:  # a tokenizer that fails on one text fails no other
                output = error
            ended.append((request_id, output))
        return ended

    def drop(self, request_ids: Container[int]) -> None:
        """Ends requests whose results nobody waits for."""
        for request_id in list(self._live):
            if request_id in request_ids:
                self._scheduler.abort(request_id)
        ended = self.uncollected + self._collect()
        self.uncollected = [end for end in ended if end[0] not in request_ids]
        for request_id in list(self._live):  # an interrupt has lost its result
            if request_id in request_ids:
                del self._live[request_id]

    def close(self) -> None:
        """Lets go of all requests, and of the models' pools, which the block copier holds too."""
        self._live.clear()
        self.uncollected.clear()
        del self._burst
