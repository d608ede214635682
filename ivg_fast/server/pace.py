# SPDX-License-Identifier: Apache-2.0
"""What arrives at once is read a little at each turn of the event loop."""

from __future__ import annotations

import asyncio
from collections import deque

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_READS_PER_TURN = 4

# What a server's connections have yet to read, in the order in which it came.
Unread = deque[tuple["PacedProtocol", bytes]]


def paced() -> type[PacedProtocol]:
    """The protocol of one server, whose connections take turns."""
    return type("PacedProtocol", (PacedProtocol,), {"unread": deque()})


class PacedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP, but that of sixty requests which come together, as they do when sixty before
    them have ended together, each turn of the loop reads a few."""

    unread: Unread

    def data_received(self, data: bytes) -> None:
        """Keeps it until its turn."""
        if not self.unread:
            asyncio.get_running_loop().call_soon(self._read_some)
        self.unread.append((self, data))

    def _read_some(self) -> None:
        for _ in range(min(_READS_PER_TURN, len(self.unread))):
            protocol, data = self.unread.popleft()
            protocol.read(data)
        if self.unread:
            asyncio.get_running_loop().call_soon(self._read_some)

    def read(self, data: bytes) -> None:
        """What uvicorn does at once."""
        if self.parser is not None:  # else the connection is lost
            super().data_received(data)
