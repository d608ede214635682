# SPDX-License-Identifier: Apache-2.0
"""What every microbenchmark shares: its options, its records, what it leaves behind."""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ivg_fast
from bench.harness import (
    SCALE,
    Call,
    Record,
    Repeated,
    Stopwatch,
    as_x,
    percentiles,
    take_turns,
    write_csv,
)
from ivg_fast import _C

OURS = "ivg_fast"
LIMIT_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
NUM_IN_A_GRAPH = 20  # calls, at the least


def device_name(device: str) -> str:
    """The processor; for a CPU with the instruction set and threads in use."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    names = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    name = names[0] if names else platform.machine()
    return f"{name}, {_C.cpu_isa()}, threads {torch.get_num_threads()}"


def versions() -> str:
    return (
        f"python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {version('transformers')}, ivg_fast {ivg_fast.__version__}"
    )


def bandwidths(device: str, num_rounds: int) -> dict[str, np.ndarray]:
    """GB/s [num_rounds] that this machine copies at (read and written) and reads at."""
    num_bytes = LIMIT_BYTES[device]
    source = torch.zeros(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    providers: dict[str, Call] = {"copy": lambda: target.copy_(source), "read": source.sum}
    if device == "cuda":
        providers = {name: Repeated([call] * 4, device) for name, call in providers.items()}
    times = take_turns(Stopwatch(device, is_cold=False), providers, num_rounds, 2)
    moved = {"copy": 2 * num_bytes, "read": num_bytes}
    return {name: moved[name] / seconds * 1e-9 for name, seconds in times.items()}


def at_least_one(text: str) -> int:
    """A count on the command line."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _device(text: str) -> str:
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("must be cpu, as no CUDA is here, got cuda")
    return text


def parser_of(
    doc: str | None, *, has_cuda: bool = False, has_cold: bool = True, has_limit: bool = True
) -> argparse.ArgumentParser:
    """The options of microbenchmarks.

    Args:
        has_cuda: it runs on a GPU, too.
        has_cold: it flushes caches, so that there is a --warm.
        has_limit: it can leave out what there is no time for, so that there is a --seconds.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    devices = ["cpu", *["cuda"] * has_cuda]
    parser.add_argument("--device", type=_device, default="cpu", choices=devices)
    parser.set_defaults(seconds=None, warm=False)
    parser.add_argument("--quick", action="store_true", help="few shapes and rounds")
    if has_limit:
        parser.add_argument("--seconds", type=float, help="begin nothing that would end later")
    parser.add_argument("--rounds", type=at_least_one, help="timed calls of each provider")
    parser.add_argument("--threads", type=at_least_one, default=torch.get_num_threads())
    if has_cold:
        parser.add_argument("--warm", action="store_true", help="leave the caches as they are")
    parser.add_argument("--out", type=Path, metavar="FILE", help="CSV of all records")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw PNGs into this folder")
    return parser


class Run:
    """One run of a microbenchmark and its records.

    Args:
        name: as in `python -m bench NAME`.
        options: of `parser_of`.
        argv: the command line behind the name.
        num_rounds: without --rounds, and with --quick.
    """

    def __init__(
        self,
        name: str,
        options: argparse.Namespace,
        argv: Sequence[str],
        num_rounds: tuple[int, int] = (30, 8),
    ) -> None:
        self.name = name
        self.options = options
        self.device: str = options.device
        self.uses_graphs = self.device == "cuda"
        self.num_rounds: int = options.rounds or num_rounds[options.quick]
        torch.set_num_threads(options.threads)
        self.command = f"python -m bench {name}{_without_paths(argv)}"
        self.records: list[Record] = []
        self.limits: dict[str, float] = {}
        self.left_out: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        self._begin = self._last = time.monotonic()
        self._longest = 0.0
        self._device_name, self._versions = device_name(self.device), versions()

    def has_time(self, what: str, expected: float | None = None) -> bool:
        """Whether there is time for `what`, else it is among those left out.

        Args:
            expected: seconds that it may take; None: as long as the longest so far.
        """
        self.save()  # it may be ended before it finishes
        now = time.monotonic()
        self._longest, self._last = max(self._longest, now - self._last), now
        limit = self.options.seconds
        needed = self._longest if expected is None else expected
        if limit is None or now - self._begin + needed <= limit:
            return True
        self.leave_out(what, f"no time left of {limit:g} s")
        return False

    def leave_out(self, what: str, why: str) -> None:
        """Says in the results that something was not measured."""
        self.left_out[what] = why
        print(f"left out: {what}: {why}", flush=True)

    def fail(self, what: str, why: str) -> None:
        """Says in the results that something went wrong; others go on."""
        self.failed[what] = why
        print(f"failed: {what}: {why}", flush=True)

    def measure_limits(self) -> None:
        """What the shares of later records refer to: the median bandwidths of this run."""
        for name, samples in bandwidths(self.device, max(self.num_rounds, 10)).items():
            x = {"MiB": LIMIT_BYTES[self.device] >> 20}
            self.add("limit", name, "bandwidth", "GB/s", x, samples, "one large tensor")
            self.limits[name] = self.records[-1].y_50
        self._last = time.monotonic()

    def add(
        self,
        kernel: str,
        provider: str,
        metric: str,
        unit: str,
        x: Mapping[str, int],
        samples: Sequence[float] | np.ndarray,
        config: str,
    ) -> None:
        """Keeps the percentiles of `samples`, which is one number where it is exact."""
        record = Record(
            kernel,
            provider,
            metric,
            unit,
            as_x(x),
            *percentiles(samples),
            config,
            self._device_name,
            self._versions,
            self.command,
        )
        self.records.append(record)
        if metric in ("time", "time per step", "bandwidth"):
            print(
                f"{kernel:<26} {record.x:<24} {provider:<32} {record.y_50:>10.6g} {unit} "
                f"[{record.y_20:.6g}, {record.y_80:.6g}]",
                flush=True,
            )

    def compare(
        self,
        kernel: str,
        x: Mapping[str, int],
        providers: Mapping[str, Call],
        config: str,
        *,
        unit: str = "us",
        num_warm_ups: int = 2,
        num_bytes: int | None = None,
        limit: str = "read",
    ) -> dict[str, np.ndarray]:
        """Times the providers in turn.

        Args:
            num_bytes: the least that any provider has to move; gives the share of `limit`, "read"
                or "copy" bandwidth, that each reaches.

        Returns:
            Seconds [num_rounds] of each.
        """
        # What takes milliseconds is none the colder for a flush.
        is_cold = unit == "us" and not self.options.warm
        watch = Stopwatch(self.device, is_cold=is_cold)
        times = take_turns(watch, providers, self.num_rounds, num_warm_ups)
        if self.options.warm:
            config += ", warm cache"
        for name, seconds in times.items():
            self.add(kernel, name, "time", unit, x, seconds * SCALE[unit], config)
            if num_bytes is not None:
                reached = num_bytes / seconds * 1e-9 / self.limits[limit] * 100
                self.add(kernel, name, f"share of {limit} bandwidth", "%", x, reached, config)
        if num_bytes is not None:
            self.add(kernel, "least", "bytes", "B", x, [num_bytes], config)
        return times

    def compare_in_graphs(
        self,
        kernel: str,
        x: Mapping[str, int],
        sets: Sequence[Mapping[str, Call]],
        config: str,
        *,
        num_bytes: int,
        limit: str = "copy",
        is_cold: bool = False,
    ) -> dict[str, dict[str, float]]:
        """The device's time alone, from a warm cache (one set again and again) and, with several
        sets, from a cold one (the sets in turn); `is_cold`: from a cold one alone, if there is one.

        Args:
            sets: of each set of inputs the providers, which must not wait for the device.
            num_bytes: as in `compare`.

        Returns:
            Median seconds by "warm" and "cold", and provider.
        """
        runs = {"warm": sets[:1]}
        if len(sets) > 1 and not self.options.warm:
            runs = {"cold": sets} if is_cold else {**runs, "cold": sets}
        found: dict[str, dict[str, float]] = {}
        watch = Stopwatch(self.device, is_cold=False)
        for cache, chosen in runs.items():
            times = -(-NUM_IN_A_GRAPH // len(chosen))
            repeated: dict[str, Call] = {}
            for name in chosen[0]:
                calls = [each[name] for each in chosen] * times
                try:
                    repeated[name] = Repeated(calls, self.device)
                except RuntimeError as error:
                    self.leave_out(f"{kernel} {as_x(x)}, {cache}: {name}", first_line(error))
            seconds = take_turns(watch, repeated, self.num_rounds, 2)
            where = f"{kernel}, graph, {cache}"
            how = f"{config}, {cache} cache: {len(chosen)} sets of inputs in turn"
            for name, each in seconds.items():
                self.add(where, name, "time", "us", x, each * SCALE["us"], how)
                reached = num_bytes / each * 1e-9 / self.limits[limit] * 100
                self.add(where, name, f"share of {limit} bandwidth", "%", x, reached, how)
            self.add(where, "least", "bytes", "B", x, [num_bytes], how)
            found[cache] = {name: float(np.median(each)) for name, each in seconds.items()}
        return found

    def ratios(self, ours: str = OURS) -> dict[str, float]:
        """How many times as long as `ours` each other provider takes, by kernel, x and provider."""
        times = [r for r in self.records if r.metric == "time"]
        own = {(r.kernel, r.x): r.y_50 for r in times if r.provider == ours}
        return {
            f"{r.kernel} {r.x}: {r.provider} / {ours}": round(r.y_50 / own[r.kernel, r.x], 3)
            for r in times
            if r.provider != ours and (r.kernel, r.x) in own
        }

    def save(self) -> None:
        """Writes the records so far, where that was asked for."""
        if self.options.out:
            write_csv(self.options.out, self.records)

    def finish(self, **summary: Any) -> None:
        """Writes what was asked for; the last line of stdout is one JSON object."""
        self.save()
        if self.options.plot:
            from bench.plots import draw  # matplotlib is for those who plot

            draw(self.records, self.options.plot)
        found = {
            "bench": self.name,
            "device": self._device_name,
            "versions": self._versions,
            "limits_GB_s": self.limits,
            "ratios": self.ratios(),
            "left_out": self.left_out,
            "failed": self.failed,
            **summary,
        }
        print(json.dumps(found), flush=True)


def first_line(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _without_paths(argv: Sequence[str]) -> str:
    """Arguments but for --out and --plot, which change nothing that is measured."""
    kept: list[str] = []
    words = iter(argv)
    for word in words:
        if word in ("--out", "--plot"):
            next(words, None)
        elif not word.startswith(("--out=", "--plot=")):
            kept.append(word)
    return "".join(f" {shlex.quote(word)}" for word in kept)
