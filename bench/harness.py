# SPDX-License-Identifier: Apache-2.0
"""Side-by-side timing: providers take turns within one run, so that what disturbs one disturbs all.

A measurement is the 20th, 50th and 80th percentile of many single calls, each from a cold cache
unless told otherwise. Every record says its configuration, device and versions.
"""

from __future__ import annotations

import csv
import json
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

FLUSH_BYTES = 256 << 20

Call = Callable[[], Any]


@dataclass(frozen=True)
class Record:
    kernel: str
    provider: str
    metric: str
    unit: str
    x: str
    y_20: float
    y_50: float
    y_80: float
    config: str
    device: str
    versions: str


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    names = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def versions() -> str:
    return f"python {platform.python_version()}, torch {torch.__version__}"


def captured(call: Call) -> Call:
    """`call` as the replay of a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


class Stopwatch:
    """Times single calls on a device, in seconds."""

    def __init__(self, device: str, *, is_cold: bool) -> None:
        self.device = device
        self.is_cold = is_cold
        self._flush = torch.zeros(FLUSH_BYTES // 4, device=device)

    def time(self, call: Call) -> float:
        if self.is_cold:
            self._flush += 1
        if self.device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) * 1e-3
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin


def compare(
    kernel: str,
    x: str,
    providers: dict[str, Call],
    *,
    config: str,
    device: str = "cpu",
    num_rounds: int = 30,
    is_cold: bool = True,
) -> list[Record]:
    """Time each provider `num_rounds` times in turn, the order rotating from round to round."""
    watch = Stopwatch(device, is_cold=is_cold)
    for call in providers.values():
        call()
        call()
    names = list(providers)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(num_rounds):
        for i in range(len(names)):
            name = names[(turn + i) % len(names)]
            times[name].append(watch.time(providers[name]))
    return [
        Record(
            kernel,
            name,
            "time",
            "us",
            x,
            *(round(float(q), 2) for q in np.percentile(np.array(each) * 1e6, [20, 50, 80])),
            config + ("" if is_cold else ", warm cache"),
            device_name(device),
            versions(),
        )
        for name, each in times.items()
    ]


def write_csv(path: Path, records: Iterable[Record]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Record)])
        writer.writeheader()
        writer.writerows(asdict(record) for record in records)


def print_records(records: list[Record], ours: str) -> None:
    """A line a provider: median, spread, and how many times as long as `ours` it takes."""
    own = {(r.kernel, r.x): r.y_50 for r in records if r.provider == ours}
    for r in records:
        ratio = r.y_50 / own[r.kernel, r.x]
        print(
            f"{r.kernel:<24} {r.x:<18} {r.provider:<28} {r.y_50:>10.1f} {r.unit} "
            f"[{r.y_20:.1f}, {r.y_80:.1f}]  x {ratio:.2f}",
            flush=True,
        )


def print_summary(summary: dict[str, Any]) -> None:
    """The last line of a bench: one JSON object."""
    print(json.dumps(summary))
