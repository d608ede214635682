# SPDX-License-Identifier: Apache-2.0
"""`python -m bench all`: every microbenchmark, each in a process of its own.

With --out DIR each leaves DIR/NAME_DEVICE.csv, where `python -m bench report` looks for them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.run import at_least_one

# name of the CSV -> arguments
BENCHES = {
    "ops": ("ops",),
    "ops_warm": ("ops", "--warm", "--no-isas"),
    "scheduler": ("scheduler",),
    "kv": ("kv",),
    "attention": ("attention",),
    "e2e": ("e2e",),
    "serve": ("serve",),
}
NOT_QUICK = ("ops_warm",)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds")
    parser.add_argument("--only", nargs="+", choices=BENCHES, default=list(BENCHES))
    parser.add_argument(
        "--threads", type=at_least_one, help="of each bench; default: torch's own number"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="a CSV of each bench")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="PNGs of each bench")
    options = parser.parse_args()
    chosen = [name for name in options.only if not (options.quick and name in NOT_QUICK)]
    if not chosen:
        parser.error(f"--quick leaves out {' '.join(options.only)}")
    begin = time.perf_counter()
    summaries: dict[str, Any] = {}
    failed = []
    for name, arguments in BENCHES.items():
        if name not in chosen:
            continue
        command = [sys.executable, "-m", "bench", *arguments]
        command += ["--quick"] * options.quick
        command += ["--threads", str(options.threads)] if options.threads else []
        command += ["--out", str(options.out / f"{name}_cpu.csv")] if options.out else []
        command += ["--plot", str(options.plot / name)] if options.plot else []
        print(f"== {name}", flush=True)
        started = time.perf_counter()
        last = ""
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            for line in child.stdout:
                print(line, end="", flush=True)
                last = line
        if child.returncode:
            failed.append(name)
            continue
        summaries[name] = {"seconds": round(time.perf_counter() - started, 1), **json.loads(last)}
    total = round(time.perf_counter() - begin, 1)
    print(json.dumps({"bench": "all", "seconds": total, "failed": failed, "benches": summaries}))
    if failed:
        raise SystemExit(1)
