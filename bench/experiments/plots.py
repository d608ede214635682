# SPDX-License-Identifier: Apache-2.0
"""Plots of a run: gold reward against KL to the base and against time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from bench.experiments.report import label

_COLOURS = {
    "base": "0.35",
    "best_of_16": "tab:brown",
    "eft": "tab:blue",
    "args": "tab:green",
    "cbs_implicit": "tab:purple",
    "cbs_explicit": "tab:orange",
    "ivg": "tab:red",
}


def draw(summary: Mapping[str, Any], folder: Path) -> list[Path]:
    """Writes reward_kl.png and reward_time.png; returns their paths."""
    methods, timing = summary["methods"], summary.get("timing", {})
    weights = summary.get("weight_sweep", [])
    searches = summary.get("search_sweep", [])

    def kl(row: Mapping[str, Any]) -> float:
        return row["kl"]["total"]

    def seconds(row: Mapping[str, Any]) -> float:
        return row["cpu_seconds"]

    figure, axes = plt.subplots(figsize=(8, 5.5))
    for kind in ("eft", "args", "ivg"):
        own = sorted((r for r in weights if r["method"] == kind), key=lambda r: r["weight"])
        _line(axes, kind, [kl(row) for row in own], own, "weights, dev prompts")
    for name, row in methods.items():
        _point(axes, name, kl(row), row, kl=row["kl"])
    axes.set_xlabel("KL to the base, nats a response (where it is bounded: its range)")
    paths = [_finish(figure, axes, folder / "reward_kl.png")]

    figure, axes = plt.subplots(figsize=(8, 5.5))
    for kind in ("cbs_explicit", "ivg"):
        own = [row for row in searches if row["method"] == kind]
        axes.scatter(
            [seconds(row) for row in own],
            [row["gold"] for row in own],
            s=14,
            alpha=0.6,
            color=_COLOURS[kind],
            label=f"{label(kind)}: W, K, L, dev prompts" if own else None,
        )
        for row in own:
            p = row["params"]
            text = f"{p['beam_width']},{p['num_candidates']},{p['chunk_length'] or 'all'}"
            axes.annotate(text, (seconds(row), row["gold"]), fontsize=6, alpha=0.7)
    for name, row in methods.items():
        _point(axes, name, seconds(timing.get(name, row)), row)
    axes.set_xscale("log")
    axes.set_xlabel("CPU seconds a prompt")
    return [*paths, _finish(figure, axes, folder / "reward_time.png")]


def _line(
    axes: Axes, kind: str, xs: Sequence[float], rows: Sequence[Mapping[str, Any]], what: str
) -> None:
    if not rows:
        return
    ys = [row["gold"] for row in rows]
    name = f"{label(kind)}: {what}"
    axes.plot(xs, ys, "o-", ms=3, lw=1, alpha=0.5, color=_COLOURS[kind], label=name)
    for x, row in zip(xs, rows, strict=True):
        axes.annotate(f"{row['weight']:g}", (x, row["gold"]), fontsize=6, alpha=0.7)


def _point(
    axes: Axes, name: str, x: float, row: Mapping[str, Any], *, kl: Mapping[str, Any] | None = None
) -> None:
    colour = _COLOURS[name.removesuffix("_wide")]
    low, high = row["gold_interval_95"]
    axes.errorbar(
        [x],
        [row["gold"]],
        yerr=[[row["gold"] - low], [high - row["gold"]]],
        fmt="D" if name.endswith("_wide") else "s",
        color=colour,
        capsize=2,
        label=label(name),
        xerr=None if kl is None else [[x - kl["log_ratio"]], [0]],
    )


def _finish(figure: Any, axes: Axes, path: Path) -> Path:
    axes.set_ylabel("gold reward (log-odds)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
