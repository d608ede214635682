# SPDX-License-Identifier: Apache-2.0
"""How a server ends, and `ivg-fast serve`, the command that runs one."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra `server`")
pytest.importorskip("openai", reason="needs the extra `test`")

import requests
import uvicorn
from engine_cases import text_score
from fastapi import FastAPI
from openai import OpenAI
from serving import (
    LONG_BODY,
    make_engine,
    serving,
    text_of,
    wait_until,
)

from ivg_fast import Engine, SearchParams
from ivg_fast.assets import imdb_path
from ivg_fast.server.config import ServerConfig
from ivg_fast.server.serve import make_server


def test_a_server_that_ends_lets_requests_finish(braked) -> None:
    engine = make_engine()
    steps = braked(engine)
    steps.seconds = 0.01
    with serving(engine) as server, ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(server.post, **LONG_BODY, stream=i == 0) for i in range(3)]
        wait_until(lambda: engine.stats()["num_requests_running"] == 3)
        server.stop()
        texts = {text_of(call.result()) for call in calls}
        assert {len(text) > 20 for text in texts} == {True}
        assert len(texts) == 1
        with pytest.raises(requests.exceptions.ConnectionError):
            server.post()
    assert steps.reasons == ["length"] * 3


def test_a_server_that_ends_does_not_wait_for_ever(braked, caplog) -> None:
    """Who is not served to the end is told so: half a response does not look like one."""
    engine = make_engine(max_burst_steps=1, max_stream_steps=1, max_num_rows=3)
    steps = braked(engine)
    steps.seconds = 0.05
    with serving(engine, drain_timeout_s=1) as server, ThreadPoolExecutor(8) as pool:
        streams = [pool.submit(server.post, **LONG_BODY, stream=True) for _ in range(2)]
        wait_until(lambda: engine.stats()["num_requests_running"] == 2)
        wholes = [pool.submit(server.post, **LONG_BODY) for _ in range(2)]
        wait_until(lambda: engine.stats()["num_requests_waiting"] == 1)
        server.stop()
        for call in wholes:
            assert call.result().status_code == 503
            assert call.result().json()["error"]["code"] == "stopped"
        for call in streams:
            *events, last = [line for line in call.result().text.split("\n\n") if line]
            assert len(events) > 3
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "stopped"
    assert steps.reasons == ["abort"] * 4
    assert "Exception in ASGI application" not in caplog.text


@pytest.mark.parametrize("at_once", [False, True])
def test_a_second_interrupt_ends_the_requests(braked, caplog, at_once: bool) -> None:
    engine = make_engine(max_burst_steps=1, max_stream_steps=1)
    steps = braked(engine)
    steps.seconds = 0.05
    with serving(engine, drain_timeout_s=600) as server, ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(server.post, **LONG_BODY, stream=bool(i)) for i in range(2)]
        wait_until(lambda: engine.stats()["num_requests_running"] == 2)
        steps.is_open.clear()
        server.signal(signal.SIGINT)
        if not at_once:
            wait_until(lambda: not answers(server.url))
            assert not any(call.done() for call in calls)
        server.signal(signal.SIGINT)
        steps.is_open.set()
        whole, stream = (call.result() for call in calls)
    assert whole.status_code == 503
    assert '"code":"stopped"' in stream.text
    assert "Traceback" not in caplog.text


def answers(url: str) -> bool:
    try:
        return requests.get(f"{url}/health", timeout=60).ok
    except requests.exceptions.ConnectionError:
        return False


def test_a_server_that_ends_waits_for_no_scorer() -> None:
    """Its candidates are whole, but nobody has ranked them: that is no result."""
    called, released = threading.Event(), threading.Event()

    def hangs(inputs: Any) -> list[float]:
        called.set()
        released.wait()
        return text_score(inputs)

    defaults = SearchParams.best_of_n(2, max_tokens=3, scorer=hangs)
    with (
        serving(make_engine(), defaults=defaults, drain_timeout_s=0) as server,
        ThreadPoolExecutor(2) as pool,
    ):
        calls = [pool.submit(server.post, stream=is_streamed) for is_streamed in (False, True)]
        called.wait()
        wait_until(lambda: server.engine.stats()["num_requests_running"] == 2)
        server.stop()
        whole, stream = (call.result() for call in calls)
        released.set()
    assert whole.status_code == 503
    assert '"code":"stopped"' in stream.text
    assert "[DONE]" not in stream.text


@pytest.mark.skipif(sys.platform == "win32", reason="uvloop has no Windows")
def test_it_runs_on_uvloop() -> None:
    """The event loop that the figures of bench/results are of."""
    server = make_server(FastAPI(), ServerConfig(port=0))
    factory = server.config.get_loop_factory()
    assert factory is not None
    loop = factory()
    loop.close()
    assert type(loop).__module__ == "uvloop"


def test_the_logging_of_the_process_stays(monkeypatch) -> None:
    """A new configuration closes every handler there is, and some close what they write to."""
    configured: list[object] = []
    monkeypatch.setattr("logging.config.dictConfig", configured.append)
    make_server(FastAPI(), ServerConfig(port=0)).config.load()
    assert configured == []
    uvicorn.Config(FastAPI())  # the check of the check: uvicorn's default
    assert len(configured) == 1


@pytest.fixture
def command() -> list[str]:
    base = str(imdb_path() / "base")
    options = "--port 0 --num-blocks 200 --num-threads 1 --max-stream-steps 1 --model-name imdb"
    return [sys.executable, "-m", "ivg_fast.cli", "serve", "--base", base, *options.split()]


def test_the_command_drains_at_sigterm(command: list[str]) -> None:
    patient = ["--drain-timeout-s", "120"]  # a loaded machine may take its time
    environment = {**os.environ, "A_KEY": "key of mine", "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [*command, "--api-key-env", "A_KEY", "--ignore-eos", "--seed", "5", *patient],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            url = line.removeprefix("ivg-fast: serving on ").strip()
            assert url.startswith("http://127.0.0.1:"), line
            client = OpenAI(base_url=f"{url}/v1", api_key="key of mine", max_retries=0)
            stream = iter(
                client.completions.create(
                    model="imdb", prompt="I saw this film", max_tokens=100, stream=True
                )
            )
            chunks = [next(stream)]
            process.send_signal(signal.SIGTERM)
            chunks += list(stream)
            assert chunks[-1].choices[0].finish_reason == "length"
            assert len(chunks[-1].choices[0].ivg["token_ids"]) == 100
            assert process.wait(150) == 0
        finally:
            process.kill()
    params = SearchParams(max_tokens=100, seed=5, ignore_eos=True)
    with Engine.from_pretrained(imdb_path() / "base") as engine:
        (expected,) = engine.generate("I saw this film", params)
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected.outputs[0].text


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ("--port 99999", 2, "port must be an integer"),
        ("--host 192.0.2.1", 1, "assign requested address"),
        ("--api-key-env ABSENT_KEY", 2, "api_key_env must hold a key"),
        ("--method eft", 2, "needs tuned and untuned"),
        ("--max-tokens 9999", 2, "max_tokens must be at most 2048"),
    ],
)
def test_wrong_commands(command: list[str], capsys, options: str, code: int, message: str) -> None:
    from ivg_fast.cli import main

    assert main([*command[3:], *options.split()]) == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("host", ["192.0.2.1", "127.0.0.1"])
def test_a_public_address_without_a_key_is_warned_of(
    command: list[str], caplog, monkeypatch, host: str
) -> None:
    from ivg_fast.cli import main

    def listen(_: object) -> None:
        raise OSError("that is all")

    monkeypatch.setattr("ivg_fast.server.serve.listen", listen)
    assert main([*command[3:], "--host", host]) == 1
    assert ("no API key" in caplog.text) is (host == "192.0.2.1")


def test_no_key_in_the_arguments(capsys) -> None:
    from ivg_fast.cli import build_parser

    with pytest.raises(SystemExit):
        build_parser().parse_args(["serve", "--base", "B", "--api-key", "plain"])
    capsys.readouterr()


def test_without_the_extra(monkeypatch, capsys, command: list[str]) -> None:
    from ivg_fast.cli import main, serve

    monkeypatch.setattr(serve, "_is_there", lambda name: name != "uvicorn")
    assert main(command[3:]) == 1
    assert "needs uvicorn: pip install 'ivg_fast[server]'" in capsys.readouterr().err
    for name in ("fastapi", "uvicorn", "prometheus_client"):  # an import of it raises
        monkeypatch.setitem(sys.modules, name, None)
    for module in ("ivg_fast.server.config", "ivg_fast.cli.serve"):
        monkeypatch.delitem(sys.modules, module)
        importlib.import_module(module)
