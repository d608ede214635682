# SPDX-License-Identifier: Apache-2.0
"""PNGs of the records: a figure for each kernel and each axis that was swept."""

from __future__ import annotations

import re
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from bench.harness import Record

# What is drawn; counters that explain a figure stay in the CSV.
METRICS = (
    *("time", "time per token", "KV", "forwarded tokens", "model calls"),
    *("throughput", "time to first event", "time between tokens", "end to end"),
)
AXES = {
    "B": "rows",
    "V": "vocabulary",
    "P": "prompt tokens",
    "q": "queries a row",
    "T": "response tokens",
    "WK": "W * K candidates",
    "tokens": "tokens written",
    "pairs": "blocks copied",
    "prompts": "prompts at once",
    "clients": "clients",
}


def draw(records: Sequence[Record], folder: Path) -> list[Path]:
    """One PNG for each kernel, metric and axis with two values or more; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for (kernel, metric, axis, rest), swept in sorted(_sweeps(records).items()):
        name = re.sub(r"\W+", "_", f"{kernel} {metric} by {AXES[axis]} {rest}").strip("_")
        path = folder / f"{name.lower()}.png"
        title = f"{kernel}: {metric}{f' at {rest}' if rest else ''}"
        _figure(title, axis, swept).savefig(path, dpi=120)
        paths.append(path)
    return paths


def _sweeps(records: Sequence[Record]) -> dict[tuple[str, str, str, str], list[Record]]:
    """Records by kernel, metric, axis, and the place on the other axes."""
    found = defaultdict(list)
    for record in records:
        place = record.place
        for axis in place:
            if record.metric in METRICS and axis in AXES:
                rest = " ".join(f"{k}={v}" for k, v in place.items() if k != axis)
                found[record.kernel, record.metric, axis, rest].append((place[axis], record))
    return {
        key: [record for _, record in sorted(each, key=lambda pair: pair[0])]
        for key, each in found.items()
        if len({x for x, _ in each}) > 1
    }


def _figure(title: str, axis: str, records: Sequence[Record]) -> Figure:
    """A line a provider, with the 20th to 80th percentile as a band."""
    lines = defaultdict(list)
    for record in records:
        lines[record.provider].append(record)
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(8, 4.2), layout="constrained")
        axes = figure.subplots()
        for provider, each in lines.items():
            x = [record.place[axis] for record in each]
            (line,) = axes.plot(x, [r.y_50 for r in each], marker="o", ms=3, label=provider)
            axes.fill_between(
                x,
                [r.y_20 for r in each],
                [r.y_80 for r in each],
                color=line.get_color(),
                alpha=0.15,
                linewidth=0,
            )
        every = sorted({record.place[axis] for record in records})
        if every[-1] >= 8 * max(every[0], 1):
            axes.set_xscale("log", base=2)
        axes.set_xticks(every, [str(x) for x in every])
        axes.minorticks_off()
        heights = [record.y_50 for record in records]
        if min(heights) > 0 and max(heights) > 8 * min(heights):
            axes.set_yscale("log")
        axes.set_xlabel(AXES[axis])
        axes.set_ylabel(f"{records[0].metric}, {records[0].unit}")
        axes.set_title(title)
        figure.legend(frameon=False, loc="outside right upper")
        caption = f"{records[0].config}; {records[0].device}"
        figure.supxlabel(textwrap.fill(caption, 120), fontsize=6, color="gray")
    return figure
