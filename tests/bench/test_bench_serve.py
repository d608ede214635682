# SPDX-License-Identifier: Apache-2.0
"""The load that `python -m bench serve` makes, against a server of which everything is known."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs the extra `server`")

sys.path.append(str(Path(__file__).parents[1] / "server"))

from serving import make_engine, serving

from bench import http_load, run, serve
from bench.http_load import Answer, ask, closed_loop, open_loop, quantile_bound
from bench.idle_loop import idle_loop
from ivg_fast import SearchParams

BODY = {"prompt": "hello", "seed": 1, "max_tokens": 12, "ignore_eos": True}


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(http_load, "MODEL", "tiny")
    with serving(make_engine(max_queued_requests=50)) as server:
        yield server


def port_of(server) -> int:
    return int(server.url.rsplit(":", 1)[1])


def test_what_a_client_sees(server) -> None:
    answer = asyncio.run(ask(port_of(server), BODY))
    assert (answer.status, answer.is_whole, len(answer.arrivals)) == (200, True, 3)
    assert answer.arrivals == sorted(answer.arrivals)
    assert answer.arrivals[-1] <= answer.seconds
    refused = asyncio.run(ask(port_of(server), BODY | {"beam_width": 0}))
    assert (refused.status, refused.is_whole, refused.arrivals) == (400, False, [])


def test_loops_ask_as_often_as_they_say(server) -> None:
    bodies = iter([BODY | {"seed": i} for i in range(30)])
    answers, seconds = asyncio.run(closed_loop(port_of(server), 4, 10, bodies))
    assert len(answers) == 10
    assert all(answer.is_whole and answer.seconds <= seconds for answer in answers)
    answers, seconds = asyncio.run(open_loop(port_of(server), 50.0, 10, bodies))
    assert len(answers) == 10
    assert seconds >= 9 / 50
    assert server.metrics()["ivg_requests_total ok"] == 20


def test_a_level_and_an_overload(server, capsys) -> None:
    options = run.parser_of(None).parse_args(["--threads", "1", "--quick"])
    found = run.Run("serve", options, ["--threads", "1"], num_rounds=(4, 4))
    watched = serve.UnderLoad(port_of(server), "tiny", lambda: [0.001] * 998 + [0.003] * 2, 0.5)
    begin = time.perf_counter()
    rate = serve.level(found, watched, "base", 2, 9, 4)
    assert time.perf_counter() - begin >= 0.5
    serve.overload(found, port_of(server), "base", rate, 9, 0.1)
    metrics = {record.metric: record for record in found.records if "overload" not in record.kernel}
    assert metrics["throughput"].y_50 == pytest.approx(rate * 9, rel=1e-3)
    assert metrics["end to end"].y_80 <= metrics["end to end, p99"].y_50
    assert metrics["event loop delay, p99.9"].y_50 > 0
    assert metrics["idle loop delay, p99.9"].y_50 == 3.0
    shed = [record for record in found.records if record.metric == "shed"]
    assert 0 <= shed[0].y_50 <= 100
    assert "accepted and finished" in capsys.readouterr().out


def test_an_idle_process_is_watched() -> None:
    with idle_loop() as delays:
        time.sleep(0.5)
        found = delays()
        assert 2 <= len(found) <= 50 + 5
        assert min(found) >= 0
        assert len(delays()) <= 5


def test_newcomers_among_searches(server) -> None:
    times = asyncio.run(serve.join_times(port_of(server), 24, 2))
    assert len(times) == 2
    assert min(times) > 0
    server.wait_idle()  # those that kept it at work have been aborted
    assert server.metrics()["ivg_requests_total ok"] >= 3


def test_searches_are_parameters() -> None:
    for search in serve.SEARCHES.values():
        body = next(serve.bodies_of(search, 5))
        SearchParams(**{name: value for name, value in body.items() if name != "prompt"})


def test_quantiles_and_times() -> None:
    before = {0.001: 10.0, 0.01: 20.0, 0.1: 30.0, float("inf"): 30.0}
    after = {0.001: 910.0, 0.01: 1018.0, 0.1: 1029.0, float("inf"): 1030.0}
    # 1,000 between: 900 below 1 ms, 998 below 10 ms, 999 below 100 ms.
    assert [quantile_bound(before, after, q) for q in (0.5, 0.95, 0.999)] == [0.001, 0.01, 0.1]
    answer = Answer(200, [1.0, 3.0, 4.0, 6.0], 6.0, True)
    assert serve.between_tokens(answer, 8) == [1.0, 0.5, 1.0]
