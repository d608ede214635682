# SPDX-License-Identifier: Apache-2.0
"""An interrupt at every line of a step: it comes out, the books are closed, the engine goes on."""

from __future__ import annotations

import itertools
import sys
import threading
from types import FrameType
from typing import Any

import pytest
from engine_cases import Family, text_score
from faults import PROMPTS, make_engine, said, searched

from ivg_fast import SearchParams
from ivg_fast.loop import RequestLoop

FAMILY = Family("llama", seed=5, eos_token_id=7)
# Of a step, all that runs before its results are handed out.
PARTS = (
    "_end_overdue",
    "_take_late_scores",
    "_run_plan",
    "_with_room",
    "_run_burst",
    "_score",
    "_attempt",
    "_commit_scores",
    "_call_scorer",
)
CODES = {getattr(RequestLoop, name).__code__ for name in PARTS}


class Interrupt:
    """Raises KeyboardInterrupt before the k-th line that runs."""

    def __init__(self, at: int) -> None:
        self.at, self.num_lines = at, 0

    def __enter__(self) -> Interrupt:
        self.before = sys.gettrace()
        sys.settrace(self.on_call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.before)

    def on_call(self, frame: FrameType, event: str, arg: Any) -> Any:
        return self.on_line if frame.f_code in CODES else None

    def on_line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            self.num_lines += 1
            if self.num_lines == self.at:
                raise KeyboardInterrupt
        return self.on_line


@pytest.mark.parametrize("is_threaded", [False, True])
def test_an_interrupt_at_any_line_of_a_step(is_threaded: bool) -> None:
    params = [
        searched(text_score, max_tokens=4),
        SearchParams(max_tokens=3, ignore_eos=True, deadline_s=60.0),
    ]
    ran = threading.Event()
    with make_engine(FAMILY, scorer_timeout_s=60.0 if is_threaded else None) as engine:
        alone = [said(o) for o in engine.generate(PROMPTS[:2], params, seeds=[1, 2])]
        for k in itertools.count(1):
            waiting = engine.add_request(PROMPTS[2], params[1], seed=3)
            try:
                with Interrupt(k):
                    outputs = engine.generate(PROMPTS[:2], params, seeds=[1, 2])
            except KeyboardInterrupt:
                assert not ran.is_set()
            else:
                ran.set()
                assert [said(output) for output in outputs] == alone
            engine.check_integrity()
            ended: dict[int, Any] = {}
            while engine.has_unfinished:
                ended.update(engine.step())
            assert set(ended) == {waiting}
            assert engine.stats()["num_blocks_used"] == 0
            if ran.is_set():
                break
        outputs = engine.generate(PROMPTS[:2], params, seeds=[1, 2])
        assert [said(output) for output in outputs] == alone
    assert k > 100
