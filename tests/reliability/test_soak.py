# SPDX-License-Identifier: Apache-2.0
"""The soak in short, and what it would say of an engine that loses requests; the whole of it is
`python -m bench soak`."""

from __future__ import annotations

import random

import pytest

from bench import soak as command
from bench.soak import MIN_JUDGED, Soak, soak
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


@pytest.mark.parametrize("num_requests", [MIN_JUDGED - 1, MIN_JUDGED])
@pytest.mark.parametrize("last_mb", [107.0, 109.0])
def test_growing_memory_fails_a_long_run(
    monkeypatch, capsys, num_requests: int, last_mb: float
) -> None:
    """A short one only warms up the allocators."""
    state = Soak(num_requests, random.Random(0), rss_mb=[40.0, 80.0, 100.0, *[last_mb] * 7])
    monkeypatch.setattr(command, "soak", lambda *_: state)
    monkeypatch.setattr("sys.argv", ["soak", f"--requests={num_requests}"])
    if num_requests < MIN_JUDGED or last_mb == 107.0:
        command.main()
    else:
        with pytest.raises(SystemExit, match=r"grown by 9\.0 MB"):
            command.main()
    assert ("not judged" in capsys.readouterr().err) == (num_requests < MIN_JUDGED)
