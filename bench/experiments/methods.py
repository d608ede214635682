# SPDX-License-Identifier: Apache-2.0
"""The methods of the comparison, the rule that chooses a guidance weight, and the sweeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ivg_fast import SearchParams

WIDTH, NUM_CANDIDATES, CHUNK = 4, 4, 5
# The paper's controlled-sentiment experiment (arXiv 2409.17819): T 0.7, 50 tokens, no end of text.
SAMPLING: dict[str, Any] = {"max_tokens": 50, "temperature": 0.7, "ignore_eos": True}
GUIDED = ("eft", "args", "ivg")
WIDE = "_wide"
# Around (W, K, L) = (4, 4, 5), one at a time; L of 50 is one chunk.
SWEPT: dict[str, tuple[int, ...]] = {
    "beam_width": (1, 2, 4, 8),
    "num_candidates": (2, 4, 8),
    "chunk_length": (1, 2, 5, 10, 25, 50),
}


@dataclass(frozen=True, slots=True)
class Method:
    """A named way to decode; `weight` is its guidance weight, None without guidance."""

    name: str
    params: SearchParams

    @property
    def weight(self) -> float | None:
        return None if self.params.guidance == "none" else self.params.guidance_weight


def method(
    name: str, weight: float | None = None, sampling: Mapping[str, Any] = SAMPLING
) -> Method:
    """The method of that name at W, K, L = 4, 4, 5; guided ones need a weight.

    `args` is z = base + w * s(. | prefix) with the vocabulary head, over all tokens: the engine's
    top-k filters the combined logits, so ARGS's restriction to the base's top k is not made.
    """
    kind = name.removesuffix(WIDE)
    search = {"beam_width": WIDTH, "num_candidates": NUM_CANDIDATES, "chunk_length": CHUNK}
    if kind in GUIDED:
        if weight is None:
            raise ValueError(f"method {name} needs a weight")
        guided: dict[str, Any] = {"guidance_weight": weight, **sampling}
        params = {
            "eft": lambda: SearchParams.eft(**guided),
            "args": lambda: SearchParams(guidance="explicit", **guided),
            "ivg": lambda: SearchParams.ivg(**search, **guided),
        }[kind]()
        return Method(name, params)
    params = {
        "base": lambda: SearchParams.base(**sampling),
        "best_of_16": lambda: SearchParams.best_of_n(WIDTH * NUM_CANDIDATES, **sampling),
        "cbs_implicit": lambda: SearchParams.cbs(scorer="implicit", **search, **sampling),
        "cbs_explicit": lambda: SearchParams.cbs(scorer="explicit", **search, **sampling),
    }[kind]()
    return Method(name, params)


def main_methods(
    chosen: Mapping[str, float], sampling: Mapping[str, Any] = SAMPLING
) -> list[Method]:
    """The rows of the main table; `chosen` has the weight of each guided row."""
    rows = [
        method("base", sampling=sampling),
        method("best_of_16", sampling=sampling),
        method("eft", chosen["eft"], sampling),
        method("args", chosen["args"], sampling),
        method("cbs_implicit", sampling=sampling),
        method("cbs_explicit", sampling=sampling),
        method("ivg", chosen["ivg"], sampling),
    ]
    # A wider grid that chooses the same weight says nothing new.
    return rows + [
        method(kind + WIDE, chosen[kind + WIDE], sampling)
        for kind in GUIDED
        if chosen.get(kind + WIDE, chosen[kind]) != chosen[kind]
    ]


def weight_methods(
    weights: Sequence[float], sampling: Mapping[str, Any] = SAMPLING
) -> list[Method]:
    """Base, and each guided method with each weight: what the rule chooses from."""
    return [
        method("base", sampling=sampling),
        *(method(kind, w, sampling) for kind in GUIDED for w in sorted(weights)),
    ]


def search_sweep(ivg_weight: float, sampling: Mapping[str, Any] = SAMPLING) -> list[Method]:
    """CBS(explicit) and IVG over W, K and L, one at a time; each setting once."""
    found: dict[SearchParams, Method] = {}
    for centre in (
        method("cbs_explicit", sampling=sampling),
        method("ivg", ivg_weight, sampling),
    ):
        for field, values in SWEPT.items():
            for value in values:
                changed: dict[str, Any] = {field: value}
                if field == "chunk_length" and value >= sampling["max_tokens"]:
                    changed[field] = None
                params = replace(centre.params, **changed)
                found.setdefault(params, Method(centre.name, params))
    return list(found.values())


def choose_weight(rows: Sequence[Mapping[str, Any]], name: str, min_distinct: float) -> float:
    """The weight of highest gold reward whose distinct-2 is >= min_distinct times the base's.

    A bag-of-words reward is easily won by saying "great" all the time. Where no weight passes, the
    one of highest distinct-2. `rows` have "method", "weight", "gold", "distinct_2"; one is "base".
    """
    (base,) = (row for row in rows if row["method"] == "base")
    own = [row for row in rows if row["method"] == name]
    fluent = [row for row in own if row["distinct_2"] >= min_distinct * base["distinct_2"]]
    if fluent:
        return float(max(fluent, key=lambda row: row["gold"])["weight"])
    return float(max(own, key=lambda row: row["distinct_2"])["weight"])


def choose_weights(
    rows: Sequence[Mapping[str, Any]], weights: Sequence[float], min_distinct: float
) -> dict[str, float]:
    """Chosen weights: of "eft", "args", "ivg" out of `weights`, of "eft_wide" and so on out of all
    that `rows` tried."""
    narrow = [row for row in rows if row["weight"] is None or row["weight"] in weights]
    return {kind: choose_weight(narrow, kind, min_distinct) for kind in GUIDED} | {
        kind + WIDE: choose_weight(rows, kind, min_distinct) for kind in GUIDED
    }
