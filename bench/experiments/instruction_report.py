# SPDX-License-Identifier: Apache-2.0
"""From verdicts on responses to accuracies with intervals, and the files that say so."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.experiments.ifeval import Verdict
from bench.experiments.instructions import Item
from bench.experiments.statistics import bootstrap

LEVELS = ("prompt_strict", "instruction_strict", "prompt_loose", "instruction_loose")


def table(verdicts: Sequence[Verdict]) -> dict[str, NDArray[np.float64]]:
    """[2, prompts] by level: what counts as followed, and out of how many.

    At prompt level a prompt counts once, where all its instructions are followed; at instruction
    level it counts as often as it has instructions.
    """
    found = {}
    for kind in ("strict", "loose"):
        lists = [getattr(verdict, kind) for verdict in verdicts]
        ones = np.ones(len(lists))
        found[f"prompt_{kind}"] = np.array([[all(v) for v in lists], ones], dtype=np.float64)
        counts = [[sum(v) for v in lists], [len(v) for v in lists]]
        found[f"instruction_{kind}"] = np.array(counts, dtype=np.float64)
    return found


def ratio_interval(
    first: NDArray[np.float64],
    second: NDArray[np.float64] | None = None,
    seed: int = 0,
    draws: int = 10_000,
) -> list[float]:
    """95% percentile interval of sum(followed) / sum(count), by resampling prompts.

    With `second`: of the difference first - second, on the same resampled prompts.
    """
    if second is None and (first[1] == 1).all():
        return bootstrap(first[0], seed, draws)
    rng = np.random.default_rng(seed)
    index = rng.integers(0, first.shape[1], (draws, first.shape[1]))

    def ratios(pair: NDArray[np.float64]) -> NDArray[np.float64]:
        return pair[0][index].sum(-1) / pair[1][index].sum(-1)

    values = ratios(first) - (0.0 if second is None else ratios(second))
    return np.quantile(values, [0.025, 0.975]).tolist()


def accuracy(pair: NDArray[np.float64]) -> float:
    return float(pair[0].sum() / pair[1].sum())


def figures(
    verdicts: Mapping[str, Sequence[Verdict]], records: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, Any]:
    """Accuracies by method and level, paired differences, and what the responses took."""
    tables = {name: table(found) for name, found in verdicts.items()}
    methods = {}
    for name, levels in tables.items():
        rows = records[name]
        methods[name] = {
            **{
                level: {
                    "mean": accuracy(levels[level]),
                    "interval_95": ratio_interval(levels[level]),
                }
                for level in LEVELS
            },
            "tokens": float(np.mean([row["num_tokens"] for row in rows])),
            "share_finished": float(np.mean([row["finish_reason"] == "stop" for row in rows])),
            "seconds": float(np.mean([row["seconds"] for row in rows])),
            "forwarded": {
                role: float(np.mean([row["forwarded"].get(role, 0) for row in rows]))
                for role in sorted({role for row in rows for role in row["forwarded"]})
            },
        }
    pairs = [(name, "base") for name in tables if name != "base" and "base" in tables]
    pairs += [("ivg", name) for name in tables if name not in ("base", "ivg") and "ivg" in tables]
    differences = {
        f"{a} - {b}": {
            level: {
                "mean": accuracy(tables[a][level]) - accuracy(tables[b][level]),
                "interval_95": ratio_interval(tables[a][level], tables[b][level]),
            }
            for level in LEVELS
        }
        for a, b in pairs
    }
    return {"methods": methods, "differences": differences}


def write(
    out: Path,
    summary: Mapping[str, Any],
    items: Sequence[Item],
    verdicts: Mapping[str, Sequence[Verdict]],
) -> None:
    """summary.json, report.md and per_prompt.csv: numbers of prompts and figures, no text."""
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    (out / "report.md").write_text("\n".join(render(summary)) + "\n", encoding="utf-8")
    with (out / "per_prompt.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["prompt", "instructions", "method", "strict", "loose"])
        for method, found in verdicts.items():
            for item, verdict in zip(items, found, strict=True):
                counts = sum(verdict.strict), sum(verdict.loose)
                writer.writerow([item.key, len(verdict.strict), method, *counts])


def render(summary: Mapping[str, Any]) -> list[str]:
    """The report's lines."""
    methods, differences = summary["methods"], summary["differences"]
    params, recipe = summary["params"], summary.get("recipe")
    lines = [
        "# Instruction following: IFEval",
        "",
        f"{summary['num_prompts']} of {summary['num_in_file']} prompts of IFEval "
        f"(drawn by seed {summary['subset_seed']}), judged by its own checkers, lm-eval's copy. "
        f"Models: {summary['setup']}. W, K, L = {params['beam_width']}, "
        f"{params['num_candidates']}, {params['chunk_length']}; temperature "
        f"{params['temperature']:g}, top-k {params['top_k']}, weight "
        f"{params['guidance_weight']:g}, at most {params['max_tokens']} new tokens, seed "
        f"{summary['seed']}. Accuracy in percent with 95% bootstrap intervals over prompts.",
        "",
    ]
    if recipe:
        lines += [
            f"The guides are of `ivg-fast train instruct`: {recipe['num_pairs']} pairs, "
            f"{recipe['num_samples']} samples. On {recipe['num_heldout_pairs']} held-out pairs of "
            f"its own prompts the implicit value ranks {recipe['implicit_accuracy']:.3f} rightly, "
            f"the explicit one {recipe['value_accuracy']:.3f}.",
            "",
        ]
    head = ["method", *(level.replace("_", ", ") for level in LEVELS)]
    head += ["tokens", "ended", "s / prompt", "tokens forwarded"]
    rows = [
        [
            name,
            *(_shown(row[level]) for level in LEVELS),
            f"{row['tokens']:.0f}",
            f"{100 * row['share_finished']:.0f}%",
            f"{row['seconds']:.1f}",
            ", ".join(f"{role} {count:.0f}" for role, count in row["forwarded"].items()),
        ]
        for name, row in methods.items()
    ]
    lines += _table(head, rows)
    if differences:
        lines += ["", "Differences, paired over prompts, in percentage points:", ""]
        rows = [
            [name, *(_shown(row[level], "+") for level in LEVELS)]
            for name, row in differences.items()
        ]
        lines += _table(["difference", *head[1:5]], rows)
    versions = ", ".join(f"{name} {v}" for name, v in summary["versions"].items())
    return [*lines, "", f"Made by `{summary['command']}`; {versions}."]


def _shown(found: Mapping[str, Any], sign: str = "") -> str:
    low, high = found["interval_95"]
    return f"{100 * found['mean']:{sign}.1f} ({100 * low:{sign}.1f} to {100 * high:{sign}.1f})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]
