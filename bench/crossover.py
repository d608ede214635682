# SPDX-License-Identifier: Apache-2.0
"""From which prompts and rows on it pays that rows share what they read of a prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

NEVER = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Point:
    """Median seconds at one place.

    Attributes:
        prompt: tokens that all rows share.
        rows: of the batch.
        alone, shared: where each row reads for itself, and where they read together.
    """

    prompt: int
    rows: int
    alone: float
    shared: float


@dataclass(frozen=True, slots=True)
class Switch:
    """Rows share from `min_shared_rows` and `min_shared_tokens` on, as in WorkListOptions.

    Attributes:
        regret: by how much its times exceed the better of both ways, in the geometric mean; 0.02 is
            two percent.
    """

    min_shared_rows: int
    min_shared_tokens: int
    regret: float


def regret(points: Sequence[Point], min_rows: int, min_tokens: int) -> float:
    """Of one switch."""
    logs = [
        math.log(
            (p.shared if p.rows >= min_rows and p.prompt >= min_tokens else p.alone)
            / min(p.alone, p.shared)
        )
        for p in points
    ]
    return math.exp(sum(logs) / len(logs)) - 1


def best_switch(points: Sequence[Point]) -> Switch:
    """The switch of least regret, among the places measured and never; of equals the one that
    shares least.

    Raises:
        ValueError: no points.
    """
    if not points:
        raise ValueError("points must hold at least one place")
    rows = sorted({p.rows for p in points} | {NEVER}, reverse=True)
    tokens = sorted({p.prompt for p in points} | {NEVER}, reverse=True)
    found = [Switch(r, t, regret(points, r, t)) for r in rows for t in tokens]
    return min(found, key=lambda switch: switch.regret)


def first_rows(points: Sequence[Point], gain: float = 1.03) -> Mapping[int, int | None]:
    """For each prompt the fewest rows from which on sharing is faster by `gain` at every larger
    number of rows, too; None: it never is."""
    found: dict[int, int | None] = {}
    for prompt in sorted({p.prompt for p in points}):
        first: int | None = None
        for point in sorted((p for p in points if p.prompt == prompt), key=lambda p: -p.rows):
            if point.shared * gain > point.alone:
                break
            first = point.rows
        found[prompt] = first
    return found
