# SPDX-License-Identifier: Apache-2.0
"""Clients of an AsyncEngine for tests."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from engine_cases import Case

from ivg_fast import AsyncEngine, Engine, RequestOutput, SearchParams, StreamEvent


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
