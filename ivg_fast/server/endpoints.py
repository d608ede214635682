# SPDX-License-Identifier: Apache-2.0
"""What the routes do: bodies in, whole responses or streams of events out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any

from fastapi import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from ivg_fast.async_engine import AsyncEngine
from ivg_fast.errors import QueueFullError
from ivg_fast.outputs import RequestOutput
from ivg_fast.params import SearchParams
from ivg_fast.server.config import ServerConfig
from ivg_fast.server.errors import JSONResponse, RequestError, describe, dumps, error_response
from ivg_fast.server.generation import Streams, generate, unless_disconnected
from ivg_fast.server.jobs import Job, jobs_of
from ivg_fast.server.metrics import Metrics, StreamTimer
from ivg_fast.server.protocol import ChatRequest, CompletionRequest
from ivg_fast.server.responses import Responses
from ivg_fast.server.turns import Turns

_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class Endpoints:
    """What the routes do.

    Args:
        engine, defaults, config: as of create_app.
        model_name: as clients call the model.
        metrics: told of every request.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        model_name: str,
        defaults: SearchParams,
        config: ServerConfig,
        metrics: Metrics,
    ) -> None:
        self.engine = engine
        self.metrics = metrics
        self._defaults = defaults
        self._config = config
        self._ends = Turns()
        self.card = {
            "id": model_name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "ivg_fast",
        }

    def check_model(self, name: str) -> None:
        """Raises RequestError for a model that is not served."""
        if name != self.card["id"]:
            raise RequestError(
                "model",
                f"model must be {self.card['id']!r}, got {name!r}",
                status=404,
                code="model_not_found",
            )

    def refuse(self, error: Exception, names: dict[str, str]) -> JSONResponse:
        """The response to a request that ends in an error."""
        return error_response(error, names, self._config.retry_after_s)

    async def respond(self, body: CompletionRequest | ChatRequest, request: Request) -> Response:
        """The response to a body that is well formed."""
        begin = time.perf_counter()
        is_chat = isinstance(body, ChatRequest)
        names = {"prompts": "messages" if is_chat else "prompt"}
        if is_chat and body.max_completion_tokens is not None:
            names["max_tokens"] = "max_completion_tokens"
        try:
            self.check_model(body.model)
            jobs = jobs_of(body, self._defaults, self._config)
            params = jobs[0].params
            responses = Responses(
                body.model,
                params.n,
                self.engine.tokenizer,
                is_chat=is_chat,
                wants_logprobs=params.logprobs,
            )
            if body.stream:
                return await self._stream(body, request, jobs, responses, begin)
            outputs = await unless_disconnected(request.receive, generate(self.engine, jobs))
            if outputs is None:
                self.metrics.ended("disconnected")
                return Response(status_code=499)  # nobody reads it
            await self._ends.wait()
            response = JSONResponse(responses.whole(outputs))
            self.metrics.answered(outputs, begin)
            return response
        except Exception as error:
            response = self.refuse(error, names)
            self.metrics.ended(_outcome(error, response.status_code))
            return response
        except asyncio.CancelledError:
            self.metrics.ended("disconnected")
            raise

    async def _stream(
        self,
        body: CompletionRequest | ChatRequest,
        request: Request,
        jobs: Sequence[Job],
        responses: Responses,
        begin: float,
    ) -> Response:
        """Returns once every prompt is accepted; what goes wrong before has a status of its own."""
        stack = AsyncExitStack()
        streams = await unless_disconnected(
            request.receive, stack.enter_async_context(Streams(self.engine, jobs, self._ends))
        )
        if streams is None:
            await stack.aclose()  # they may have been accepted at that very moment
            self.metrics.ended("disconnected")
            return Response(status_code=499)
        wants_usage = body.stream_options is not None and body.stream_options.include_usage
        outcome = "disconnected"
        outputs: dict[int, RequestOutput] = {}

        async def lines() -> AsyncIterator[bytes]:
            nonlocal outcome
            try:
                async for chunk in self._chunks(streams, responses, len(jobs), outputs, begin):
                    yield _event(chunk)
                if wants_usage:
                    yield _event(responses.usage([outputs[i] for i in range(len(jobs))]))
                outcome = "ok"
                yield b"data: [DONE]\n\n"
            except Exception as error:
                status, said = describe(error, {})
                outcome = _outcome(error, status)
                yield _event(said)

        async def end() -> None:
            if outcome == "ok":
                self.metrics.answered([outputs[i] for i in range(len(jobs))], begin)
            else:
                self.metrics.ended(outcome)
            await stack.aclose()

        return _EventStream(lines(), end)

    async def _chunks(
        self,
        streams: Streams,
        responses: Responses,
        num_prompts: int,
        outputs: dict[int, RequestOutput],
        begin: float,
    ) -> AsyncIterator[dict[str, Any]]:
        timers = [StreamTimer(self.metrics, begin) for _ in range(num_prompts)]
        if responses.is_chat:
            yield responses.role(0)
        async for prompt, event in streams.events():
            timers[prompt].event(len(event.token_ids))
            if event.output is None:
                if event.text:
                    yield responses.piece(prompt, event.text)
                continue
            outputs[prompt] = event.output
            for chunk in responses.last(prompt, event.text, event.output):
                yield chunk


def _outcome(error: Exception, status: int) -> str:
    if isinstance(error, QueueFullError):
        return "overloaded"
    return "invalid" if status < 500 else "failed"


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + dumps(content) + b"\n\n"


class _EventStream(StreamingResponse):
    """Server-sent events. `end` is called whatever happens: a client may be gone before the first
    event, and then nobody begins with them."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], end: Callable[[], Awaitable[None]]) -> None:
        super().__init__(events, headers=_STREAM_HEADERS)
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._end()
