# SPDX-License-Identifier: Apache-2.0
"""The contract that every backend of guided_sample keeps, checked in float64 without its code.

The id is kept by the filters, and C[i-1] - eps <= u * Z <= C[i] + eps, with C and Z the cumulative
mass and the total in float64 and eps = Z * (2^-20 + max|z/T| * 2^-23).

A float32 backend may see a threshold on the other side of a hair, which changes the kept set: any
set that a threshold within that hair allows is accepted, as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MASS_HAIR = 2.0**-18


@dataclass
class Row:
    """One sample's inputs: logits as float64 [V] (None where absent), parameters as numbers."""

    base: Tensor
    tuned: Tensor | None
    untuned: Tensor | None
    u: float
    weight: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    banned: tuple[int, ...] = ()


def combined(row: Row) -> Tensor:
    """z, with -inf at every token that may not be drawn."""
    z = row.base.clone()
    if row.tuned is not None and row.weight != 0:
        steer = row.tuned if row.untuned is None else row.tuned - row.untuned
        z = row.base + row.weight * steer
        out = (row.base == -torch.inf) | (row.tuned == -torch.inf)
        if row.untuned is not None:
            out |= row.untuned == -torch.inf
        z[out] = -torch.inf
    for token in row.banned:
        z[token] = -torch.inf
    return z


def is_drawable(row: Row) -> bool:
    """Whether the row must give a token."""
    for logits in (row.base, row.tuned, row.untuned):
        if logits is not None and bool((logits.isnan() | (logits == torch.inf)).any()):
            return False
    return bool((combined(row) > -torch.inf).any())


def _threshold(scaled: Tensor, row: Row, hair: float) -> float:
    """The smallest scaled logit that stays, by sorting; `hair` widens (or narrows) top-p's mass."""
    ordered = scaled[scaled > -torch.inf].sort(descending=True).values
    kept = ordered
    if row.top_k > 0 and row.top_k < len(ordered):
        kept = ordered[ordered >= ordered[row.top_k - 1]]
    limit = kept[-1]
    if row.top_p < 1:
        mass = (kept - kept[0]).exp()
        reached = mass.cumsum(0) >= row.top_p * (1 + hair) * mass.sum()
        first = int(reached.int().argmax()) if bool(reached.any()) else len(kept) - 1
        limit = kept[first]
    if row.min_p > 0:
        limit = torch.maximum(limit, ordered[0] + torch.tensor(row.min_p).double().log())
    return float(torch.minimum(limit, ordered[0]))


def violation(row: Row, token: int) -> str | None:
    """What is wrong with drawing `token`, or None."""
    z = combined(row)
    if not 0 <= token < len(z):
        return f"token {token} is outside the vocabulary"
    if z[token] == -torch.inf:
        return f"token {token} may not be drawn"
    finite = z[z > -torch.inf]
    if row.temperature == 0:
        hair = float(finite.abs().max()) * 2.0**-22
        if z[token] < finite.max() - hair:
            return f"token {token} is not the largest"
        ties = (z == z[token]).nonzero()[0]
        return None if int(ties[0]) == token else f"token {token} ties with a lower id"
    scaled = z / row.temperature
    size = float((finite / row.temperature).abs().max())
    hair = size * 2.0**-22
    problem = ""
    for mass_hair in (0.0, MASS_HAIR, -MASS_HAIR):
        limit = _threshold(scaled, row, mass_hair)
        for threshold in (limit, limit - hair, limit + hair):
            kept = scaled >= min(threshold, float(scaled.max()))
            if not kept[token]:
                problem = problem or f"token {token} is not kept: {scaled[token]} < {threshold}"
                continue
            mass = torch.where(kept, (scaled - scaled.max()).exp(), 0.0)
            cumulative = mass.cumsum(0)
            total = float(cumulative[-1])
            eps = total * (2.0**-20 + size * 2.0**-23)
            below = float(cumulative[token] - mass[token])
            if below - eps <= row.u * total <= float(cumulative[token]) + eps:
                return None
            problem = problem or (
                f"u * Z = {row.u * total} is outside [{below}, {float(cumulative[token])}] by {eps}"
            )
    return problem
