# SPDX-License-Identifier: Apache-2.0
"""Errors in OpenAI's form: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from ivg_fast.errors import (
    CapacityError,
    EngineStoppedError,
    InvalidParameterError,
    IVGError,
    QueueFullError,
    UnsupportedModelError,
)

_LOG = logging.getLogger("ivg_fast")
_MAX_MESSAGE, _MAX_NAME = 1000, 100

INVALID, OVERLOADED, FAILED = "invalid_request_error", "overloaded_error", "server_error"
_CODES = {401: "invalid_api_key", 404: "not_found", 405: "not_allowed", 413: "body_too_large"}


class ErrorDetail(BaseModel):
    """What went wrong; `param` is the field of the request that it is about."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every response that is none."""

    error: ErrorDetail


class RequestError(Exception):
    """A request that this server refuses.

    Args:
        param: the field that it is about.
        message: why.
    """

    def __init__(
        self, param: str | None, message: str, *, status: int = 400, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.param = param
        self.status = status
        self.code = code


class JSONResponse(Response):
    """JSON in ASCII: what a request may have held of half characters can be said in it."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return dumps(content)


def dumps(content: Any) -> bytes:
    """One line of JSON."""
    return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def describe(error: BaseException, names: Mapping[str, str]) -> tuple[int, dict[str, Any]]:
    """The status and the body of an error.

    Args:
        names: how the request calls the parameters that it calls otherwise.
    """
    message, kind, param, code = str(error), INVALID, None, None
    if isinstance(error, RequestError):
        status, code = error.status, error.code
        param = None if error.param is None else names.get(error.param, error.param)
    elif isinstance(error, InvalidParameterError):
        status, param = 400, names.get(error.parameter, error.parameter)
    elif isinstance(error, CapacityError):
        status, code = 400, "capacity_exceeded"
    elif isinstance(error, UnsupportedModelError):
        status, param, code = 400, "guidance", "unsupported"
    elif isinstance(error, QueueFullError):
        status, kind, code = 429, OVERLOADED, "queue_full"
    elif isinstance(error, EngineStoppedError):
        status, kind, code = 503, FAILED, "stopped"
    elif isinstance(error, IVGError):  # of a model or a scorer
        status, kind, code = 500, FAILED, type(error).__name__
    else:
        status, kind, code = 500, FAILED, "internal_error"
        message = "internal error"
    if status == 500:
        _LOG.error("a request failed", exc_info=error)
    return status, _body(message, kind, param, code)


def error_response(
    error: BaseException, names: Mapping[str, str], retry_after_s: int
) -> JSONResponse:
    """The response to a request that ended in this error."""
    status, body = describe(error, names)
    headers = {"Retry-After": str(retry_after_s)} if status in (429, 503) else None
    return JSONResponse(body, status, headers)


def add_handlers(app: FastAPI, ended: Callable[[str], None]) -> None:
    """Errors that arise before a request reaches its route; `ended` is told the outcome of each
    whose body is not as it should be, or does not come."""

    async def on_validation(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        ended("invalid")
        return _invalid(error)

    async def on_http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code == 400:  # a body that cannot be read
            is_gone = isinstance(error.__cause__, ClientDisconnect)
            ended("disconnected" if is_gone else "invalid")
        return refusal(error.status_code, str(error.detail), error.headers)

    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(Exception, _on_exception)


def refusal(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The response to a request that is not looked at."""
    return JSONResponse(_body(message, INVALID, None, _CODES.get(status)), status, headers)


def _body(message: str, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    param = None if param is None else _shortened(param, _MAX_NAME)
    message = _shortened(message, _MAX_MESSAGE)
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _shortened(text: str, length: int) -> str:
    """It may quote a whole prompt, or a name that somebody has made up."""
    return text if len(text) <= length else text[:length] + "..."


def _invalid(error: RequestValidationError) -> Response:
    found = error.errors()
    if found[0]["type"] == "json_invalid":
        return JSONResponse(_body("the body must be JSON", INVALID, None, "invalid_json"), 400)
    # Of a union every branch complains: the field is theirs in common.
    place = [str(part) for part in found[0]["loc"][1:]]
    if not place:
        message = "the body must be a JSON object, sent with Content-Type: application/json"
        return JSONResponse(_body(message, INVALID, None, "invalid_json"), 400)
    param = place[0]
    said = dict.fromkeys(f"{'.'.join(map(str, e['loc'][1:]))}: {e['msg']}" for e in found)
    return JSONResponse(_body("; ".join(said), INVALID, param, None), 400)


async def _on_exception(_: Request, error: Exception) -> Response:
    status, body = describe(error, {})
    return JSONResponse(body, status)
