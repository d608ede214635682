# SPDX-License-Identifier: Apache-2.0
"""The figures that a GPU run is held to, looked up in its CSVs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.harness import Record, read_csv
from bench.models import BOUND, REFERENCE
from bench.ops import COMPILED, EAGER
from bench.run import OURS

_Median = Callable[[str, str, str, str], float | None]


def _at_most(what: str, value: float | None, limit: float, unit: str) -> Iterator[dict[str, Any]]:
    if value is not None:
        target = f"at most {limit:g} {unit}".rstrip()
        yield {"what": what, "measured": value, "target": target, "is_met": value <= limit}


def _at_least(what: str, value: float | None, limit: float, unit: str) -> Iterator[dict[str, Any]]:
    if value is not None:
        target = f"at least {limit:g} {unit}".rstrip()
        yield {"what": what, "measured": value, "target": target, "is_met": value >= limit}


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above / below


def _sampling(median: _Median) -> Iterator[dict[str, Any]]:
    warm, cold = (f"guided_sample, graph, {cache}" for cache in ("warm", "cold"))
    for x in ("B=64 V=128256", "B=256 V=128256"):
        share = median(cold, x, OURS, "share of copy bandwidth")
        yield from _at_least(f"guided_sample, {x}, cold: of copy bandwidth", share, 85, "%")
    for x in ("B=16 V=32000", "B=16 V=128256"):
        own = median(warm, x, OURS, "time")
        yield from _at_most(f"guided_sample, {x}, in a graph", own, 6, "us")
        eager = median("guided_sample", x, EAGER, "time")
        name = f"guided_sample, {x}: eager chain / ours in a graph"
        yield from _at_least(name, _ratio(eager, own), 10, "")
        compiled = _ratio(median(warm, x, COMPILED, "time"), own)
        yield from _at_least(f"guided_sample, {x}, in graphs: compiled / ours", compiled, 3, "")


def _models(median: _Median, device: str) -> Iterator[dict[str, Any]]:
    def step(family: str, wk: int, provider: str) -> float | None:
        return median(f"IVG, {family}", f"WK={wk}", provider, "time per step")

    own = step("llama2", 16, OURS)
    name = "three Llama-2-7B, 16 candidates"
    yield from _at_most(f"{name}: step / weights", _ratio(own, step("llama2", 16, BOUND)), 1.4, "")
    reference = _ratio(step("llama2", 16, REFERENCE), own)
    yield from _at_least(f"{name}: {REFERENCE} / ours", reference, 2.5, "")
    rate = _ratio(1e3, step("llama3", 1, OURS))
    wanted = 155 if "H200" in device else 120
    name = "Llama-3-8B with two 1B guides, one sequence"
    yield from _at_least(name, rate, wanted, "tokens/s")
    reference = _ratio(step("gpt2", 16, REFERENCE), step("gpt2", 16, OURS))
    name = f"GPT-2-large with two GPT-2, 16 candidates: {REFERENCE} / ours"
    yield from _at_least(name, reference, 8, "")


def of_records(records: Iterable[Record]) -> list[dict[str, Any]]:
    """What was measured, the target, and whether it is met; nothing of what was left out."""
    every = list(records)
    medians = {(r.kernel, r.x, r.provider, r.metric): r.y_50 for r in every}
    device = every[0].device if every else ""

    def median(kernel: str, x: str, provider: str, metric: str) -> float | None:
        return medians.get((kernel, x, provider, metric))

    return [*_sampling(median), *_models(median, device)]


def verdicts(files: Sequence[Path]) -> list[dict[str, Any]]:
    """`of_records` of several CSVs."""
    return of_records(record for file in files for record in read_csv(file))
