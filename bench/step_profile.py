# SPDX-License-Identifier: Apache-2.0
"""Where a decode step's time goes on a GPU, from torch's profiler.

Two runs of different length are profiled; their difference, divided by the steps between them, is a
step without prefill and set-up.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# The first that matches a kernel's name says what kind it is.
KINDS = {
    "attention": r"^_attend|^_merge|flash|fmha|attention|softmax_warp",
    "sampling": r"^_measure|^_draw|^_narrow|^_close|^_mask|^_gather_logprobs|multinomial|"
    r"distribution|cumsum|scan|sort|topk|argmax",
    "kv": r"^_write|copy_blocks|^_copy$|index_copy|index_put",
    "matrix products": r"gemm|gemv|cutlass|xmma|nvjet|cublas|splitK|sm\d+_.*tensorop|dot_kernel",
    "norms": r"norm",
}
OTHER = "element-wise and other"
LAUNCHES = re.compile(r"^(cuda|cu)LaunchKernel")
GRAPHS = re.compile(r"^(cuda|cu)GraphLaunch")
WAITS = re.compile(r"^(cuda|cu)(Stream|Device|Event|Ctx)Synchronize")
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True, slots=True)
class Profile:
    """What happened between the first and the last event of a run.

    Attributes:
        span_us: from the first to the last event, of the host or of the device.
        busy_us: in which the device did anything.
        kinds_us: device time by kind; more than busy_us where kernels ran at once.
        counts: of kernels, launches, graph launches, waits of the host, copies.
        kernels_us: device time by kernel.
    """

    span_us: float
    busy_us: float
    kinds_us: Mapping[str, float]
    counts: Mapping[str, int]
    kernels_us: Mapping[str, float]


def kind_of(kernel: str) -> str:
    """Of a kernel's name."""
    for kind, pattern in KINDS.items():
        if re.search(pattern, kernel, re.IGNORECASE):
            return kind
    return OTHER


def busy_time(intervals: Iterable[tuple[float, float]]) -> float:
    """Of (start, end): the length of their union."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def read_trace(events: Iterable[Mapping[str, Any]]) -> Profile:
    """From the `traceEvents` of a Chrome trace."""
    kinds: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    counts = Counter(dict.fromkeys(("kernels", "copies", "launches", "graph launches", "waits"), 0))
    on_device: list[tuple[float, float]] = []
    every: list[tuple[float, float]] = []
    for event in events:
        category, name = event.get("cat"), str(event.get("name"))
        if event.get("ph") != "X" or category not in (*ON_DEVICE, "cuda_runtime", "cuda_driver"):
            continue
        start, length = float(event["ts"]), float(event["dur"])
        every.append((start, start + length))
        if category in ON_DEVICE:
            on_device.append((start, start + length))
            kinds[kind_of(name) if category == "kernel" else "copies"] += length
            kernels[name[:100]] += length
            counts["kernels" if category == "kernel" else "copies"] += 1
        else:
            counts["launches"] += bool(LAUNCHES.match(name))
            counts["graph launches"] += bool(GRAPHS.match(name))
            counts["waits"] += bool(WAITS.match(name))
    if not every:
        return Profile(0.0, 0.0, {}, dict(counts), {})
    span = max(end for _, end in every) - min(start for start, _ in every)
    return Profile(span, busy_time(on_device), dict(kinds), dict(counts), dict(kernels))


def per_step(longer: Profile, shorter: Profile, num_steps: int, num_kernels: int = 12) -> Any:
    """What one of the `num_steps` between two runs takes, as a JSON object in microseconds."""

    def each(a: float, b: float) -> float:
        return round((a - b) / num_steps, 2)

    def difference(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
        found = {name: each(a.get(name, 0), b.get(name, 0)) for name in {*a, *b}}
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    span, busy = each(longer.span_us, shorter.span_us), each(longer.busy_us, shorter.busy_us)
    kernels = difference(longer.kernels_us, shorter.kernels_us)
    return {
        "span_us": span,
        "busy_us": busy,
        "gaps_us": round(span - busy, 2),
        "device_us_by_kind": difference(longer.kinds_us, shorter.kinds_us),
        "counts": difference(longer.counts, shorter.counts),
        "longest_kernels_us": dict(list(kernels.items())[:num_kernels]),
    }


def profiled(call: Callable[[], object], device: str) -> Profile:
    """One run under the profiler, which makes it slower where the host is what it waits for."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities = [torch.profiler.ProfilerActivity.CUDA]
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        with torch.profiler.profile(activities=activities) as profiler:
            call()
            if device == "cuda":
                torch.cuda.synchronize()
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        return read_trace(json.loads(file.read_text(encoding="utf-8"))["traceEvents"])
