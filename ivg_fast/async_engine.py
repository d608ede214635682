# SPDX-License-Identifier: Apache-2.0
"""AsyncEngine: an engine for many clients of an event loop."""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import secrets
import sys
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, Self

import torch

from ivg_fast.client import Client, StreamEvent, deliver
from ivg_fast.engine import Engine
from ivg_fast.errors import (
    EngineStoppedError,
    InvalidParameterError,
    IVGError,
    QueueFullError,
)
from ivg_fast.loop import Ended
from ivg_fast.outputs import RequestOutput
from ivg_fast.params import SearchParams, check_integer
from ivg_fast.rendering import PromptInput
from ivg_fast.streaming import TextStream, TokenKinds

_LOG = logging.getLogger("ivg_fast")


class AsyncEngine:
    """Serves the tasks of event loops from one thread that steps an engine.

    Prompts are read and checked on a second thread, and every callable that scores runs on one of
    its own (see EngineConfig.scorer_timeout_s, which a service should set), so that neither an
    event loop nor another request waits for them. Methods may be called from any thread and loop.

    As an async context manager it shuts down at the end: after an error without draining.

    Args:
        engine: it belongs to this object from now on, which closes it at shutdown.
        niceness: 0 to 19, by how much the engine's threads step back behind the event loop's where
            they compete for a core, as in nice(1). Linux only, as elsewhere threads have none.

    Raises:
        InvalidParameterError: niceness is out of range.
        IVGError: the engine is closed, has requests, or another thread runs it.
    """

    def __init__(self, engine: Engine, *, niceness: int = 0) -> None:
        check_integer("niceness", niceness, 0, 19)
        self._engine = engine
        self._niceness = niceness
        engine.use_scorer_threads()
        self._kinds = TokenKinds.of(engine.tokenizer)
        self._lock = threading.Lock()  # of all below
        self._clients: dict[str, Client] = {}  # whose request has not ended
        self._running: dict[int, Client] = {}  # those by the engine's request id
        self._unclaimed: dict[int, Ended] = {}  # ended before its client knew the id
        self._is_stopping = self._has_aborted_all = False
        self._failure: BaseException | None = None
        self._work = threading.Event()
        self._started: Future[None] = Future()
        self._stopped: Future[None] = Future()
        self._admission = ThreadPoolExecutor(1, thread_name_prefix="ivg-admission")
        self._num_threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, name="ivg-engine", daemon=True)
        self._thread.start()
        self._started.result()
        atexit.register(self._stop_at_exit)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Self:
        """Like Engine.from_pretrained. It loads the models, which takes its time: call it before
        the event loop has clients, or on another thread."""
        return cls(Engine.from_pretrained(*args, **kwargs))

    # --- clients ---------------------------------------------------------------------------------

    async def stream(
        self,
        prompt: PromptInput,
        params: SearchParams,
        *,
        seed: int | None = None,
        request_id: str | None = None,
        on_accepted: Callable[[], object] | None = None,
    ) -> AsyncGenerator[StreamEvent, None]:
        """Decodes one prompt and yields what is decided as soon as it is: the tokens that all
        surviving candidates share. Nothing is taken back; all texts, and all token ids, add up to
        those of the best candidate.

        With a single candidate events come every `EngineConfig.max_stream_steps` tokens, those of
        a search at its selections. The last event carries the RequestOutput. A generator that is
        closed, or whose task is cancelled, aborts its request.

        Args:
            prompt, params, seed: as of Engine.add_request.
            request_id: for `abort`, unique among the live requests; None: one is made.
            on_accepted: called once it is certain that the request will run.

        Raises:
            EngineStoppedError: it has been shut down, or its thread has failed.
            InvalidParameterError, CapacityError, QueueFullError: the request is not accepted.
            Exception: what the request failed with.
        """
        stops = params.stop if isinstance(params, SearchParams) else ()
        client = self._open(request_id, TextStream(self._engine.tokenizer, self._kinds, stops))
        try:
            await self._admit(client, prompt, params, seed)
            if on_accepted is not None:
                on_accepted()
            while True:
                event = await client.next_event()
                yield event
                if event.output is not None:
                    return
        finally:
            self._close(client)

    async def generate(
        self,
        prompt: PromptInput,
        params: SearchParams,
        *,
        seed: int | None = None,
        request_id: str | None = None,
    ) -> RequestOutput:
        """Decodes one prompt. A task that is cancelled aborts its request. Arguments and errors are
        those of `stream`."""
        client = self._open(request_id, None)
        try:
            await self._admit(client, prompt, params, seed)
            event = await client.next_event()
        finally:
            self._close(client)
        assert event.output is not None
        return event.output

    def abort(self, request_id: str) -> bool:
        """Ends a request, whose client gets what there is; what has not ended by itself has
        finish_reason "abort". Nothing happens, and False is returned, where it has ended already or
        nobody has asked for it.

        Raises:
            InvalidParameterError: `request_id` is no string.
        """
        if not isinstance(request_id, str):
            raise InvalidParameterError("request_id", request_id, "must be a string")
        with self._lock:
            client = self._clients.get(request_id)
            if client is None:
                return False
            client.is_aborted = True
            self._abort_running(client)
        return True

    @property
    def is_running(self) -> bool:
        """Whether requests are taken: it has not been shut down, and its thread has not failed."""
        return not self._is_stopping

    @property
    def has_aborted_all(self) -> bool:
        """Whether it was shut down without draining: what ends from then on may be no result, even
        where each candidate says that it is whole, as nobody has ranked them."""
        return self._has_aborted_all

    @property
    def tokenizer(self) -> Any:
        """The base model's."""
        return self._engine.tokenizer

    def stats(self) -> dict[str, int]:
        """As of Engine.stats."""
        return self._engine.stats()

    async def shutdown(self, *, drain: bool = True) -> None:
        """Accepts nothing more, ends, closes the engine and returns when that is done.

        Args:
            drain: let what has been accepted finish. False: abort it; the clients get what there
                is. May follow a call with True that is still waiting.
        """
        self._stop(drain)
        await asyncio.shield(asyncio.wrap_future(self._stopped))

    def _stop(self, drain: bool) -> None:
        with self._lock:
            self._is_stopping = True
            if not drain:
                self._has_aborted_all = True
                for client in self._clients.values():
                    client.is_aborted = True
                    self._abort_running(client)
        self._work.set()

    def _stop_at_exit(self) -> None:
        """A thread inside C++ code takes the process down if the interpreter ends around it."""
        self._stop(drain=False)
        self._thread.join()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        await self.shutdown(drain=error_type is None)

    # --- from the clients to the engine ----------------------------------------------------------

    def _open(self, request_id: str | None, text: TextStream | None) -> Client:
        name = secrets.token_hex(8) if request_id is None else request_id
        if not isinstance(name, str):
            raise InvalidParameterError("request_id", name, "must be a string")
        client = Client(name, text)
        with self._lock:
            self._check_runs()
            if name in self._clients:
                raise InvalidParameterError("request_id", name, "must not be a live request's")
            self._clients[name] = client
        return client

    def _check_runs(self) -> None:
        if self._failure is not None:
            raise EngineStoppedError("the engine's thread has failed") from self._failure
        if self._is_stopping:
            raise EngineStoppedError("the engine is shut down")

    async def _admit(
        self, client: Client, prompt: PromptInput, params: SearchParams, seed: int | None
    ) -> None:
        if not self._engine.has_room:  # at once, before anything is spent on it
            raise QueueFullError("max_queued_requests wait already")
        loop = asyncio.get_running_loop()
        try:
            job = loop.run_in_executor(self._admission, self._add, client, prompt, params, seed)
        except RuntimeError as error:  # it has shut down since
            raise EngineStoppedError("the engine is shut down") from error
        await job

    def _add(
        self, client: Client, prompt: PromptInput, params: SearchParams, seed: int | None
    ) -> None:
        if client.is_closed:  # gone while others were admitted
            return
        is_streamed = client.text is not None
        try:
            number = self._engine.add_request(prompt, params, seed=seed, is_streamed=is_streamed)
        except IVGError:
            if self._failure is not None:  # and so it is closed
                self._check_runs()
            raise
        with self._lock:
            client.number = number
            self._running[number] = client
            ended = self._unclaimed.pop(number, None)
            if client.is_closed or client.is_aborted:
                self._abort_running(client)
        if ended is not None:
            self._publish([ended])
        self._work.set()

    def _abort_running(self, client: Client) -> None:
        if client.number is not None:
            self._engine.abort(client.number)
            self._work.set()

    def _close(self, client: Client) -> None:
        with self._lock:
            client.is_closed = True
            is_live = self._clients.get(client.request_id) is client
            if is_live:
                del self._clients[client.request_id]
                self._abort_running(client)
        self._work.set()

    # --- the engine's thread ---------------------------------------------------------------------

    def _run(self) -> None:
        with ExitStack() as stack:
            try:
                stack.enter_context(self._engine.hold())
            except IVGError as error:
                self._started.set_exception(error)
                return
            self._started.set_result(None)
            self._run_alone()

    def _run_alone(self) -> None:
        failure: BaseException | None = None
        try:
            torch.set_num_threads(self._num_threads)
            if self._niceness and sys.platform == "linux":  # the kernels' threads inherit it
                priority = os.getpriority(os.PRIO_PROCESS, 0) + self._niceness
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(priority, 19))
            self._serve()
        except BaseException as error:
            _LOG.exception("the engine's thread has failed")
            failure = error
        with self._lock:
            self._failure = failure
            self._is_stopping = True
            clients = list(self._clients.values())
            self._clients.clear()
            self._running.clear()
        items: list[tuple[Client, StreamEvent | BaseException]] = []
        for client in clients:
            stopped = EngineStoppedError("the engine's thread has failed")
            stopped.__cause__ = failure
            items.append((client, stopped))
        deliver(items)
        self._admission.shutdown(wait=False)
        try:
            self._engine.close()
        except Exception:
            _LOG.exception("the engine could not be closed")
        atexit.unregister(self._stop_at_exit)
        self._stopped.set_result(None)

    def _serve(self) -> None:
        while True:
            if not self._engine.has_unfinished:
                with self._lock:
                    if self._is_stopping and not self._clients:
                        return
                self._work.wait()
                self._work.clear()
                continue
            try:
                ended = self._engine.step()
            except Exception:
                raise
            except BaseException:  # a scorer raised it; the next step returns it as its request's
                continue
            self._publish_decided()
            self._publish(ended)

    def _publish_decided(self) -> None:
        with self._lock:
            running = list(self._running.items())
        items: list[tuple[Client, StreamEvent | BaseException]] = []
        for number, client in running:
            if client.text is None or client.is_closed:
                continue
            tokens = self._engine.take_decided(number)
            if not tokens:
                continue
            try:
                items.append((client, client.decided(tokens)))
            except Exception as error:  # a tokenizer that fails on one text fails no other
                self._engine.abort(number)
                client.error = error
        self._deliver(items)

    def _publish(self, ended: list[Ended]) -> None:
        items: list[tuple[Client, StreamEvent | BaseException]] = []
        with self._lock:
            for number, output in ended:
                client = self._running.pop(number, None)
                if client is None:
                    self._unclaimed[number] = (number, output)
                    continue
                if self._clients.get(client.request_id) is client:
                    del self._clients[client.request_id]
                if not client.is_closed:
                    items.append((client, client.last(output)))
        self._deliver(items)

    def _deliver(self, items: list[tuple[Client, StreamEvent | BaseException]]) -> None:
        for client in deliver(items):
            self._close(client)
