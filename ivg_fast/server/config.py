# SPDX-License-Identifier: Apache-2.0
"""What a server is called, where it listens and what it lets through."""

from __future__ import annotations

from dataclasses import dataclass

from ivg_fast.errors import InvalidParameterError
from ivg_fast.params import check_integer


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """How a server listens, and the caps on one HTTP request. What is over a cap is refused.

    The length of a prompt is capped by EngineConfig.max_prompt_tokens, the number of waiting
    requests by EngineConfig.max_queued_requests.

    Attributes:
        host: address to listen at; the default is reached from this machine alone.
        port: 0: any that is free.
        model_name: as clients call the model; None: the base model's last path component.
        max_body_bytes: bytes of a request's body.
        max_rows: beam_width * num_candidates * prompts of a request.
        max_response_tokens: max_tokens of a request.
        max_stops: stop strings of a request.
        retry_after_s: seconds after which those that the queue has no room for are told to return.
        drain_timeout_s: seconds that requests may still take once the server is told to end; what
            runs then is told so, with status 503.
        niceness: by how much the engine's threads step back behind the event loop, 0 to 19: what
            is sent and accepted takes little time, but should not wait for a decode step.

    Raises:
        InvalidParameterError: names the field and the value.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    model_name: str | None = None
    max_body_bytes: int = 1 << 20
    max_rows: int = 64
    max_response_tokens: int = 2048
    max_stops: int = 16
    retry_after_s: int = 1
    drain_timeout_s: int = 30
    niceness: int = 10

    def __post_init__(self) -> None:
        if not isinstance(self.host, str) or not self.host:
            raise InvalidParameterError("host", self.host, "must be an address")
        if self.model_name is not None and (
            not isinstance(self.model_name, str) or not self.model_name
        ):
            raise InvalidParameterError("model_name", self.model_name, "must be a name")
        check_integer("port", self.port, 0, 65535)
        for name in ("max_body_bytes", "max_rows", "max_response_tokens", "retry_after_s"):
            check_integer(name, getattr(self, name), 1)
        check_integer("max_stops", self.max_stops, 0)
        check_integer("drain_timeout_s", self.drain_timeout_s, 0, 10**6)
        check_integer("niceness", self.niceness, 0, 19)
