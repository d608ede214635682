# SPDX-License-Identifier: Apache-2.0
"""From the body of a request to what an engine is asked for, the caps held against it."""

from __future__ import annotations

import dataclasses
import secrets
from dataclasses import dataclass
from typing import Any

from ivg_fast.params import SearchParams
from ivg_fast.prompts import derive_seed
from ivg_fast.rendering import PromptInput
from ivg_fast.server.config import ServerConfig
from ivg_fast.server.errors import RequestError
from ivg_fast.server.protocol import ChatRequest, CompletionRequest


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt of a request, with its seed."""

    prompt: PromptInput
    params: SearchParams
    seed: int


def jobs_of(
    body: CompletionRequest | ChatRequest, defaults: SearchParams, config: ServerConfig
) -> list[Job]:
    """What Engine.generate does with the same prompts, params and seed.

    Args:
        defaults: what a request does not say; `n` of a request that asks for no search is a number
            of independent samples.

    Raises:
        RequestError, InvalidParameterError: names the field.
    """
    given = body.search_fields()
    if isinstance(body, ChatRequest):
        _check_chat(body)
    else:
        _check_completion(body)
        if "logprobs" in given:  # OpenAI's 0: of the tokens themselves
            given["logprobs"] = given["logprobs"] is not False
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options", "stream_options needs stream")
    _check_caps(given, config)
    width, candidates = (
        given.get(name, getattr(defaults, name)) for name in ("beam_width", "num_candidates")
    )
    if width == candidates == 1 and not {"beam_width", "num_candidates"} & set(given):
        given["num_candidates"] = given.get("n", defaults.n)
    params = dataclasses.replace(defaults, **given)
    prompts = body.prompts
    if not prompts:
        raise RequestError("prompt", "prompt must hold a prompt")
    num_rows = params.pool_size * len(prompts)
    if num_rows > config.max_rows:
        raise RequestError(
            "beam_width",
            f"beam_width * num_candidates * prompts = {num_rows} must be at most {config.max_rows}",
        )
    seed = secrets.randbits(64) if params.seed is None else params.seed
    return [Job(prompt, params, derive_seed(seed, i)) for i, prompt in enumerate(prompts)]


def _check_chat(body: ChatRequest) -> None:
    if body.max_completion_tokens is not None and body.max_tokens is not None:
        raise RequestError(
            "max_completion_tokens", "max_completion_tokens must stand without max_tokens"
        )


def _check_completion(body: CompletionRequest) -> None:
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise RequestError(
            "best_of",
            f"best_of must be n here, got {body.best_of}: num_candidates and scorer say how many "
            "are ranked, and by what",
        )
    logprobs = body.logprobs
    if logprobs is not None and not isinstance(logprobs, bool) and logprobs != 0:
        raise RequestError(
            "logprobs",
            f"logprobs must be true, false or 0, got {logprobs}: those of other tokens are not "
            "measured",
        )


def _check_caps(given: dict[str, Any], config: ServerConfig) -> None:
    most = config.max_response_tokens
    if given.get("max_tokens", 0) > most:
        raise RequestError(
            "max_tokens", f"max_tokens must be at most {most}, got {given['max_tokens']}"
        )
    stops = given.get("stop", ())
    if not isinstance(stops, str) and len(stops) > config.max_stops:
        raise RequestError(
            "stop", f"stop must be at most {config.max_stops} strings, got {len(stops)}"
        )
