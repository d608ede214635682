# SPDX-License-Identifier: Apache-2.0
"""From finished cells to the figures that are reported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bench.experiments.cells import CellResult
from bench.experiments.measures import Measure
from bench.experiments.methods import WIDE, Method
from bench.experiments.statistics import bootstrap, distinct_n, perplexity, selection_bound
from ivg_fast.request import ROLES

LOADED = 0.5  # other processes that want a core, beyond which times are marked


@dataclass(slots=True)
class Judges:
    """The measures of a run, and where they are cached. `judge` reads the first seed only.

    Figures call the second judge of rewards by the name of its measure.
    """

    folder: Path
    gold: Measure
    second: Measure
    base: Measure
    judge: Measure | None = None
    num_judged: int | None = None


@dataclass(slots=True)
class MethodResult:
    """A method's figures, and what the comparisons need: rewards f64[seeds, prompts]."""

    method: Method
    figures: dict[str, Any]
    gold: NDArray[np.float64]
    second: NDArray[np.float64]


def measure_method(
    method: Method, results: Sequence[CellResult], judges: Judges, num_threads: int
) -> MethodResult:
    """Every figure of a method; `results` has a cell a seed, on the same prompts."""

    def table(measure: Measure) -> NDArray[np.float64]:
        return np.array([measure.rows(judges.folder, result) for result in results])

    gold, second = table(judges.gold)[..., 0], table(judges.second)[..., 0]
    base = table(judges.base)
    records = [record for result in results for record in result.records]
    texts = [record["response"] for record in records]
    logprobs = np.array([[r["logprob"] for r in result.records] for result in results])
    log_ratio = logprobs - base[..., 0]
    bound = selection_bound(method.params)
    figures: dict[str, Any] = {
        "weight": method.weight,
        "params": {
            name: value
            for name, value in asdict(method.params).items()
            if name in ("beam_width", "num_candidates", "chunk_length", "guidance", "scorer")
        },
        "gold": float(gold.mean()),
        "gold_interval_95": bootstrap(gold.mean(0)),
        "gold_by_seed": gold.mean(1).tolist(),
        judges.second.name: float(second.mean()),
        **{f"distinct_{n}": distinct_n(texts, n) for n in (1, 2, 3)},
        "perplexity_base": perplexity(base[..., 1].ravel().tolist(), base[..., 2].ravel().tolist()),
        "kl": {
            "log_ratio": float(log_ratio.mean()),
            "log_ratio_interval_95": bootstrap(log_ratio.mean(0)),
            "selection_bound": bound,
            "total": float(log_ratio.mean()) + bound,
            "is_upper_bound": bound > 0,
        },
        "tokens_forwarded": {
            role: float(np.mean([r["tokens_forwarded"].get(role, 0) for r in records]))
            for role in ROLES
        },
        **times([batch for result in results for batch in result.batches], num_threads),
    }
    if judges.judge is not None:
        rows = np.array(judges.judge.rows(judges.folder, results[0], judges.num_judged))
        figures["perplexity_judge"] = perplexity(rows[:, 0].tolist(), rows[:, 1].tolist())
    return MethodResult(method, figures, gold, second)


def times(batches: Sequence[Mapping[str, Any]], num_threads: int) -> dict[str, Any]:
    """Seconds a prompt, on the wall and of this process; whether others wanted the cores too."""
    num_prompts = sum(batch["num_prompts"] for batch in batches)
    return {
        "seconds": sum(batch["seconds"] for batch in batches) / num_prompts,
        "cpu_seconds": sum(batch["cpu_seconds"] for batch in batches) / num_prompts,
        "is_loaded": any(batch["load"] > num_threads + LOADED for batch in batches),
    }


def differences(
    results: Mapping[str, MethodResult], what: Literal["gold", "second"] = "gold"
) -> dict[str, Any]:
    """Reward of each method against base, and of IVG against each: mean and interval.

    Paired over prompts: the seeds of a prompt are averaged first.
    """
    pairs = [(name, "base") for name in results if name != "base"]
    pairs += [("ivg", name) for name in results if name not in ("base", "ivg")]
    found = {}
    for a, b in pairs:
        difference = getattr(results[a], what).mean(0) - getattr(results[b], what).mean(0)
        found[f"{a} - {b}"] = {
            "mean": float(difference.mean()),
            "interval_95": bootstrap(difference),
        }
    return found


def at_equal_kl(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """For weights of IVG: its gold reward minus EFT's where EFT is as far from the base.

    IVG's KL is taken at its upper bound, EFT between its weights by linear interpolation; weights
    at which EFT was never that far are left out. `rows` are those of a weight sweep.
    """
    eft = sorted(
        (row["kl"]["total"], row["gold"]) for row in rows if row["method"] in ("base", "eft")
    )
    distances, golds = zip(*eft, strict=True)
    ivg = [row for row in rows if row["method"] == "ivg" and row["kl"]["total"] <= distances[-1]]
    own = np.interp([row["kl"]["total"] for row in ivg], distances, golds)
    return [
        {"weight": row["weight"], "difference": row["gold"] - float(gold)}
        for row, gold in zip(ivg, own, strict=True)
    ]


def order(found: Mapping[str, Any]) -> dict[str, bool]:
    """The paper's order as claims; one holds where the interval of its difference is above 0."""
    claims = ["eft - base", "cbs_implicit - base", "cbs_explicit - base"]
    # IVG at another weight is no other method.
    claims += [name for name in found if name.startswith("ivg - ") and name != f"ivg - ivg{WIDE}"]
    return {claim: found[claim]["interval_95"][0] > 0 for claim in claims}
