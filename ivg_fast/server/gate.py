# SPDX-License-Identifier: Apache-2.0
"""What stands before everything else: the key, and the size of a body."""

from __future__ import annotations

import hmac
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ivg_fast.errors import InvalidParameterError
from ivg_fast.server.errors import refusal
from ivg_fast.server.turns import Turns

_OPEN_PATHS = ("/health",)


class Gate:
    """Lets those in who know the key, before anything of a body is read, one after another, and of
    a body `max_body_bytes`, whether its length is announced or not. `on_refused` is called for each
    that is turned away.

    Raises:
        InvalidParameterError: an empty key, or one that no header can hold.
    """

    def __init__(
        self,
        app: ASGIApp,
        api_key: str | None,
        max_body_bytes: int,
        on_refused: Callable[[], None],
    ) -> None:
        if api_key is not None and not (api_key and api_key.isascii() and api_key.isprintable()):
            raise InvalidParameterError("api_key", "...", "must be printable ASCII")
        self._app = app
        self._wanted = None if api_key is None else f"Bearer {api_key}".encode()
        self._max_body_bytes = max_body_bytes
        self._on_refused = on_refused
        self._turns = Turns()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if self._wanted is not None and scope["path"] not in _OPEN_PATHS:
            given = headers.get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(given, self._wanted):
                self._on_refused()
                response = refusal(401, "a valid API key is needed", {"WWW-Authenticate": "Bearer"})
                await response(scope, receive, send)
                return
        announced = headers.get("content-length", "0")
        if not announced.isdecimal() or int(announced) > self._max_body_bytes:
            self._on_refused()
            await refusal(413, self._too_large)(scope, receive, send)
            return
        await self._turns.wait()
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_body_bytes:
                self._on_refused()
                raise HTTPException(413, self._too_large)
            return message

        await self._app(scope, counted, send)

    @property
    def _too_large(self) -> str:
        return f"a body must have at most {self._max_body_bytes} bytes"
