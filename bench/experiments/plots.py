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

from bench.experiments.methods import GUIDED, WIDE
from bench.experiments.report import label, wording

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
    return [
        _reward_kl(summary, folder / "reward_kl.png"),
        _reward_time(summary, folder / "reward_time.png"),
    ]


def _reward_kl(summary: Mapping[str, Any], path: Path) -> Path:
    figure, axes = plt.subplots(figsize=(10, 5.5))
    weights = summary.get("weight_sweep", [])
    for kind in GUIDED:
        own = sorted((r for r in weights if r["method"] == kind), key=lambda r: r["weight"])
        if own:
            _line(axes, kind, own)
    for name, row in summary["methods"].items():
        _point(axes, name, row["kl"]["total"], row, least=row["kl"]["log_ratio"])
    axes.set_xlabel("KL to the base, nats a response (a range where it is only bounded)")
    return _finish(figure, axes, path, wording(summary).unit)


def _reward_time(summary: Mapping[str, Any], path: Path) -> Path:
    figure, axes = plt.subplots(figsize=(10, 5.5))
    searches = summary.get("search_sweep", [])
    for kind in ("cbs_explicit", "ivg"):
        own = [row for row in searches if row["method"] == kind]
        if not own:
            continue
        xs, ys = [row["cpu_seconds"] for row in own], [row["gold"] for row in own]
        what = f"{label(kind)}: W, K, L, dev prompts"
        axes.scatter(xs, ys, s=14, alpha=0.6, color=_COLOURS[kind], label=what)
        for x, y, row in zip(xs, ys, own, strict=True):
            p = row["params"]
            text = f"{p['beam_width']},{p['num_candidates']},{p['chunk_length'] or 'all'}"
            axes.annotate(text, (x, y), fontsize=6, alpha=0.7)
    timing = summary.get("timing", {})
    for name, row in summary["methods"].items():
        _point(axes, name, timing.get(name, row)["cpu_seconds"], row)
    axes.set_xscale("log")
    axes.set_xlabel("CPU seconds a prompt")
    return _finish(figure, axes, path, wording(summary).unit)


def _line(axes: Axes, kind: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Reward against KL over the weight; a band where the KL is only bounded."""
    least = [row["kl"]["log_ratio"] for row in rows]
    most = [row["kl"]["total"] for row in rows]
    ys = [row["gold"] for row in rows]
    name = f"{label(kind)}: weights, dev prompts"
    axes.plot(most, ys, "o-", ms=3, lw=1, alpha=0.5, color=_COLOURS[kind], label=name)
    if least != most:
        axes.fill_betweenx(ys, least, most, color=_COLOURS[kind], alpha=0.08, lw=0)
    for x, y, row in zip(most, ys, rows, strict=True):
        axes.annotate(f"{row['weight']:g}", (x, y), fontsize=6, alpha=0.7)


def _point(
    axes: Axes, name: str, x: float, row: Mapping[str, Any], *, least: float | None = None
) -> None:
    """A method on the test prompts, with its interval; `least` is where the range of x begins."""
    low, high = row["gold_interval_95"]
    axes.errorbar(
        [x],
        [row["gold"]],
        xerr=None if least is None else [[x - least], [0]],
        yerr=[[row["gold"] - low], [high - row["gold"]]],
        fmt="D" if name.endswith(WIDE) else "s",
        color=_COLOURS[name.removesuffix(WIDE)],
        capsize=2,
        label=label(name),
    )


def _finish(figure: Any, axes: Axes, path: Path, unit: str) -> Path:
    axes.set_ylabel(f"gold reward ({unit})")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
