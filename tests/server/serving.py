# SPDX-License-Identifier: Apache-2.0
"""A server that really listens, on a thread of this process, over tiny models."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import requests
from engine_cases import value_model
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families
from tiny_models import tiny_model, tiny_tokenizer

from ivg_fast import AsyncEngine, Engine, EngineConfig, RequestOutput, SearchParams
from ivg_fast.server.app import create_app
from ivg_fast.server.config import ServerConfig
from ivg_fast.server.serve import listen, make_server

MODEL = "tiny"
DEFAULTS = SearchParams(max_tokens=12)
LONG_BODY = {"max_tokens": 200, "seed": 3, "ignore_eos": True}


def make_engine(chat_templates: Mapping[str, str] | None = None, **config: Any) -> Engine:
    """Base, pair and value of three shapes; with chat templates, a tokenizer a role."""
    options = {"num_blocks": 600, "num_threads": 1, **config}
    tokenizers = {role: tiny_tokenizer() for role in chat_templates or ()}
    for role, template in (chat_templates or {}).items():
        tokenizers[role].chat_template = template
    return Engine(
        tiny_model("gpt2", seed=1),
        tokenizers.pop("base", None) or tiny_tokenizer(),
        tuned=tiny_model("llama", seed=2),
        untuned=tiny_model("llama", seed=3),
        value=value_model("mistral", vocab_size=97, seed=4),
        tokenizers=tokenizers,
        config=EngineConfig(**options),
    )


@dataclass(frozen=True, slots=True)
class Server:
    """One that runs."""

    url: str
    engine: Engine
    served: AsyncEngine
    stop: Callable[[], None]
    signal: Callable[[int], None]

    def client(self, api_key: str = "-", **options: Any) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, **options)

    def post(self, path: str = "completions", **body: Any) -> requests.Response:
        """A body beside a model and a prompt, unless it has them."""
        prompt = {} if path.startswith("chat") else {"prompt": "hello"}
        body = {"model": MODEL, **prompt, **body}
        return requests.post(f"{self.url}/v1/{path}", json=body, timeout=60)

    def metrics(self) -> dict[str, float]:
        """The samples by name and labels, those of buckets left out."""
        text = requests.get(f"{self.url}/metrics").text
        samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
        return {
            sample.name + "".join(f" {value}" for value in sample.labels.values()): sample.value
            for sample in samples
            if "le" not in sample.labels
        }

    def wait_idle(self) -> None:
        """Until nothing is left of any request; then the books must agree."""
        wait_until(lambda: not self.engine.has_unfinished and not self.served._clients)
        self.engine.check_integrity()
        assert self.engine.stats()["num_blocks_used"] == 0


@contextmanager
def serving(
    engine: Engine,
    *,
    defaults: SearchParams = DEFAULTS,
    api_key: str | None = None,
    **config: Any,
) -> Iterator[Server]:
    """Serves until the end of the block, and checks then that nothing is left."""
    settings = ServerConfig(port=0, **config)
    served = AsyncEngine(engine)
    app = create_app(served, MODEL, defaults=defaults, config=settings, api_key=api_key)
    listener = listen(settings)
    server = make_server(app, settings)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()

    def stop() -> None:
        server.should_exit = True

    def signalled(number: int) -> None:
        server.handle_exit(number, None)

    live = Server(f"http://127.0.0.1:{listener.getsockname()[1]}", engine, served, stop, signalled)
    try:
        yield live
        if served.is_running:
            live.wait_idle()
    finally:
        stop()
        thread.join(60)
        assert not thread.is_alive()
        assert not served.is_running


def wait_until(condition: Callable[[], bool]) -> None:
    """Fails after a minute."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.005)


class Steps:
    """Watches the steps of an engine: what has ended, and a brake."""

    def __init__(self, engine: Engine) -> None:
        self.ended: list[Any] = []
        self.seconds = 0.0
        self.is_open = threading.Event()
        self.is_open.set()
        self.num_waits = 0
        self._step = engine.step
        engine.step = self._run  # type: ignore[method-assign]

    def _run(self) -> Any:
        if not self.is_open.is_set():
            self.num_waits += 1
            self.is_open.wait()
        time.sleep(self.seconds)
        ended = self._step()
        self.ended += [output for _, output in ended]
        return ended

    @property
    def reasons(self) -> list[str]:
        outputs = [output for output in self.ended if isinstance(output, RequestOutput)]
        return [output.outputs[0].finish_reason for output in outputs]


def samples(server: Server, *names: str) -> list[float]:
    found = server.metrics()
    return [found[f"ivg_{name}"] for name in names]


def text_of(response: requests.Response) -> str:
    assert response.status_code == 200, response.text
    if not response.headers["content-type"].startswith("text/event-stream"):
        return response.json()["choices"][0]["text"]
    *lines, done = [line for line in response.text.split("\n\n") if line]
    assert done == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    return "".join(chunk["choices"][0]["text"] for chunk in chunks)
