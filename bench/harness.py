# SPDX-License-Identifier: Apache-2.0
"""Side-by-side timing: providers take turns within one run, so that what disturbs one disturbs all.

A measurement is the 20th, 50th and 80th percentile of many single calls, each from a cold cache
unless told otherwise. Every record says its configuration, device, versions and command.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

FLUSH_BYTES = 256 << 20
MAX_SETS = 128
FILLER_CYCLES = 200_000  # about 0.1 ms
SCALE = {"s": 1.0, "ms": 1e3, "us": 1e6}

Call = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Record:
    """One line of a CSV.

    Attributes:
        kernel: what was measured.
        provider: whose implementation.
        metric, unit: "time" in s, ms or us, "share of read bandwidth" in %, a counter in tokens...
        x: where on the sweeps, "B=16 V=32000".
        y_20, y_50, y_80: percentiles; all the same for what is exact.
        config: everything else that the figure depends on.
        device, versions: of the machine that ran it.
        command: what ran it, from the repository's root.
    """

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
    command: str

    @property
    def place(self) -> dict[str, int]:
        """`x` by name."""
        pairs = (part.split("=") for part in self.x.split())
        return {name: int(value) for name, value in pairs}


def as_x(place: Mapping[str, int]) -> str:
    """The field `x` of a place."""
    return " ".join(f"{name}={value}" for name, value in place.items())


def percentiles(values: Sequence[float] | np.ndarray) -> tuple[float, float, float]:
    """20th, 50th and 80th, to four significant digits; a single value is exact and stays so."""
    if len(values) == 1:
        return (float(values[0]),) * 3
    low, middle, high = (float(f"{q:.4g}") for q in np.percentile(values, [20, 50, 80]))
    return low, middle, high


class Repeated:
    """Calls in turn as one; times count a single one of them.

    On a GPU it is a CUDA graph, so that only the device's time is left: no launch of the host's.

    Args:
        calls: must not wait for the device. Each runs once beforehand.
    """

    def __init__(self, calls: Sequence[Call], device: str) -> None:
        self.num_calls = len(calls)
        self._calls = calls
        self._graph: torch.cuda.CUDAGraph | None = None
        if device != "cuda":
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in dict.fromkeys(calls):
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        self._graph = graph

    def __call__(self) -> None:
        if self._graph is not None:
            self._graph.replay()
            return
        for call in self._calls:
            call()


class Stopwatch:
    """Times single calls on a device, in seconds.

    On a GPU, by events: a call begins on an idle device, so that what the host takes to launch it
    counts; a Repeated begins behind other work, so that its launch does not.
    """

    def __init__(self, device: str, *, is_cold: bool) -> None:
        self.device = device
        self._flush = torch.zeros(FLUSH_BYTES // 4, device=device) if is_cold else None

    def time(self, call: Call) -> float:
        num_calls = call.num_calls if isinstance(call, Repeated) else 1
        if self._flush is not None and not isinstance(call, Repeated):
            self._flush += 1
        if self.device == "cuda":
            torch.cuda.synchronize()
            if isinstance(call, Repeated):
                torch.cuda._sleep(FILLER_CYCLES)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) * 1e-3 / num_calls
        begin = time.perf_counter()
        call()
        return (time.perf_counter() - begin) / num_calls


def cache_bytes(device: str) -> int:
    """Of a GPU's L2; 0 for a CPU, whose caches are flushed instead."""
    return torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 0


def num_cold_sets(num_bytes: int, num_cached: int) -> int:
    """Sets of inputs of `num_bytes` to take in turn, so that none is in a cache of `num_cached`
    bytes when its turn comes: twice what fits there.

    Returns:
        0 where that is more than MAX_SETS.
    """
    wanted = max(2, -(-2 * num_cached // num_bytes))
    return wanted if wanted <= MAX_SETS else 0


def take_turns(
    watch: Stopwatch, providers: Mapping[str, Call], num_rounds: int, num_warm_ups: int
) -> dict[str, np.ndarray]:
    """Seconds [num_rounds] of each provider, the order rotating from round to round."""
    for call in providers.values():
        for _ in range(num_warm_ups):
            call()
    names = list(providers)
    times = {name: np.zeros(num_rounds) for name in names}
    for turn in range(num_rounds):
        for i in range(len(names)):
            name = names[(turn + i) % len(names)]
            times[name][turn] = watch.time(providers[name])
    return times


def write_csv(path: Path, records: Iterable[Record]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Record)])
        writer.writeheader()
        writer.writerows(asdict(record) for record in records)


def read_csv(path: Path) -> list[Record]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    numbers = ("y_20", "y_50", "y_80")
    return [Record(**row | {name: float(row[name]) for name in numbers}) for row in rows]
