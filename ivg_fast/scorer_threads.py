# SPDX-License-Identifier: Apache-2.0
"""Calls of a user's scorer that may not take for ever."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray

from ivg_fast.errors import ScorerError
from ivg_fast.models.text_value import TextValueModel
from ivg_fast.models.values import call_scorer
from ivg_fast.params import ScoreInput, Scorer

# A scorer that hangs once hangs again: so many threads are left behind, and no more.
MAX_ABANDONED = 8


class ScorerThreads:
    """Runs each call of a scorer on a thread of its own, and waits so long and no longer.

    A thread cannot be stopped: one that is late goes on by itself, and what it returns is lost. It
    must not touch the engine then. The threads do not keep the process from ending. A
    TextValueModel cannot hang, and its memory of texts has no lock: it runs on the caller's thread.

    Args:
        timeout_s: seconds to wait for one call.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._abandoned: list[threading.Thread] = []

    @property
    def num_abandoned(self) -> int:
        """Calls that are late and still at work."""
        self._abandoned = [thread for thread in self._abandoned if thread.is_alive()]
        return len(self._abandoned)

    def call(self, scorer: Scorer, inputs: Sequence[ScoreInput]) -> NDArray[Any]:
        """Like `call_scorer`.

        Raises:
            ScorerError: as there; or it took too long, or too many late calls are at work already.
        """
        if isinstance(scorer, TextValueModel):
            return call_scorer(scorer, list(inputs))
        name = getattr(scorer, "__name__", type(scorer).__name__)
        if self.num_abandoned >= MAX_ABANDONED:
            raise ScorerError(
                f"scorer {name} is not called: {MAX_ABANDONED} late calls are still at work"
            )
        call = _Call(scorer, list(inputs))
        call.start()
        try:
            call.join(self._timeout_s)
        finally:  # an interrupt leaves it behind too
            if call.is_alive():
                self._abandoned.append(call)
        if call.is_alive():
            raise ScorerError(
                f"scorer {name} took longer than scorer_timeout_s = {self._timeout_s}"
            )
        if call.error is not None:
            raise call.error
        assert call.scores is not None
        return call.scores


class _Call(threading.Thread):
    """One call, under the settings of the thread that makes it."""

    def __init__(self, scorer: Scorer, inputs: list[ScoreInput]) -> None:
        super().__init__(name="ivg-scorer", daemon=True)
        self._scorer, self._inputs = scorer, inputs
        self._num_threads = torch.get_num_threads()
        self.scores: NDArray[Any] | None = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            torch.set_num_threads(self._num_threads)
            with torch.inference_mode():
                self.scores = call_scorer(self._scorer, self._inputs)
        except BaseException as error:  # the waiting thread raises it
            self.error = error
