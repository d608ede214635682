# SPDX-License-Identifier: Apache-2.0
"""Random requests of the server's own OpenAPI schema, within it and outside: no 5xx, no hang."""

from __future__ import annotations

import dataclasses
import time

import pytest

pytest.importorskip("fastapi", reason="needs the extra `server`")
pytest.importorskip("schemathesis", reason="needs the extra `test`")

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from serving import MODEL, Server, make_engine, serving

from ivg_fast import SearchParams

SECONDS = 4.0  # an operation, at most
EXAMPLES = 60


@pytest.fixture(scope="module")
def server():
    engine = make_engine(max_prompt_tokens=60, max_queued_requests=100)
    defaults = SearchParams(max_tokens=8)
    with serving(engine, defaults=defaults, max_response_tokens=8, max_rows=8) as server:
        yield server


def fuzz(server: Server, label: str, mode: GenerationMode) -> list[int]:
    """The statuses of random requests of one operation."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    path, method = label.split()[1], label.split()[0]
    operation = schema[path][method]
    statuses: list[int] = []
    end: list[float] = []  # from the first request on: schemathesis takes its time before

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case) -> None:
        end.append(time.monotonic() + SECONDS)
        if time.monotonic() > end[0]:
            return
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = MODEL  # else there would be no more to see than that it is unknown
        response = case.call(timeout=60)
        statuses.append(response.status_code)
        assert response.status_code < 500, response.text
        if response.status_code >= 400:
            error = response.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}

    run()
    return statuses


OPERATIONS = ["POST /v1/completions", "POST /v1/chat/completions", "GET /v1/models/{model}"]
RUNS = [(label, mode) for label in OPERATIONS for mode in GenerationMode]
RUNS.pop()  # every text is a path


@pytest.mark.parametrize(("label", "mode"), RUNS, ids=str)
def test_no_request_breaks_the_server(server: Server, label: str, mode: GenerationMode) -> None:
    statuses = fuzz(server, label, mode)
    assert len(statuses) >= 5
    server.wait_idle()
    assert requests.get(f"{server.url}/health", timeout=60).status_code == 200
    assert server.post(max_tokens=3).status_code == 200


def test_the_schema_knows_every_field(server: Server) -> None:
    schema = requests.get(f"{server.url}/openapi.json", timeout=60).json()
    bodies = schema["components"]["schemas"]
    for name in ("CompletionRequest", "ChatRequest"):
        fields = {field.name for field in dataclasses.fields(SearchParams)}
        assert fields <= set(bodies[name]["properties"])
        assert bodies[name]["additionalProperties"] is False


def test_a_planted_failure_is_found(server: Server, monkeypatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr("ivg_fast.server.endpoints.Endpoints.check_model", broken)
    with pytest.raises(AssertionError):
        fuzz(server, OPERATIONS[0], GenerationMode.POSITIVE)
