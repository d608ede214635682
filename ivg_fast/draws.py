# SPDX-License-Identifier: Apache-2.0
"""What a burst draws, and what the sampler is told of the requests that it draws for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ivg_fast.batches import Int32s, Int64s
from ivg_fast.request import LiveRequest

# guided_sample's argument, SearchParams' field
_FIELDS = (
    ("weight", "guidance_weight"),
    ("temperature", "temperature"),
    ("top_k", "top_k"),
    ("top_p", "top_p"),
    ("min_p", "min_p"),
)


@dataclass(slots=True)
class BurstResult:
    """What was drawn, [num_steps, B] each; a candidate's columns count up to num_tokens."""

    tokens: Int32s
    logprobs: NDArray[np.float32]
    base_logprobs: NDArray[np.float32]
    rewards: NDArray[np.float32]
    values: NDArray[np.float32]
    num_tokens: Int32s
    finish: NDArray[np.uint8]
    stop_index: Int32s

    @classmethod
    def empty(cls, num_steps: int, num_samples: int) -> BurstResult:
        shape = (num_steps, num_samples)
        return cls(
            tokens=np.zeros(shape, np.int32),
            logprobs=np.zeros(shape, np.float32),
            base_logprobs=np.zeros(shape, np.float32),
            rewards=np.zeros(shape, np.float32),
            values=np.zeros(shape, np.float32),
            num_tokens=np.zeros(num_samples, np.int32),
            finish=np.zeros(num_samples, np.uint8),
            stop_index=np.full(num_samples, -1, np.int32),
        )

    @property
    def drawn(self) -> tuple[NDArray[Any], ...]:
        """The arguments of Scheduler.commit_tokens."""
        measured = (self.tokens, self.logprobs, self.base_logprobs, self.rewards)
        return (*measured, self.num_tokens, self.finish, self.stop_index)


def sampling_arguments(
    requests: Sequence[LiveRequest], of_request: Int32s, stop_ids: Int64s
) -> dict[str, Any]:
    """guided_sample's arguments that are parameters of the requests.

    Args:
        requests: those of a plan.
        of_request: [B], whose each sample is, an index into `requests`.
        stop_ids: [B, M], the ids that end each sample, -1 for none.
    """
    drawing = [requests[i] for i in np.unique(of_request).tolist()]
    arguments: dict[str, Any] = {}
    for argument, name in _FIELDS:
        values = {getattr(request.params, name) for request in drawing}
        if len(values) == 1:
            arguments[argument] = values.pop()
        else:
            arguments[argument] = np.array([getattr(r.params, name) for r in requests])[of_request]
    if any(request.params.min_tokens for request in drawing):
        arguments["banned_ids"] = stop_ids
        until = np.array([r.params.min_tokens for r in requests], np.int64)
        arguments["banned_until"] = until[of_request]
    return arguments


def padded(rows: Sequence[Int64s]) -> Int64s:
    """Ragged rows as one matrix, -1 for none."""
    width = max((len(row) for row in rows), default=0)
    matrix = np.full((len(rows), width), -1, np.int64)
    for i, row in enumerate(rows):
        matrix[i, : len(row)] = row
    return matrix
