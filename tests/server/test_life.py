# SPDX-License-Identifier: Apache-2.0
"""Clients that go away, a full queue, failures, deadlines, metrics."""

from __future__ import annotations

import asyncio
import json
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import pytest

pytest.importorskip("fastapi", reason="needs the extra `server`")
pytest.importorskip("openai", reason="needs the extra `test`")

import requests
from engine_cases import text_score
from openai import APIError, APIStatusError, InternalServerError, RateLimitError
from serving import (
    LONG_BODY,
    MODEL,
    make_engine,
    samples,
    serving,
    text_of,
    wait_until,
)

from ivg_fast import SearchParams

LONG = {"max_tokens": 200, "seed": 3, "extra_body": {"ignore_eos": True}}


def test_a_stream_that_is_left_is_aborted(braked) -> None:
    engine = make_engine(max_stream_steps=1)
    steps = braked(engine)
    steps.seconds = 0.01
    with serving(engine) as server:
        for prompt in ("hello", ["one", "two", "three"]):
            stream = server.client().completions.create(
                model=MODEL, prompt=prompt, stream=True, **LONG
            )
            next(iter(stream))
            assert engine.stats()["num_blocks_used"] > 0
            stream.close()
            server.wait_idle()
        assert steps.reasons == ["abort"] * 4
        assert all(len(output.outputs[0].token_ids) < 200 for output in steps.ended)
        wait_until(lambda: samples(server, "requests_total disconnected") == [2])
        wait_until(lambda: samples(server, "requests_total ok") == [0])


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_client_that_does_not_wait_is_aborted(braked, is_streamed: bool) -> None:
    """Before anything has been decided: a search of one chunk decides nothing before its end."""
    engine = make_engine()
    steps = braked(engine)
    steps.seconds = 0.05
    body = {"model": MODEL, "prompt": "hello", "num_candidates": 3, "stream": is_streamed}
    with serving(engine) as server:
        url = f"{server.url}/v1/completions"
        with pytest.raises(requests.exceptions.RequestException, match="Read timed out"):
            requests.post(url, json=body | LONG_BODY, timeout=0.3)
        server.wait_idle()
        assert steps.reasons == ["abort"]
        wait_until(lambda: samples(server, "requests_total disconnected") == [1])


def test_a_client_that_leaves_inside_its_body() -> None:
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{"
    with serving(make_engine()) as server:
        address = urlsplit(server.url)
        with socket.create_connection((address.hostname, address.port)) as connection:
            connection.sendall(head.encode())
            requests.get(f"{server.url}/health", timeout=60)  # it has been read by then
        counters = ("requests_total disconnected", "requests_total invalid")
        wait_until(lambda: samples(server, *counters) == [1, 0])


@pytest.mark.parametrize("is_gone_at_once", [False, True])
def test_a_stream_that_nobody_begins_to_read_ends(is_gone_at_once: bool) -> None:
    """A client may go between the acceptance of its request and the first event."""
    from ivg_fast.server.endpoints import _EventStream

    seen: list[str] = []

    async def events():
        seen.append("begun")
        yield b""
        await asyncio.sleep(3600)

    async def end() -> None:
        seen.append("ended")

    async def receive() -> dict[str, str]:
        if not is_gone_at_once:
            await asyncio.sleep(0.01)
        return {"type": "http.disconnect"}

    async def send(_: object) -> None:
        await asyncio.sleep(0)

    scope = {"type": "http", "asgi": {"spec_version": "2.3"}}
    asyncio.run(asyncio.wait_for(_EventStream(events(), end)(scope, receive, send), 60))
    assert seen == (["ended"] if is_gone_at_once else ["begun", "ended"])


def test_those_who_stay_never_notice(braked) -> None:
    with make_engine() as alone:
        (expected,) = alone.generate("hello", SearchParams(max_tokens=40, seed=1))
    engine = make_engine(max_stream_steps=1)
    braked(engine).seconds = 0.002
    with serving(engine) as server, ThreadPoolExecutor(8) as pool:
        stays = [pool.submit(server.post, max_tokens=40, seed=1) for _ in range(4)]
        for _ in range(4):
            stream = server.client().completions.create(
                model=MODEL, prompt="x", stream=True, **LONG
            )
            next(iter(stream))
            stream.close()
        texts = {stay.result().json()["choices"][0]["text"] for stay in stays}
        assert texts == {expected.outputs[0].text}


def test_overload_sheds_at_once_and_what_was_accepted_finishes(braked) -> None:
    with make_engine() as alone:
        (expected,) = alone.generate("hello", SearchParams(max_tokens=12, seed=1))
    engine = make_engine(max_queued_requests=3)
    steps = braked(engine)
    with serving(engine, retry_after_s=7) as server, ThreadPoolExecutor(32) as pool:
        steps.is_open.clear()
        calls = [pool.submit(server.post, seed=1, stream=i % 2 == 0) for i in range(24)]
        wait_until(lambda: sum(call.done() for call in calls) == 21)  # no step has run since
        assert steps.num_waits == 1
        shed = [call.result() for call in calls if call.done()]
        for response in shed:
            assert response.status_code == 429
            assert response.headers["retry-after"] == "7"
            assert response.json()["error"]["code"] == "queue_full"
        with pytest.raises(RateLimitError, match="max_queued_requests"):
            server.client().completions.create(model=MODEL, prompt="x")
        # Some would fit, all would not: none is accepted.
        assert server.post(prompt=["a"] * 4, stream=True).status_code == 429
        steps.is_open.set()
        texts = [text_of(c.result()) for c in calls if c.result() not in shed]
        assert texts == [expected.outputs[0].text] * 3
        counters = ("requests_total overloaded", "requests_total ok")
        wait_until(lambda: samples(server, *counters) == [23, 3])


def picky(inputs: Any) -> list[float]:
    if "bad" in inputs[0].prompt:
        raise ValueError("no")
    return text_score(inputs)


def test_a_request_that_fails_leaves_the_others() -> None:
    defaults = SearchParams.cbs(max_tokens=12, chunk_length=4, scorer=picky, seed=1)
    with make_engine() as alone:
        expected = alone.generate("fine", defaults)[0].outputs[0].text
    with serving(make_engine(), defaults=defaults) as server, ThreadPoolExecutor(8) as pool:
        fine = [pool.submit(server.post, prompt="fine", stream=i == 0) for i in range(3)]
        with pytest.raises(InternalServerError, match="scorer picky raised ValueError"):
            server.client().completions.create(model=MODEL, prompt="bad")
        stream = server.client().completions.create(model=MODEL, prompt="bad", stream=True)
        with pytest.raises(APIError, match="scorer picky raised ValueError"):
            list(stream)
        # One of several prompts takes the request with it, and nothing else.
        with pytest.raises(InternalServerError, match="picky"):
            server.client().completions.create(model=MODEL, prompt=["fine", "bad", "fine"])
        assert [text_of(call.result()) for call in fine] == [expected] * 3
        wait_until(lambda: samples(server, "requests_total failed", "requests_total ok") == [3, 3])


def test_an_unknown_failure_says_nothing_of_itself(monkeypatch) -> None:
    with serving(make_engine()) as server:

        def create(*_: Any) -> None:
            raise OSError("/secret/place")

        monkeypatch.setattr(server.engine._factory, "create", create)
        with pytest.raises(InternalServerError) as caught:
            server.client().completions.create(model=MODEL, prompt="x")
        assert caught.value.code == "internal_error"
        assert "secret" not in str(caught.value)


def test_a_response_that_cannot_be_written_has_failed(monkeypatch) -> None:
    """A token's own text, for the log-probabilities, when all has been decoded."""

    def fails(*_: Any) -> str:
        raise UnicodeError("planted")

    with serving(make_engine()) as server:
        monkeypatch.setattr("ivg_fast.server.responses.decode_piece", fails)
        assert server.post(logprobs=0).status_code == 500
        assert '"code":"internal_error"' in server.post(logprobs=0, stream=True).text
        wait_until(lambda: samples(server, "requests_total failed", "requests_total ok") == [2, 0])


def test_an_engine_whose_thread_fails(braked) -> None:
    engine = make_engine()
    steps = braked(engine)
    with serving(engine) as server:
        steps._step = None  # type: ignore[assignment]
        for _ in range(2):
            with pytest.raises(APIStatusError) as caught:
                server.client().completions.create(model=MODEL, prompt="x")
            assert caught.value.status_code == 503
            assert caught.value.code == "stopped"
        response = requests.get(f"{server.url}/health", timeout=60)
        assert (response.status_code, response.json()) == (503, {"status": "stopped"})
        assert requests.get(f"{server.url}/metrics", timeout=60).status_code == 200


def test_a_deadline_returns_what_there_is(braked) -> None:
    engine = make_engine(max_burst_steps=2)
    braked(engine).seconds = 0.02
    with serving(engine) as server:
        for is_streamed in (False, True):
            got = server.post(**LONG_BODY, deadline_s=0.3, stream=is_streamed)
            text = text_of(got)
            last = got.text.split("\n\n")[-3].removeprefix("data: ") if is_streamed else got.text
            (choice,) = json.loads(last)["choices"]
            assert choice["finish_reason"] == "length"
            assert choice["ivg"]["finish_reason"] == "deadline"
            assert 0 < len(text) < 200
        wait_until(lambda: samples(server, "request_success_total deadline") == [2])


def test_metrics(braked) -> None:
    engine = make_engine()
    steps = braked(engine)
    with serving(engine) as server, ThreadPoolExecutor(8) as pool:
        wait_until(lambda: samples(server, "num_requests_running", "kv_cache_usage_perc") == [0, 0])
        steps.is_open.clear()
        calls = [pool.submit(server.post, prompt="abcde", seed=i) for i in range(3)]
        wait_until(lambda: samples(server, "num_requests_waiting") == [3])
        steps.seconds = 0.05
        steps.is_open.set()
        wait_until(lambda: samples(server, "num_requests_running") == [3])
        blocks = engine.stats()["num_blocks_used"]
        assert not blocks or samples(server, "kv_cache_usage_perc")[0] <= blocks / 600 + 0.1
        bodies = [call.result().json() for call in calls]
        steps.seconds = 0.0
        streamed = server.post(prompt="abc", stream=True, max_tokens=9, ignore_eos=True)
        assert streamed.status_code == 200
        assert server.post(max_tokens=0).status_code == 400
        assert server.post(max_tokens="x").status_code == 400
        wait_until(lambda: samples(server, "requests_total ok") == [4])
        found = server.metrics()
        counted = {
            name: found[f"ivg_{name}_total"] for name in ("prompt_tokens", "generation_tokens")
        }
        used = sum(body["usage"]["completion_tokens"] for body in bodies)
        assert counted == {"prompt_tokens": 18, "generation_tokens": used + 9}
        reasons = [body["choices"][0]["finish_reason"] for body in bodies] + ["length"]
        for reason in set(reasons):
            assert found[f"ivg_request_success_total {reason}"] == reasons.count(reason)
        assert found["ivg_requests_total ok"] == found["ivg_e2e_request_latency_seconds_count"] == 4
        assert found["ivg_requests_total invalid"] == 2
        assert found["ivg_time_to_first_token_seconds_count"] == 1
        events = [line for line in streamed.text.split("\n\n") if '"text":""' not in line]
        assert found["ivg_inter_token_latency_seconds_count"] == len(events) - 3
        assert found["ivg_e2e_request_latency_seconds_sum"] > 0.05
        assert found["ivg_event_loop_delay_seconds_count"] > 0
