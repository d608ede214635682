# SPDX-License-Identifier: Apache-2.0
"""An engine is run by one thread at a time."""

from __future__ import annotations

import threading

from ivg_fast.errors import IVGError


class OneThread:
    """Held by one thread at a time, which may hold it again; another is refused, it never waits."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._owner: int | None = None
        self._depth = 0

    @property
    def is_mine(self) -> bool:
        return self._owner == threading.get_ident()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise IVGError("another thread runs this engine: one thread at a time, or AsyncEngine")
        self._owner = threading.get_ident()
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._owner = None
        self._lock.release()
