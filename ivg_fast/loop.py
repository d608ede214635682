# SPDX-License-Identifier: Apache-2.0
"""RequestLoop: the scheduler's plans, run for live requests; closes the books when something
fails."""

from __future__ import annotations

import time
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ivg_fast.burst import BurstRunner
from ivg_fast.draws import BurstResult
from ivg_fast.outputs import RequestOutput
from ivg_fast.params import EngineConfig
from ivg_fast.request import LiveRequest
from ivg_fast.scoring import ChunkScorer

# A request that has ended: its id, and its output or what it failed with.
Ended = tuple[int, RequestOutput | BaseException]


class RequestLoop:
    """Takes requests, runs them burst by burst, and hands out what has ended.

    Args:
        scheduler: the C++ scheduler.
        burst, scorer: execute its plans.
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
        scorer: ChunkScorer,
        tokenizer: Any,
        config: EngineConfig,
    ) -> None:
        self._scheduler = scheduler
        self._burst = burst
        self._scorer = scorer
        self._tokenizer = tokenizer
        self._num_threads = config.num_threads
        self._max_queued = config.max_queued_requests
        self._live: dict[int, LiveRequest] = {}
        self.uncollected: list[Ended] = []
        self.is_busy = False

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
        request.request_id = self._scheduler.add_request(**request.spec())
        self._live[request.request_id] = request
        return request.request_id

    def step(self) -> list[Ended]:
        """Runs one burst and the scoring behind it; what has ended since the last call."""
        ended, self.uncollected = self.uncollected, []
        try:
            return ended + self.run_step()
        except BaseException:
            self.uncollected = ended + self.uncollected
            raise

    def run_step(self) -> list[Ended]:
        """Like `step`, but leaves alone what waits from before."""
        now = time.monotonic()
        for request in self._live.values():
            if request.deadline is not None and now >= request.deadline:
                self._scheduler.abort(request.request_id, is_deadline=True)
        plan = self._scheduler.plan()
        prefill = [self._live[i] for i in plan.prefill_request_ids.tolist()]
        taking_part = [self._live[i] for i in plan.request_ids.tolist()]
        result = BurstResult.empty(0, len(plan.sample_request))
        with self._failing((*taking_part, *prefill)):
            result = self._burst.run(plan, taking_part, prefill, self._scheduler.history)
        if taking_part:
            self._scheduler.commit_tokens(
                result.tokens,
                result.logprobs,
                result.base_logprobs,
                result.rewards,
                result.num_tokens,
                result.finish,
                result.stop_index,
            )
        self._score()
        ended = self._collect()
        for _, output in ended:
            if not isinstance(output, RequestOutput | Exception):
                self.uncollected += ended
                raise output
        return ended

    def _score(self) -> None:
        plan = self._scheduler.plan_scores()
        requests = [self._live[i] for i in plan.request_ids.tolist()]
        if not requests:
            return
        scores, rewards = np.empty(0), None
        with self._failing(requests):
            scores, rewards = self._scorer.run(plan, requests, self._scheduler.history)
        begin = 0
        for request, num_rows in zip(requests, plan.num_rows.tolist(), strict=True):
            mine = slice(begin, begin + num_rows)
            begin += num_rows
            if request.error is None:
                measured = (
                    rewards[mine] if rewards is not None and request.is_scored_by_pair else None
                )
                self._scheduler.commit_scores(request.request_id, scores[mine], measured)

    @contextmanager
    def _failing(self, requests: Sequence[LiveRequest]) -> Iterator[None]:
        """Work for these requests: where it raises, they fail; those with an error are ended."""
        self.is_busy = True
        try:
            with (
                _torch_threads(self._num_threads),
                torch.inference_mode(),
                torch.profiler.record_function("ivg::step"),
            ):
                yield
        except BaseException as error:  # an interrupt too: the books must close first
            for request in requests:
                request.error = error
        self.is_busy = False
        for request in requests:
            if request.error is not None:
                self._scheduler.abort(request.request_id)

    def _collect(self) -> list[Ended]:
        ended: list[Ended] = []
        for request_id in self._scheduler.take_finished():
            result = self._scheduler.take_result(request_id)
            request = self._live.pop(request_id)
            output: RequestOutput | BaseException | None = request.error
            if output is None:
                try:
                    output = request.output(result, self._tokenizer)
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

    def close(self) -> None:
        """Lets go of the models' pools, which the block copier holds too."""
        del self._burst


@contextmanager
def _torch_threads(num_threads: int | None) -> Iterator[None]:
    """Models and kernels of this thread run on `num_threads` threads; None: leaves it as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
