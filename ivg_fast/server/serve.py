# SPDX-License-Identifier: Apache-2.0
"""Runs the application under uvicorn until it is told to end."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI

from ivg_fast.errors import InvalidParameterError
from ivg_fast.server.config import ServerConfig
from ivg_fast.server.pace import paced

_SWITCH_S = 0.0005
# What a step takes that is under way when the requests are ended, and writing what they are told.
_LAST_STEP_S = 5

_LOG = logging.getLogger("ivg_fast")


def read_key(file: Path | None, variable: str | None) -> str | None:
    """The API key, of a file or an environment variable; None where neither is named.

    Raises:
        InvalidParameterError: both are named, or what is named holds no key.
    """
    if file is not None and variable is not None:
        raise InvalidParameterError("api_key_file", str(file), "must stand without api_key_env")
    name, place = ("api_key_env", variable) if file is None else ("api_key_file", str(file))
    if place is None:
        return None
    try:
        key = os.environ.get(place, "") if file is None else file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidParameterError(name, place, f"must be readable text ({error})") from error
    if not key.strip():
        raise InvalidParameterError(name, place, "must hold a key")
    return key.strip()


def listen(config: ServerConfig) -> socket.socket:
    """A socket at the address; those who connect wait until it is served.

    Raises:
        OSError: nobody can listen there.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    return socket.create_server((config.host, config.port), family=family, backlog=2048)


def make_server(app: FastAPI, config: ServerConfig) -> uvicorn.Server:
    """What serves an application of create_app, not started yet. Logging stays as the process has
    set it up; uvicorn's warnings go to the logger "uvicorn.error".
    """
    options = uvicorn.Config(
        app,
        http=paced(),
        # uvicorn's own configuration closes every handler of the process it runs in.
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=config.drain_timeout_s + _LAST_STEP_S,
    )
    return _Server(options, config.drain_timeout_s)


class _Server(uvicorn.Server):
    """Ends what still runs after `drain_timeout_s`, or at a SIGINT while it ends, so that its
    clients are told: uvicorn itself would cut them off, as it does at the next."""

    def __init__(self, options: uvicorn.Config, drain_timeout_s: int) -> None:
        super().__init__(options)
        self._drain_timeout_s = drain_timeout_s
        self._is_hurried = False
        self._end_requests: Callable[[], object] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if sig != signal.SIGINT or not self.should_exit or self._is_hurried:
            super().handle_exit(sig, frame)
            return
        self._is_hurried = True
        if self._end_requests is not None:
            self._end_requests()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        end_requests = self.config.app.state.end_requests  # type: ignore[union-attr]
        loop = asyncio.get_running_loop()
        self._end_requests = lambda: loop.call_soon_threadsafe(end_requests)
        timer = loop.call_later(0 if self._is_hurried else self._drain_timeout_s, end_requests)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()


def serve(app: FastAPI, config: ServerConfig, listener: socket.socket) -> None:
    """Serves until SIGTERM or SIGINT, then lets the requests finish that have been accepted, for
    `drain_timeout_s` at most or until another SIGINT. Prints its address first.
    """
    host = f"[{config.host}]" if listener.family == socket.AF_INET6 else config.host
    print(f"ivg-fast: serving on http://{host}:{listener.getsockname()[1]}", flush=True)
    # The engine's thread holds the interpreter between its kernels, and the event loop gives it up
    # at each write: at the default of 5 ms, sixty streams could wait 300 ms for their turns.
    sys.setswitchinterval(_SWITCH_S)
    # A full collection walks every object of torch and transformers, 15 ms in which nothing is
    # served; none of what has been loaded by now can become garbage.
    gc.collect()
    gc.freeze()
    # uvicorn raises the signal that ended it once more: it has done its work by then.
    before = {number: signal.signal(number, _ended) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        make_server(app, config).run(sockets=[listener])
    finally:
        gc.unfreeze()
        for number, handler in before.items():
            signal.signal(number, handler)


def _ended(number: int, _: object) -> None:
    _LOG.info("ended by %s", signal.Signals(number).name)
