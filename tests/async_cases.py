# SPDX-License-Identifier: Apache-2.0
"""Clients of an AsyncEngine for tests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from engine_cases import Case, text_score
from tiny_models import tiny_model, tiny_tokenizer

from ivg_fast import AsyncEngine, Engine, EngineConfig, RequestOutput, SearchParams, StreamEvent

SINGLE = SearchParams(max_tokens=20, seed=3, ignore_eos=True)
SEARCH = SearchParams.cbs(
    max_tokens=20,
    beam_width=2,
    num_candidates=2,
    chunk_length=4,
    scorer=text_score,
    seed=5,
    ignore_eos=True,
)


def make_engine(**config: Any) -> Engine:
    options = {"num_blocks": 400, "num_threads": 1, "max_burst_steps": 4, **config}
    return Engine(tiny_model("gpt2", seed=1), tiny_tokenizer(), config=EngineConfig(**options))


def alone_outputs() -> dict[str, RequestOutput]:
    """What SINGLE and SEARCH return when nobody else is there."""
    with make_engine() as engine:
        single, search = engine.generate(["hello", "hello"], [SINGLE, SEARCH], seeds=[3, 5])
    return {"single": single, "search": search}


def tokens(output: RequestOutput) -> list[int]:
    return output.outputs[0].token_ids


def on_steps(engine: Engine, call: Callable[[int], None]) -> None:
    """Calls with its number before each step, on the engine's thread."""
    real, count = engine.step, iter(range(10**9))

    def step():
        call(next(count))
        return real()

    engine.step = step  # type: ignore[method-assign]


def wait_until(condition: Callable[[], bool]) -> None:
    """Fails after a minute."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.001)


def serve(engine: Engine, clients: Callable[[AsyncEngine], Awaitable[Any]]) -> Any:
    """Runs `clients(async engine)` on a loop of its own; books checked when all has ended."""

    async def run() -> Any:
        async with AsyncEngine(engine) as served:
            result = await clients(served)
            while engine.has_unfinished:
                await asyncio.sleep(0.001)
            engine.check_integrity()
            held = {k: v for k, v in engine.stats().items() if k != "num_blocks" and v}
            assert not held, f"left behind: {held}"
            assert not served._clients
            assert not served._running
            assert not served._unclaimed
            return result

    return asyncio.run(asyncio.wait_for(run(), 300))


async def collect(
    engine: AsyncEngine, prompt: Any, params: SearchParams, **options: Any
) -> list[StreamEvent]:
    return [event async for event in engine.stream(prompt, params, **options)]


async def output_of(engine: AsyncEngine, case: Case, *, is_streamed: bool) -> RequestOutput:
    if not is_streamed:
        return await engine.generate(case.input, case.params, seed=case.seed)
    events = await collect(engine, case.input, case.params, seed=case.seed)
    return checked(events)


def checked(events: list[StreamEvent]) -> RequestOutput:
    """The output of a stream, whose pieces must add up to it."""
    *before, last = events
    assert all(event.output is None for event in before)
    assert all(event.token_ids for event in before)
    assert last.output is not None
    best = last.output.outputs[0]
    assert [t for event in events for t in event.token_ids] == best.token_ids
    assert "".join(event.text for event in events) == best.text
    return last.output
