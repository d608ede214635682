# SPDX-License-Identifier: Apache-2.0
"""The bodies of requests: OpenAI's fields, and every field of SearchParams beside them."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    WithJsonSchema,
    create_model,
)
from typing_extensions import TypeAliasType

from ivg_fast.params import Guidance, SearchParams

_STRICT = ConfigDict(strict=True, extra="forbid")
# A long list of another kind is one error, not one an item.
_Texts = TypeAliasType("_Texts", Annotated[list[str], FailFast()])
_Ids = TypeAliasType("_Ids", Annotated[list[int], FailFast()])
_IdLists = TypeAliasType("_IdLists", Annotated[list[_Ids], FailFast()])
_FIELDS = {field.name: field for field in dataclasses.fields(SearchParams)}
_HINTS = typing.get_type_hints(SearchParams)
# JSON has no callables; `logprobs` means something else in each of the two kinds of requests.
_JSON_TYPES = {
    "scorer": Guidance,
    "stop": str | _Texts,
    "stop_token_ids": _Ids,
    "logprobs": bool | int,
}


def _field(name: str) -> Any:
    """A field of SearchParams that may be absent: (type, default). Its values are checked there."""
    return (_JSON_TYPES.get(name, _HINTS[name]) | None, None)


SearchFields: type[BaseModel] = create_model(
    "SearchFields", __config__=_STRICT, **{name: _field(name) for name in _FIELDS}
)


def _one_of(*values: Any) -> Any:
    """A field of OpenAI's that is served with these values alone."""

    def check(value: Any) -> Any:
        if value is None or value in values:
            return value
        raise ValueError(f"is not supported by this server: must be null or one of {values}")

    schema = {"enum": [*values, None]}
    return Annotated[Any, AfterValidator(check), WithJsonSchema(schema)]


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = _STRICT

    include_usage: bool = False
    include_obfuscation: bool = False  # pads chunks; says nothing of the response


class _GenerationRequest(SearchFields):  # type: ignore[misc, valid-type]
    """What both kinds of requests have.

    A null means that a field is absent, but for those that SearchParams itself may have None in.
    """

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    # Accepted, as nothing in a response depends on them.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None

    frequency_penalty: _one_of(0) = None  # type: ignore[valid-type]
    presence_penalty: _one_of(0) = None  # type: ignore[valid-type]
    logit_bias: _one_of({}) = None  # type: ignore[valid-type]

    def search_fields(self) -> dict[str, Any]:
        """The fields of SearchParams that were given."""
        given = {name: getattr(self, name) for name in _FIELDS if name in self.model_fields_set}
        may_be_none = {name for name in given if type(None) in typing.get_args(_HINTS[name])}
        return {k: v for k, v in given.items() if v is not None or k in may_be_none}


class CompletionRequest(_GenerationRequest):
    """A body of /v1/completions."""

    prompt: str | _Texts | _Ids | _IdLists
    best_of: int | None = None
    echo: _one_of(False) = None  # type: ignore[valid-type]
    suffix: _one_of("") = None  # type: ignore[valid-type]

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """One or several texts or lists of token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [typing.cast(list[int], self.prompt)]
        return typing.cast(list[str] | list[list[int]], self.prompt)


class TextPart(BaseModel):
    """A piece of a message."""

    model_config = _STRICT

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A message of a chat."""

    model_config = _STRICT

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def plain(self) -> dict[str, str]:
        """As chat templates take it; they know "developer" by its former name."""
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatRequest(_GenerationRequest):
    """A body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1), FailFast()]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: _one_of(0) = None  # type: ignore[valid-type]

    # Accepted, as nothing in a response depends on them.
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    service_tier: _one_of("auto", "default") = None  # type: ignore[valid-type]
    parallel_tool_calls: bool | None = None

    tools: _one_of([]) = None  # type: ignore[valid-type]
    tool_choice: _one_of("none", "auto") = None  # type: ignore[valid-type]
    functions: _one_of([]) = None  # type: ignore[valid-type]
    function_call: _one_of("none", "auto") = None  # type: ignore[valid-type]
    response_format: _one_of({"type": "text"}) = None  # type: ignore[valid-type]
    modalities: _one_of(["text"]) = None  # type: ignore[valid-type]
    store: _one_of(False) = None  # type: ignore[valid-type]

    @property
    def prompts(self) -> Sequence[list[dict[str, str]]]:
        """The chat, as one prompt."""
        return [[message.plain() for message in self.messages]]

    def search_fields(self) -> dict[str, Any]:
        """As of every request; max_completion_tokens is max_tokens."""
        given = super().search_fields()
        if self.max_completion_tokens is not None:
            given["max_tokens"] = self.max_completion_tokens
        return given
