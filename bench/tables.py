# SPDX-License-Identifier: Apache-2.0
"""The tables of bench/README.md: the paper's ablation, and the server under load."""

from __future__ import annotations

from pathlib import Path

from bench.harness import Record, read_csv

RESULTS = Path(__file__).resolve().parent / "results"
METHODS = ("base", "EFT", "CBS, implicit", "CBS, explicit", "IVG")
CANDIDATES = ("WK=1", "WK=4", "WK=16", "WK=64")
LATENCIES = ("time to first event", "time between tokens", "end to end")


def marked(name: str, lines: list[str]) -> str:
    """`lines` between the markers that `python -m bench report` looks for."""
    head = f"<!-- python -m bench report: {name}"
    return "\n".join([f"{head}begin -->", "", *lines, "", f"{head}end -->"])


def source(records: list[Record]) -> str:
    """What was run, and where."""
    one = records[0]
    return f"`{one.command}`: {one.config}. {one.device}; {one.versions}."


def ablation(results: Path = RESULTS) -> str:
    """Seconds, model calls, forwarded tokens and KV of each method, over W * K."""
    records = [r for r in read_csv(results / "e2e_cpu.csv") if r.kernel == "methods, candidates"]
    found = {(r.x, r.provider, r.metric): r.y_50 for r in records}
    lines = ["| W * K | method | time | model calls | tokens forwarded | KV |", "|" + "---|" * 6]
    for x in CANDIDATES:
        for method in METHODS:
            seconds, calls, tokens, kv = (
                found[x, method, metric]
                for metric in ("time", "model calls", "forwarded tokens", "KV")
            )
            lines.append(
                f"| {x.split('=')[1] if method == METHODS[0] else ''} | {method} | "
                f"{seconds:.2f} s | {calls:.0f} | {tokens:,.0f} | {kv / 1e6:.1f} MB |"
            )
    return marked("ablation, ", [*lines, "", source(records)])


def bounds(results: Path = RESULTS) -> str:
    """The search by the engine, by its forwards alone, and by reference_style."""
    kernels = ("IVG", "IVG, prompt")
    records = [r for r in read_csv(results / "e2e_cpu.csv") if r.kernel in kernels]
    times = {(r.kernel, r.x, r.provider): r.y_50 for r in records if r.metric == "time"}
    lines = [
        "| search | ivg_fast | forwards alone | times these | reference_style | times ivg_fast | "
        "times the forwards |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for kernel, x in dict.fromkeys((r.kernel, r.x) for r in records):
        ours = times[kernel, x, "ivg_fast"]
        bound = times[kernel, x, "bound: forwards alone"]
        theirs = times.get((kernel, x, "reference_style"))
        what = f"prompts at once: {x.removeprefix('prompts=')}"
        if kernel != "IVG":
            what = f"prompt tokens: {x.removeprefix('P=')}"
        shown = (
            " | ".join([f"{theirs:.2f} s", f"{theirs / ours:.2f}", f"{theirs / bound:.2f}"])
            if theirs
            else "| |"
        )
        lines.append(f"| {what} | {ours:.2f} s | {bound:.2f} s | {ours / bound:.2f} | {shown} |")
    return marked("bounds, ", [*lines, "", source(records)])


def serving(results: Path = RESULTS) -> str:
    """Throughput, latencies and the event loop's delay, over the number of clients."""
    records = read_csv(results / "serve_cpu.csv")
    found = {(r.kernel, r.x, r.metric): r.y_50 for r in records}

    def quantiles(kernel: str, x: str, name: str) -> str:
        return " / ".join(f"{found[kernel, x, name + q]:,.0f}" for q in ("", ", p95", ", p99"))

    levels = {r.kernel: None for r in records if r.x.startswith("clients=")}
    lines = [
        "| model | clients | tokens/s | first event, ms | between tokens, ms | end to end, ms | "
        "loop delay, p99.9, ms | idle process's, ms |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for kernel in levels:
        for x in dict.fromkeys(r.x for r in records if r.kernel == kernel):
            times = [quantiles(kernel, x, name) for name in LATENCIES]
            delay = found[kernel, x, "event loop delay, p99.9"]
            idle = found[kernel, x, "idle loop delay, p99.9"]
            throughput = found[kernel, x, "throughput"]
            lines.append(
                f"| {kernel.removeprefix('serve, ')} | {x.split('=')[1]} | "
                f"{throughput:,.0f} | {' | '.join(times)} | {delay:.0f} | {idle:.1f} |"
            )
    for kernel in (k for k in levels if (f"{k}, overload", "times=4", "shed") in found):
        shed = found[f"{kernel}, overload", "times=4", "shed"]
        late = found[f"{kernel}, overload", "times=4", "time to status 429, p99"]
        lines += [
            "",
            f"{kernel.removeprefix('serve, ')}, four times too much: {shed:.0f} % shed, told so "
            f"within {late:.0f} ms (p99); all others were answered.",
        ]
    kernel = "serve, IVG, joins"
    if joined := dict.fromkeys(r.x for r in records if r.kernel == kernel):
        lines += [
            "",
            "| max_join_steps | first chunk of one more IVG, 20 tokens, ms |",
            "|---:|---:|",
            *(f"| {x.split('=')[1]} | {quantiles(kernel, x, LATENCIES[0])} |" for x in joined),
        ]
    return marked("serving, ", [*lines, "", "p50 / p95 / p99. " + source(records)])
