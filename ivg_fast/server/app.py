# SPDX-License-Identifier: Apache-2.0
"""The application: routes, the key, the life of the engine behind them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

import ivg_fast
from ivg_fast.async_engine import AsyncEngine
from ivg_fast.errors import InvalidParameterError
from ivg_fast.params import SearchParams
from ivg_fast.server.config import ServerConfig
from ivg_fast.server.endpoints import Endpoints
from ivg_fast.server.errors import ErrorBody, JSONResponse, RequestError, add_handlers
from ivg_fast.server.gate import Gate
from ivg_fast.server.metrics import Metrics
from ivg_fast.server.protocol import ChatRequest, CompletionRequest

_REFUSALS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}}
_ERRORS: dict[int | str, dict[str, Any]] = {**_REFUSALS, "5XX": {"model": ErrorBody}}


def create_app(
    engine: AsyncEngine,
    model_name: str,
    *,
    defaults: SearchParams,
    config: ServerConfig | None = None,
    api_key: str | None = None,
) -> FastAPI:
    """An ASGI application in OpenAI's form. Its `state.end_requests()`, called on its event loop,
    ends those that run and refuses more: their clients get status 503.

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
    ends: list[asyncio.Future[None]] = []
    app.state.end_requests = lambda: ends.append(
        asyncio.ensure_future(engine.shutdown(drain=False))
    )
    add_handlers(app, metrics.ended)
    app.add_middleware(
        Gate,
        api_key=api_key,
        max_body_bytes=config.max_body_bytes,
        on_refused=lambda: metrics.ended("refused"),
    )
    _add_routes(app, Endpoints(engine, config.model_name or model_name, defaults, config, metrics))
    return app


def _add_routes(app: FastAPI, endpoints: Endpoints) -> None:
    @app.post("/v1/completions", responses=_ERRORS, response_class=JSONResponse)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await endpoints.respond(body, request)

    @app.post("/v1/chat/completions", responses=_ERRORS, response_class=JSONResponse)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        return await endpoints.respond(body, request)

    @app.get("/v1/models", response_class=JSONResponse)
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [endpoints.card]})

    @app.get("/v1/models/{model:path}", response_class=JSONResponse)
    async def model(model: str) -> Response:
        try:
            endpoints.check_model(model)
        except RequestError as error:
            return endpoints.refuse(error, {})
        return JSONResponse(endpoints.card)

    @app.head("/health", include_in_schema=False)
    @app.get("/health", response_class=JSONResponse, responses={503: {}})
    async def health() -> Response:
        is_running = endpoints.engine.is_running
        said = {"status": "ok" if is_running else "stopped"}
        return JSONResponse(said, 200 if is_running else 503)

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        return Response(endpoints.metrics.text(), media_type=CONTENT_TYPE_LATEST)
