# SPDX-License-Identifier: Apache-2.0
"""The event loop of a process that has nothing to do: what comes late there is the machine's."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

# As often as the server looks at its own loop.
LOOK_S = 0.01


@contextmanager
def idle_loop() -> Iterator[Callable[[], list[float]]]:
    """A process beside the server and its clients; seconds that its loop's timers came late since
    it was last asked.
    """
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=_watch, args=(theirs,), daemon=True
    )
    process.start()
    # Its end is then held by itself alone, so that it is found out if it dies.
    theirs.close()

    def delays() -> list[float]:
        ours.send(None)
        found: list[float] = ours.recv()
        return found

    try:
        delays()
        yield delays
    finally:
        process.terminate()
        process.join()
        ours.close()


def _watch(end: Connection) -> None:
    asyncio.run(_look(end))


async def _look(end: Connection) -> None:
    delays: list[float] = []
    while True:
        begin = time.perf_counter()
        await asyncio.sleep(LOOK_S)
        delays.append(max(0.0, time.perf_counter() - begin - LOOK_S))
        if end.poll():
            end.recv()
            end.send(delays)
            delays = []
