# SPDX-License-Identifier: Apache-2.0
"""`make gpu-check`: builds in place and runs everything that needs a GPU, without a network.

Environment: ONLY, steps to run, separated by spaces or commas (default: all); OUT, where logs and
gpu_check.json go. Exits with 1 if a step failed.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
PYTEST = [sys.executable, "-m", "pytest", "-q"]
KERNEL_TESTS = "tests/triton_kernels"
# What the sanitizer slows down least and still reaches each kernel with.
SMALL = ["planted or grow or written or copied or prepares", KERNEL_TESTS]


def sanitizer(tool: str) -> list[str]:
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
    return [*command, *PYTEST, "-k", *SMALL]


def steps(out: Path) -> dict[str, list[list[str]]]:
    build = ["cmake", "-S", ".", "-B", "build/gpu", "-G", "Ninja", "-DIVG_FAST_CUDA=ON"]
    build.append(f"-DPython_EXECUTABLE={sys.executable}")
    bench = [sys.executable, "-m", "bench", "ops", "--device", "cuda"]
    return {
        "build": [build, ["cmake", "--build", "build/gpu"]],
        "tests": [[*PYTEST, "-m", "gpu", "tests"], [*PYTEST, KERNEL_TESTS]],
        "memcheck": [sanitizer("memcheck")],
        "racecheck": [sanitizer("racecheck")],
        "ops": [[*bench, "--out", str(out / "ops.csv")]],
    }


def run(name: str, commands: list[list[str]], out: Path) -> dict[str, object]:
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    if name.endswith("check"):  # each tensor an allocation of its own, whose end is seen
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    start = time.monotonic()
    code, last = 0, ""
    with (out / f"{name}.log").open("w") as log:
        for command in commands:
            done = subprocess.run(
                command, cwd=REPO, env=environment, stdout=subprocess.PIPE, stderr=log, text=True
            )
            log.write(done.stdout)
            code = code or done.returncode
            last = (done.stdout.strip().splitlines() or [""])[-1]
    seconds = round(time.monotonic() - start, 1)
    print(f"{name:<10} {'ok' if code == 0 else f'failed ({code})'} in {seconds} s: {last}")
    return {"returncode": code, "seconds": seconds, "last_line": last}


def main() -> int:
    out = Path(os.environ.get("OUT") or REPO / "build/gpu-check").resolve()
    out.mkdir(parents=True, exist_ok=True)
    every = steps(out)
    chosen = os.environ.get("ONLY", "").replace(",", " ").split() or list(every)
    unknown = sorted(set(chosen) - set(every))
    if unknown:
        raise SystemExit(f"ONLY must name some of {', '.join(every)}, got {', '.join(unknown)}")
    if shutil.which("nvidia-smi") is None:
        raise SystemExit("gpu-check needs a GPU: there is no nvidia-smi")
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    report: dict[str, object] = {
        "device": subprocess.run(query, capture_output=True, text=True).stdout.strip(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "triton", "transformers")},
    }
    results = {name: run(name, every[name], out) for name in every if name in chosen}
    report["steps"] = results
    (out / "gpu_check.json").write_text(json.dumps(report, indent=2) + "\n")
    return int(any(result["returncode"] for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
