# SPDX-License-Identifier: Apache-2.0
"""Which bursts share buffers and a captured step: what is not an entry of a buffer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from ivg_fast.params import SearchParams
from ivg_fast.request import LiveRequest


@dataclass(frozen=True, slots=True)
class SegmentKey:
    """Rows of one kind of guidance, and what their sampler has to look at."""

    guidance: str
    num_rows: int
    has_top_k: bool
    has_top_p: bool
    has_min_p: bool
    has_bans: bool
    has_value_on_trunk: bool


@dataclass(frozen=True, slots=True)
class RowsKey:
    """All that is not an entry of a buffer: bursts of equal keys replay one step."""

    segments: tuple[SegmentKey, ...]
    table_width: int
    num_stops: int

    @classmethod
    def of_plan(cls, plan: Any, requests: Sequence[LiveRequest]) -> RowsKey:
        """Args: of Scheduler.plan(), and the requests of plan.request_ids."""
        counts = iter(plan.num_samples.tolist())
        segments = []
        for guidance, group in groupby(requests, lambda request: request.params.guidance):
            members = list(group)
            params: list[SearchParams] = [request.params for request in members]
            segments.append(
                SegmentKey(
                    guidance,
                    bucket(sum(next(counts) for _ in members)),
                    has_top_k=any(p.top_k > 0 for p in params),
                    has_top_p=any(p.top_p < 1 for p in params),
                    has_min_p=any(p.min_p > 0 for p in params),
                    has_bans=any(p.min_tokens > 0 for p in params),
                    has_value_on_trunk=any(r.has_value_on_trunk for r in members),
                )
            )
        num_stops = max((len(request.stop_ids) for request in requests), default=0)
        return cls(tuple(segments), power_of_two(plan.table_width), power_of_two(num_stops))

    @property
    def num_rows(self) -> int:
        return sum(segment.num_rows for segment in self.segments)


def bucket(num_rows: int) -> int:
    """Rows that a segment has room for: powers of two up to 8, then multiples of 8, 16 and 32."""
    if num_rows <= 8:
        return power_of_two(num_rows)
    step = 8 if num_rows <= 32 else 16 if num_rows <= 128 else 32
    return -(-num_rows // step) * step


def power_of_two(n: int) -> int:
    """The least power of two that is at least n, and 1."""
    return 1 << max(n - 1, 0).bit_length()
