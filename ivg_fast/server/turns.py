# SPDX-License-Identifier: Apache-2.0
"""One after another, where a crowd would hold up the event loop."""

from __future__ import annotations

import asyncio
from collections import deque


class Turns:
    """Lets one on at each turn of the event loop: of requests that come at once, as they all do
    when those before them have ended at once, and of responses that end."""

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._is_taken = False

    async def wait(self) -> None:
        """Until it is one's turn."""
        loop = asyncio.get_running_loop()
        if self._is_taken:
            mine = loop.create_future()
            self._waiting.append(mine)
            await mine
        else:
            self._is_taken = True
            loop.call_soon(self._next)

    def _next(self) -> None:
        while self._waiting:
            first = self._waiting.popleft()
            if not first.done():  # else it is gone
                first.set_result(None)
                first.get_loop().call_soon(self._next)
                return
        self._is_taken = False
