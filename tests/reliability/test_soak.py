# SPDX-License-Identifier: Apache-2.0
"""The soak in short, and what it would say of an engine that loses requests; the whole of it is
`python -m bench soak`."""

from __future__ import annotations

import pytest

from bench.soak import soak
from ivg_fast.loop import RequestLoop

NUM_REQUESTS = 300


def test_every_request_ends_once_and_nothing_stays() -> None:
    state = soak(NUM_REQUESTS, num_clients=32, seed=1, timeout_s=300)
    seen = {name for name, number in state.outcomes.items() if number}
    assert {"length", "abort", "deadline", "cancelled", "left", "scorer failed"} <= seen
    assert state.num_accepted > 0.9 * NUM_REQUESTS


@pytest.mark.parametrize("times", [0, 2])
def test_a_request_that_does_not_end_once_is_seen(monkeypatch, times: int) -> None:
    """The control: one result is lost, or handed out again."""
    real = RequestLoop.run_step
    spoilt: list[int] = []

    def run_step(loop: RequestLoop) -> list:
        ended = real(loop)
        if ended and not spoilt:
            spoilt.append(ended[0][0])
            return ended[1:] if times == 0 else [ended[0], *ended]
        return ended

    monkeypatch.setattr(RequestLoop, "run_step", run_step)
    with pytest.raises((RuntimeError, TimeoutError)):
        soak(20, num_clients=4, seed=1, timeout_s=5)
