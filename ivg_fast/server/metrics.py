# SPDX-License-Identifier: Apache-2.0
"""What a server counts and times, for Prometheus."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ivg_fast.async_engine import AsyncEngine
from ivg_fast.outputs import RequestOutput
from ivg_fast.server.responses import usage_of

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
_DELAYS = (*(ms / 1000 for ms in range(1, 11)), 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 1.0)
_LOOK_S = 0.01

# How a request ended, as one HTTP request; "refused": for its key or its size, before it was read.
OUTCOMES = ("ok", "refused", "invalid", "overloaded", "failed", "disconnected")


class Metrics:
    """One server's metrics, named as vLLM's are, with the prefix `ivg_`.

    Args:
        engine: read when the metrics are.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._registry = CollectorRegistry()
        gauges = {
            "num_requests_running": "requests that decode",
            "num_requests_waiting": "requests that wait for room",
        }
        for name, text in gauges.items():
            gauge = Gauge(f"ivg_{name}", text, registry=self._registry)
            gauge.set_function(partial(_stat, engine, name))
        usage = Gauge("ivg_kv_cache_usage_perc", "share of KV blocks held", registry=self._registry)
        usage.set_function(partial(_share_held, engine))
        self._requests = Counter(
            "ivg_requests", "HTTP requests, by outcome", ["outcome"], registry=self._registry
        )
        for outcome in OUTCOMES:
            self._requests.labels(outcome)
        self._success = Counter(
            "ivg_request_success",
            "prompts answered, by the best response's finish reason",
            ["finished_reason"],
            registry=self._registry,
        )
        self._prompt_tokens = Counter(
            "ivg_prompt_tokens", "tokens of prompts answered", registry=self._registry
        )
        self._generation_tokens = Counter(
            "ivg_generation_tokens", "tokens of responses returned", registry=self._registry
        )
        self.first = Histogram(
            "ivg_time_to_first_token_seconds",
            "until the first text of a stream",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.between = Histogram(
            "ivg_inter_token_latency_seconds",
            "between two events of a stream, a token of the later one",
            buckets=_TOKEN_SECONDS,
            registry=self._registry,
        )
        self._whole = Histogram(
            "ivg_e2e_request_latency_seconds",
            "until the end of a request that was answered",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._delay = Histogram(
            "ivg_event_loop_delay_seconds",
            "by which the event loop comes late to a timer",
            buckets=_DELAYS,
            registry=self._registry,
        )

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self._registry)

    def ended(self, outcome: str) -> None:
        """One HTTP request has ended."""
        self._requests.labels(outcome).inc()

    def answered(self, outputs: Sequence[RequestOutput], begin: float) -> None:
        """A request that began at `begin` (time.perf_counter) has these outputs."""
        self.ended("ok")
        self._whole.observe(time.perf_counter() - begin)
        usage = usage_of(outputs)
        self._prompt_tokens.inc(usage["prompt_tokens"])
        self._generation_tokens.inc(usage["completion_tokens"])
        for output in outputs:
            self._success.labels(output.outputs[0].finish_reason).inc()

    async def watch_loop(self) -> None:
        """Measures the event loop that it runs on, until it is cancelled."""
        while True:
            begin = time.perf_counter()
            await asyncio.sleep(_LOOK_S)
            self._delay.observe(max(0.0, time.perf_counter() - begin - _LOOK_S))


class StreamTimer:
    """Times the events of one prompt's stream."""

    def __init__(self, metrics: Metrics, begin: float) -> None:
        self._metrics = metrics
        self._last = begin
        self._has_begun = False

    def event(self, num_tokens: int) -> None:
        """An event with this many tokens has come."""
        if not num_tokens:
            return
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        if self._has_begun:
            self._metrics.between.observe(seconds / num_tokens)
        else:
            self._metrics.first.observe(seconds)
        self._has_begun = True


def _stat(engine: AsyncEngine, name: str) -> int:
    return engine.stats()[name]


def _share_held(engine: AsyncEngine) -> float:
    stats = engine.stats()
    return stats["num_blocks_used"] / stats["num_blocks"]
