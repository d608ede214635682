# SPDX-License-Identifier: Apache-2.0
"""The prompts of one HTTP request, together in an engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import aclosing
from typing import Any, Self, TypeVar

from starlette.types import Receive

from ivg_fast.async_engine import AsyncEngine
from ivg_fast.client import StreamEvent
from ivg_fast.errors import EngineStoppedError
from ivg_fast.outputs import RequestOutput
from ivg_fast.server.jobs import Job
from ivg_fast.server.turns import Turns

T = TypeVar("T")


async def generate(engine: AsyncEngine, jobs: Sequence[Job]) -> list[RequestOutput]:
    """The output of each; if one fails the others are aborted and its error is raised.

    Raises:
        EngineStoppedError: the engine has ended before one of them.
    """
    tasks = [
        asyncio.ensure_future(engine.generate(job.prompt, job.params, seed=job.seed))
        for job in jobs
    ]
    try:
        outputs = await asyncio.gather(*tasks)
    finally:
        await _cancel(tasks)
    _check_whole(engine)
    return outputs


async def unless_disconnected(receive: Receive, work: Awaitable[T]) -> T | None:
    """What `work` returns; it is cancelled, and None returned, when the client goes away."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        await _cancel((task, watch))


class Streams:
    """The streams of several prompts as one.

    As an async context manager it is entered once all are accepted, or raises why one is not; at
    the end it aborts those that still run.
    """

    def __init__(self, engine: AsyncEngine, jobs: Sequence[Job], ends: Turns) -> None:
        self._engine = engine
        self._jobs = jobs
        self._ends = ends  # a last event takes the longest to write
        self._tasks: list[asyncio.Task[None]] = []
        # None: the prompt of that index is accepted.
        self._items: asyncio.Queue[tuple[int, StreamEvent | Exception | None]] = asyncio.Queue()
        self._early: list[tuple[int, StreamEvent]] = []

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.ensure_future(self._pump(i)) for i in range(len(self._jobs))]
        try:
            num_accepted = 0
            while num_accepted < len(self._jobs):
                index, item = await self._items.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    num_accepted += 1
                else:
                    self._early.append((index, item))
        except BaseException:
            await _cancel(self._tasks)
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await _cancel(self._tasks)

    async def events(self) -> AsyncIterator[tuple[int, StreamEvent]]:
        """(index of the prompt, event) as they come, until each prompt had its last; raises what
        one fails with."""
        num_running = len(self._jobs)
        while num_running:
            if self._early:
                index, item = self._early.pop(0)
            else:
                index, item = await self._items.get()  # type: ignore[assignment]
            if isinstance(item, Exception):
                raise item
            num_running -= item.output is not None
            yield index, item

    async def _pump(self, index: int) -> None:
        job = self._jobs[index]
        try:
            events = self._engine.stream(
                job.prompt,
                job.params,
                seed=job.seed,
                on_accepted=lambda: self._items.put_nowait((index, None)),
            )
            async with aclosing(events):
                async for event in events:
                    if event.output is not None:
                        _check_whole(self._engine)
                        await self._ends.wait()
                    self._items.put_nowait((index, event))
        except Exception as error:
            self._items.put_nowait((index, error))


def _check_whole(engine: AsyncEngine) -> None:
    """Half a response must not look like one."""
    if engine.has_aborted_all:
        raise EngineStoppedError("the server has ended before the request")


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(tasks: Sequence[asyncio.Future[Any]]) -> None:
    """Returns when all have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
