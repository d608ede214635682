# SPDX-License-Identifier: Apache-2.0
"""The application: routes, the key, the life of the engine behind them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response, StreamingResponse

import ivg_fast
from ivg_fast.async_engine import AsyncEngine
from ivg_fast.errors import InvalidParameterError, QueueFullError
from ivg_fast.outputs import RequestOutput
from ivg_fast.params import SearchParams
from ivg_fast.server.config import ServerConfig
from ivg_fast.server.errors import (
    ErrorBody,
    JSONResponse,
    RequestError,
    add_handlers,
    describe,
    dumps,
    error_response,
)
from ivg_fast.server.gate import Gate
from ivg_fast.server.generation import Streams, generate, unless_disconnected
from ivg_fast.server.jobs import Job, jobs_of
from ivg_fast.server.metrics import Metrics, StreamTimer
from ivg_fast.server.protocol import ChatRequest, CompletionRequest
from ivg_fast.server.responses import Responses

_REFUSALS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}}
_ERRORS: dict[int | str, dict[str, Any]] = {**_REFUSALS, "5XX": {"model": ErrorBody}}
_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def create_app(
    engine: AsyncEngine,
    model_name: str,
    *,
    defaults: SearchParams,
    config: ServerConfig | None = None,
    api_key: str | None = None,
) -> FastAPI:
    """An ASGI application in OpenAI's form.

    Args:
        engine: shut down with the application, which lets its requests finish.
        model_name: what clients call the model, where `config` does not say.
        defaults: what a request does not say itself.
        config: the caps.
        api_key: clients must send it (`Authorization: Bearer KEY`) for everything but /health;
            None: nobody needs one.

    Raises:
        InvalidParameterError: an empty key, one that no header can hold, or defaults above the
            caps.
    """
    config = ServerConfig() if config is None else config
    for name, most in (("max_tokens", config.max_response_tokens), ("pool_size", config.max_rows)):
        if getattr(defaults, name) > most:
            raise InvalidParameterError(name, getattr(defaults, name), f"must be at most {most}")
    metrics = Metrics(engine)

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        watch = asyncio.ensure_future(metrics.watch_loop())
        try:
            yield
        finally:
            watch.cancel()
            await engine.shutdown(drain=True)

    app = FastAPI(
        title="ivg_fast",
        version=ivg_fast.__version__,
        lifespan=life,
        docs_url=None,  # their pages come from elsewhere
        redoc_url=None,
        responses=_REFUSALS,
    )
    add_handlers(app, lambda: metrics.ended("invalid"))
    app.add_middleware(Gate, api_key=api_key, max_body_bytes=config.max_body_bytes)
    _add_routes(app, _Server(engine, config.model_name or model_name, defaults, config, metrics))
    return app


def _add_routes(app: FastAPI, server: _Server) -> None:
    @app.post("/v1/completions", responses=_ERRORS, response_class=JSONResponse)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await server.respond(body, request)

    @app.post("/v1/chat/completions", responses=_ERRORS, response_class=JSONResponse)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        return await server.respond(body, request)

    @app.get("/v1/models", response_class=JSONResponse)
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [server.card]})

    @app.get("/v1/models/{model:path}", response_class=JSONResponse)
    async def model(model: str) -> Response:
        try:
            server.check_model(model)
        except RequestError as error:
            return server.refuse(error, {})
        return JSONResponse(server.card)

    @app.get("/health", response_class=JSONResponse, responses={503: {}})
    async def health() -> Response:
        is_running = server.engine.is_running
        said = {"status": "ok" if is_running else "stopped"}
        return JSONResponse(said, 200 if is_running else 503)

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        return Response(server.metrics.text(), media_type=CONTENT_TYPE_LATEST)


class _Server:
    """What the routes share."""

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
        except Exception as error:
            response = self.refuse(error, names)
            self.metrics.ended(_outcome(error, response.status_code))
            return response
        except asyncio.CancelledError:
            self.metrics.ended("disconnected")
            raise
        if outputs is None:
            self.metrics.ended("disconnected")
            return Response(status_code=499)  # nobody reads it
        self.metrics.answered(outputs, begin)
        return JSONResponse(responses.whole(outputs))

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
            request.receive, stack.enter_async_context(Streams(self.engine, jobs))
        )
        if streams is None:
            self.metrics.ended("disconnected")
            return Response(status_code=499)
        wants_usage = body.stream_options is not None and body.stream_options.include_usage

        async def lines() -> AsyncIterator[bytes]:
            outcome = "disconnected"
            outputs: dict[int, RequestOutput] = {}
            try:
                async with stack:
                    async for chunk in self._chunks(streams, responses, len(jobs), outputs, begin):
                        yield b"data: " + dumps(chunk) + b"\n\n"
                every = [outputs[i] for i in range(len(jobs))]
                if wants_usage:
                    yield b"data: " + dumps(responses.usage(every)) + b"\n\n"
                outcome = "ok"
                yield b"data: [DONE]\n\n"
            except Exception as error:
                status, said = describe(error, {})
                outcome = _outcome(error, status)
                yield b"data: " + dumps(said) + b"\n\n"
            finally:
                if outcome == "ok":
                    self.metrics.answered(every, begin)
                else:
                    self.metrics.ended(outcome)

        return StreamingResponse(lines(), headers=_STREAM_HEADERS, media_type="text/event-stream")

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
