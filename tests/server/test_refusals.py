# SPDX-License-Identifier: Apache-2.0
"""What a server refuses: the status, the field that is named, the form of the body; the key."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra `server`")
pytest.importorskip("openai", reason="needs the extra `test`")

import requests
from openai import AuthenticationError, BadRequestError
from serving import DEFAULTS, MODEL, Server, make_engine, serving
from tiny_models import tiny_model, tiny_tokenizer

from ivg_fast import AsyncEngine, Engine, EngineConfig, InvalidParameterError, SearchParams
from ivg_fast.server.app import create_app
from ivg_fast.server.config import ServerConfig
from ivg_fast.server.serve import read_key

KEY = "s3cret-key"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    caps = {"max_rows": 8, "max_response_tokens": 50, "max_body_bytes": 4000, "max_stops": 3}
    with serving(make_engine(max_prompt_tokens=30), **caps) as server:
        yield server


def error_of(response: requests.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


# body beside model and prompt -> the field that is named, what is said
INVALID: list[tuple[dict[str, Any], str, str]] = [
    # by SearchParams itself
    ({"max_tokens": 0}, "max_tokens", "must be an integer in [1, "),
    ({"beam_width": -1}, "beam_width", "got -1"),
    ({"num_candidates": 0}, "num_candidates", "got 0"),
    ({"chunk_length": 0}, "chunk_length", "got 0"),
    ({"beam_width": 2, "chunk_length": 3}, "scorer", "must be given where chunks"),
    ({"temperature": -0.1}, "temperature", "got -0.1"),
    ({"temperature": 0, "n": 2}, "temperature", "identical clones"),
    ({"top_p": 0}, "top_p", "got 0"),
    ({"top_p": 1.5}, "top_p", "got 1.5"),
    ({"top_k": -2}, "top_k", "got -2"),
    ({"min_p": 2}, "min_p", "got 2"),
    ({"min_tokens": 99}, "min_tokens", "at most max_tokens"),
    ({"guidance_weight": 1e9}, "guidance_weight", "got 1000000000"),
    ({"seed": -1}, "seed", "got -1"),
    ({"seed": 2**64}, "seed", "18446744073709551616"),
    ({"n": 3, "beam_width": 1}, "n", "at most beam_width * num_candidates = 1"),
    ({"deadline_s": -1}, "deadline_s", "got -1"),
    ({"stop": [""]}, "stop", "non-empty"),
    ({"stop_token_ids": [97]}, "stop_token_ids", "below 97"),
    # by their types
    ({"beam_width": "4"}, "beam_width", "valid integer"),
    ({"beam_width": 2.0}, "beam_width", "valid integer"),
    ({"max_tokens": True}, "max_tokens", "valid integer"),
    ({"temperature": "hot"}, "temperature", "valid number"),
    ({"guidance": "strong"}, "guidance", "'none', 'implicit' or 'explicit'"),
    ({"scorer": "os:system"}, "scorer", "'none', 'implicit' or 'explicit'"),
    ({"stop": 3}, "stop", "valid string"),
    ({"ignore_eos": 1}, "ignore_eos", "valid boolean"),
    ({"stream": "yes"}, "stream", "valid boolean"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options", "not permitted"),
    ({"beams": 4}, "beams", "not permitted"),
    ({"prompt": "x\ud800"}, "prompt", "halves of characters"),
    ({"stop": "x\ud800"}, "stop", "halves of characters"),
    ({"prompt": None}, "prompt", "valid"),
    ({"prompt": []}, "prompt", "must hold a prompt"),
    ({"prompt": ""}, "prompt", "must have a token"),
    ({"prompt": ["x", ""]}, "prompt", "must have a token"),
    ({"prompt": [[]]}, "prompt", "must have a token"),
    ({"prompt": [97]}, "prompt", "in [0, 97)"),
    ({"prompt": [-1]}, "prompt", "in [0, 97)"),
    ({"prompt": [2**70]}, "prompt", "token ids"),
    ({"prompt": ["x", 3]}, "prompt", "valid"),
    ({"prompt": {"base": "x"}}, "prompt", "valid"),
    # what OpenAI has and this server has not
    ({"frequency_penalty": 0.5}, "frequency_penalty", "not supported"),
    ({"presence_penalty": -1}, "presence_penalty", "not supported"),
    ({"logit_bias": {"5": 10}}, "logit_bias", "not supported"),
    ({"echo": True}, "echo", "not supported"),
    ({"suffix": "end"}, "suffix", "not supported"),
    ({"best_of": 3}, "best_of", "best_of must be n here, got 3"),
    ({"logprobs": 3}, "logprobs", "those of other tokens"),
    # caps
    ({"max_tokens": 51}, "max_tokens", "at most 50, got 51"),
    ({"num_candidates": 9}, "beam_width", "= 9 must be at most 8"),
    ({"num_candidates": 5, "prompt": ["x", "y"]}, "beam_width", "= 10 must be at most 8"),
    ({"n": 9}, "beam_width", "= 9 must be at most 8"),
    ({"stop": ["a", "b", "c", "d"]}, "stop", "at most 3 strings, got 4"),
]


@pytest.mark.parametrize(("body", "param", "message"), INVALID)
def test_completions_that_are_refused(
    server: Server, body: dict[str, Any], param: str, message: str
) -> None:
    body = {"model": MODEL, "prompt": "hello", **body}
    for is_streamed in (False, True):
        sent = body if not is_streamed else {"stream": True, **body}
        if is_streamed and body.get("stream_options"):
            continue
        response = requests.post(
            f"{server.url}/v1/completions",
            data=json.dumps(sent),
            headers={"Content-Type": "application/json"},
            timeout=60,
        )
        error = error_of(response, 400)
        assert error["param"] == param
        assert message in error["message"]
        assert error["type"] == "invalid_request_error"


USER = [{"role": "user", "content": "x"}]
INVALID_CHATS: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": []}, "messages", "at least 1 item"),
    ({"messages": "x"}, "messages", "valid list"),
    ({"messages": [{"role": "user"}]}, "messages", "messages.0.content"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "messages.0.role"),
    ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages", "not permitted"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages",
        "'text'",
    ),
    ({"messages": USER}, "messages", "need a chat template in the tokenizer of base"),
    ({"messages": USER, "max_completion_tokens": 0}, "max_completion_tokens", "got 0"),
    ({"messages": USER, "max_completion_tokens": 51}, "max_completion_tokens", "got 51"),
    (
        {"messages": USER, "max_completion_tokens": 5, "max_tokens": 5},
        "max_completion_tokens",
        "without max_tokens",
    ),
    ({"messages": USER, "tools": [{"type": "function"}]}, "tools", "not supported"),
    ({"messages": USER, "tool_choice": "required"}, "tool_choice", "not supported"),
    ({"messages": USER, "response_format": {"type": "json_object"}}, "response_format", "text"),
    ({"messages": USER, "top_logprobs": 3, "logprobs": True}, "top_logprobs", "not supported"),
    ({"messages": USER, "logprobs": 1}, "logprobs", "valid boolean"),
    ({"messages": USER, "reasoning_effort": "high"}, "reasoning_effort", "not permitted"),
    ({"messages": USER, "prompt": "x"}, "prompt", "not permitted"),
]


@pytest.mark.parametrize(("body", "param", "message"), INVALID_CHATS)
def test_chats_that_are_refused(
    server: Server, body: dict[str, Any], param: str, message: str
) -> None:
    error = error_of(server.post("chat/completions", **body), 400)
    assert error["param"] == param
    assert message in error["message"]


def test_neutral_values_are_accepted(server: Server) -> None:
    neutral = {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "echo": False}
    more = {"suffix": None, "best_of": 1, "user": "me", "metadata": {"a": 1}, "logprobs": None}
    assert server.post(**neutral, **more).status_code == 200


def test_prompts_too_long_for_the_cap_or_the_model(server: Server) -> None:
    assert server.post(prompt="x" * 30).status_code == 200
    error = error_of(server.post(prompt="x" * 31), 400)
    assert error["code"] == "capacity_exceeded"
    assert "31 tokens for base, max_prompt_tokens is 30" in error["message"]
    with serving(make_engine(), max_response_tokens=300) as other:
        error = error_of(other.post(max_tokens=256), 400)
        assert error["code"] == "capacity_exceeded"
        assert "256 positions of base" in error["message"]


def test_guidance_that_the_engine_has_not() -> None:
    engine = Engine(tiny_model("gpt2"), tiny_tokenizer(), config=EngineConfig(num_blocks=50))
    with serving(engine) as other:
        error = error_of(other.post(guidance="implicit"), 400)
        assert error["param"] == "guidance"
        assert "needs tuned and untuned" in error["message"]
        assert error_of(other.post(scorer="explicit", num_candidates=2), 400)["param"] == "scorer"


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "tiny", "\\ud800": 4}',
        b"{",
        b"",
        b"[1]",
        b'{"model": NaN}',
        b"\xff",
        b"[" * 3000,
    ],
)
def test_bodies_that_are_none(server: Server, body: bytes) -> None:
    before = server.metrics()["ivg_requests_total invalid"]
    for path in ("completions", "chat/completions"):
        response = requests.post(
            f"{server.url}/v1/{path}",
            data=body,
            headers={"Content-Type": "application/json"},
            timeout=60,
        )
        assert error_of(response, 400)["type"] == "invalid_request_error"
    assert server.metrics()["ivg_requests_total invalid"] == before + 2


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b'{"model": "tiny", "prompt": "x"}', "application/x-www-form-urlencoded"),  # curl -d
        (b'{"model": "tiny", "prompt": "x"}', None),
        (b"[]", "application/json"),
        (b"", "application/json"),
    ],
)
def test_a_body_that_is_no_object_is_told_how_to_be_one(server: Server, body, kind) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    url = f"{server.url}/v1/completions"
    error = error_of(requests.post(url, data=body, headers=headers, timeout=60), 400)
    assert "must be a JSON object, sent with Content-Type: application/json" in error["message"]
    assert error["param"] is None


def test_numbers_that_json_has_not(server: Server) -> None:
    for name in ("temperature", "guidance_weight", "deadline_s", "top_p"):
        for value in ("NaN", "1e999", "-Infinity"):
            if (name, value) == ("deadline_s", "1e999"):
                continue  # never: SearchParams allows it
            response = requests.post(
                f"{server.url}/v1/completions",
                data=f'{{"model": "{MODEL}", "prompt": "x", "{name}": {value}}}',
                headers={"Content-Type": "application/json"},
                timeout=60,
            )
            assert error_of(response, 400)["param"] == name


def test_bodies_that_are_too_large(server: Server) -> None:
    before = server.metrics()["ivg_requests_total refused"]
    error = error_of(server.post(prompt="x" * 5000), 413)
    assert error["code"] == "body_too_large"

    def pieces() -> Iterator[bytes]:  # no Content-Length says so
        for _ in range(50):
            yield b" " * 100

    response = requests.post(f"{server.url}/v1/completions", data=pieces(), timeout=60)
    assert response.status_code == 413
    assert server.metrics()["ivg_requests_total refused"] == before + 2


def test_other_paths_methods_and_models(server: Server) -> None:
    assert error_of(requests.get(f"{server.url}/v1/completions", timeout=60), 405)
    assert error_of(requests.get(f"{server.url}/v2", timeout=60), 404)["code"] == "not_found"
    error = error_of(server.post(model="gpt-4"), 404)
    assert error["code"] == "model_not_found"
    assert error["param"] == "model"
    # A page elsewhere can send text without asking; that is no JSON here.
    body = json.dumps({"model": MODEL, "prompt": "x"})
    response = requests.post(
        f"{server.url}/v1/completions",
        data=body,
        headers={"Content-Type": "text/plain"},
        timeout=60,
    )
    error_of(response, 400)


def test_the_client_names_the_field(server: Server) -> None:
    with pytest.raises(BadRequestError) as caught:
        server.client().completions.create(model=MODEL, prompt="x", extra_body={"beam_width": 0})
    assert caught.value.param == "beam_width"


def test_a_long_value_is_not_echoed_whole() -> None:
    with serving(make_engine()) as server:
        for body in ({"stop": ["x" * 5000, ""]}, {"y" * 5000: 1}, {"prompt": ["z" * 5000, ""]}):
            response = server.post(**body)
            assert response.status_code == 400
            assert len(response.text) < 1200


# --- the key ---------------------------------------------------------------------------------


def test_a_key_is_needed_for_everything_but_health() -> None:
    with serving(make_engine(), api_key=KEY, max_body_bytes=100) as server:
        assert requests.get(f"{server.url}/health", timeout=60).status_code == 200
        paths = ("/v1/models", "/metrics", "/openapi.json", "/v1/models/tiny", "/nothing")
        wrong = [None, "", KEY, f"bearer {KEY}", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", "Bearer "]
        for path in paths:
            for header in wrong:
                headers = {} if header is None else {"Authorization": header}
                response = requests.get(server.url + path, headers=headers, timeout=60)
                assert error_of(response, 401)["code"] == "invalid_api_key"
                assert response.headers["www-authenticate"] == "Bearer"
        headers = {"Authorization": f"Bearer {KEY}"}
        metrics = requests.get(f"{server.url}/metrics", headers=headers, timeout=60).text
        num_refused = len(paths) * len(wrong)
        assert f'ivg_requests_total{{outcome="refused"}} {num_refused}.0' in metrics
        for path in paths[:-1]:
            response = requests.get(server.url + path, headers=headers, timeout=60)
            assert response.status_code == 200
        assert server.post(prompt="x" * 1000).status_code == 401  # before anything is read of it
        odd = "Bearer é".encode("latin-1")
        response = requests.get(server.url, headers={"Authorization": odd}, timeout=60)
        assert response.status_code == 401
        with pytest.raises(AuthenticationError):
            server.client("wrong").completions.create(model=MODEL, prompt="x")
        got = server.client(KEY).completions.create(model=MODEL, prompt="x")
        assert got.usage.prompt_tokens == 1


def test_the_key_is_compared_in_constant_time(monkeypatch) -> None:
    import hmac

    compared = []
    compare = hmac.compare_digest

    def recorded(a, b):
        compared.append((a, b))
        return compare(a, b)

    monkeypatch.setattr("ivg_fast.server.gate.hmac.compare_digest", recorded)
    with serving(make_engine(), api_key=KEY) as server:
        assert requests.get(f"{server.url}/v1/models", timeout=60).status_code == 401
    assert compared == [(b"", f"Bearer {KEY}".encode())]


def test_where_a_key_comes_from(tmp_path, monkeypatch) -> None:
    file = tmp_path / "key"
    file.write_text(f" {KEY}\n", "utf-8")
    monkeypatch.setenv("A_KEY", KEY)
    monkeypatch.setenv("NO_KEY", " ")
    assert read_key(file, None) == read_key(None, "A_KEY") == KEY
    assert read_key(None, None) is None
    for bad in [(file, "A_KEY"), (None, "NO_KEY"), (None, "ABSENT"), (tmp_path, None)]:
        with pytest.raises(InvalidParameterError, match="api_key"):
            read_key(*bad)


# --- how a server is set up ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("host", ""),
        ("port", -1),
        ("port", 65536),
        ("model_name", ""),
        ("max_body_bytes", 0),
        ("max_rows", 0),
        ("max_response_tokens", True),
        ("max_stops", -1),
        ("retry_after_s", 0),
        ("drain_timeout_s", -1),
        ("niceness", 20),
    ],
)
def test_bad_server_config(name: str, value: Any) -> None:
    with pytest.raises(InvalidParameterError, match=name):
        ServerConfig(**{name: value})


def test_bad_applications() -> None:
    served = AsyncEngine(make_engine(num_blocks=9))
    for options in (
        {"defaults": SearchParams(max_tokens=4096)},
        {"defaults": SearchParams(max_tokens=3, num_candidates=65)},
        {"defaults": DEFAULTS, "api_key": ""},
        {"defaults": DEFAULTS, "api_key": "a\nb"},
        {"defaults": DEFAULTS, "api_key": "é"},
    ):
        with pytest.raises(InvalidParameterError):
            create_app(served, MODEL, **options).build_middleware_stack()
    served._stop(drain=False)
