# SPDX-License-Identifier: Apache-2.0
"""Calls of users' scorers on threads of their own, beside the engine's."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from numpy.typing import NDArray

from ivg_fast.errors import ScorerError
from ivg_fast.models.values import call_scorer
from ivg_fast.params import ScoreInput, Scorer

MAX_AT_WORK = 16
# A scorer that hangs once hangs again: nothing is called while so many are late and still at work.
MAX_ABANDONED = 8


class ScorerThreads:
    """Runs each call of a scorer on a thread; the engine's asks what has ended and waits for none.

    MAX_AT_WORK calls run at a time, late ones counted, and one of each scorer, which need not be
    thread-safe; the others follow in order. A thread cannot be stopped: one that is late goes on by
    itself, and what it returns is lost. It must not touch the engine then. The threads do not keep
    the process from ending. Not thread-safe itself: all methods are for the engine's thread,
    `is_current` apart.

    Args:
        timeout_s: seconds that a call may take once it runs; None: as long as it takes.
        wake: called, on any thread, when a call has ended.
    """

    def __init__(self, timeout_s: float | None, wake: Callable[[], None]) -> None:
        self._timeout_s = timeout_s
        self._wake = wake
        self._waiting: dict[int, _Call] = {}
        self._at_work: list[_Call] = []
        self._refused: list[tuple[int, BaseException]] = []
        self._abandoned: list[_Call] = []

    def start(self, request_id: int, scorer: Scorer, inputs: list[ScoreInput]) -> None:
        """Calls the scorer as soon as its turn comes; a request has one call at a time."""
        self._waiting[request_id] = _Call(self, request_id, scorer, inputs)
        self._start_next()

    def take_ended(self) -> list[tuple[int, NDArray[Any] | BaseException]]:
        """What has ended since the last time: (request id, scores as of `call_scorer`, or what it
        raised; a ScorerError where it was too late, or not called because too many are).
        """
        now = time.monotonic()
        ended: list[tuple[int, NDArray[Any] | BaseException]] = []
        at_work = []
        for call in self._at_work:
            if call.outcome is not None:
                ended.append((call.request_id, call.outcome))
            elif now >= call.deadline:
                self._abandoned.append(call)
                late = f"took longer than scorer_timeout_s = {self._timeout_s}"
                ended.append((call.request_id, ScorerError(f"scorer {call.scorer_name} {late}")))
            else:
                at_work.append(call)
        self._at_work = at_work
        self._start_next()
        ended += self._refused
        self._refused = []
        return ended

    def forget(self, request_id: int) -> None:
        """The request has ended: its call is not made if it has not begun."""
        self._waiting.pop(request_id, None)

    @property
    def has_calls(self) -> bool:
        """Whether any call is at work or has to be."""
        return bool(self._at_work or self._waiting or self._refused)

    @property
    def deadline(self) -> float:
        """When the first call at work will be too late, by time.monotonic."""
        return min((call.deadline for call in self._at_work), default=float("inf"))

    @property
    def num_abandoned(self) -> int:
        """Calls that are late and still at work."""
        self._abandoned = [thread for thread in self._abandoned if thread.is_alive()]
        return len(self._abandoned)

    def is_current(self) -> bool:
        """Whether a scorer of these asks."""
        thread = threading.current_thread()
        return isinstance(thread, _Call) and thread.owner is self

    def _start_next(self) -> None:
        busy = {call.key for call in self._at_work}
        for request_id, call in list(self._waiting.items()):
            num_abandoned = self.num_abandoned
            if num_abandoned < MAX_ABANDONED:
                if len(self._at_work) + num_abandoned >= MAX_AT_WORK:
                    return
                if call.key in busy:
                    continue
            del self._waiting[request_id]
            if num_abandoned >= MAX_ABANDONED:
                reason = f"{MAX_ABANDONED} late calls are still at work"
                error = ScorerError(f"scorer {call.scorer_name} is not called: {reason}")
                self._refused.append((request_id, error))
                continue
            if self._timeout_s is not None:
                call.deadline = time.monotonic() + self._timeout_s
            try:
                call.start()
            except Exception as cause:  # the system has no thread left
                error = ScorerError(f"scorer {call.scorer_name} is not called: {cause}")
                error.__cause__ = cause
                self._refused.append((request_id, error))
                continue
            busy.add(call.key)
            self._at_work.append(call)

    def call_has_ended(self) -> None:
        self._wake()


class _Call(threading.Thread):
    """One call, under the settings of the thread that makes it.

    Attributes:
        key: calls of equal key do not run together: a scorer, or the object whose method it is.
        outcome: scores, or what was raised; None: at work.
    """

    def __init__(
        self, owner: ScorerThreads, request_id: int, scorer: Scorer, inputs: list[ScoreInput]
    ) -> None:
        super().__init__(name="ivg-scorer", daemon=True)
        self.owner = owner
        self.request_id = request_id
        self.key = id(getattr(scorer, "__self__", scorer))
        self.deadline = float("inf")
        self.outcome: NDArray[Any] | BaseException | None = None
        self._scorer, self._inputs = scorer, inputs
        self._num_threads = torch.get_num_threads()

    @property
    def scorer_name(self) -> str:
        return getattr(self._scorer, "__name__", type(self._scorer).__name__)

    def run(self) -> None:
        try:
            torch.set_num_threads(self._num_threads)
            with torch.inference_mode():
                self.outcome = call_scorer(self._scorer, self._inputs)
        except BaseException as error:  # the engine's thread raises it
            self.outcome = error
        self.owner.call_has_ended()
