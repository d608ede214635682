# SPDX-License-Identifier: Apache-2.0
"""`make gpu-check`: its steps in time, failures that stop nothing, its report; no GPU."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreted import needs_loops

from bench import harness, targets

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import gpu_check  # noqa: E402
import small_kernels  # noqa: E402
import timed_steps  # noqa: E402
from timed_steps import Step  # noqa: E402


def script(code: str) -> list[list[str]]:
    return [[sys.executable, "-c", code]]


def run(tmp_path: Path, steps: list[Step], total: float = 100.0) -> dict[str, dict[str, Any]]:
    runner = timed_steps.Runner(tmp_path, tmp_path, total, dict(os.environ))
    return runner.run(steps)


def test_a_failure_stops_nothing_but_what_needs_it(tmp_path: Path) -> None:
    out = run(
        tmp_path,
        [
            Step("build", script("print('built')"), 20, needs=None),
            Step("tests", [*script("raise SystemExit(3)"), *script("print('second')")], 20),
            Step("after", script("print('after')"), 20),
            Step("needy", script("print('never')"), 20, needs="tests"),
            Step("absent", [[str(tmp_path / "no such tool")]], 20),
        ],
    )
    assert {name: result["status"] for name, result in out.items()} == {
        "build": "ok",
        "tests": "failed",
        "after": "ok",
        "needy": "not run",
        "absent": "failed",
    }
    assert out["tests"]["returncodes"] == [3, 0]
    assert out["tests"]["last_lines"][1] == "second"
    assert "no such tool" in out["absent"]["last_lines"][0]
    assert json.loads(json.dumps(out)) == out


def test_what_takes_too_long_is_ended_with_its_children(tmp_path: Path) -> None:
    child = (
        "import subprocess, sys; "
        "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    )
    slow = run(tmp_path, [Step("slow", script(child), 0.5), Step("next", script("pass"), 20)])
    assert slow["slow"]["status"] == "timed out"
    assert slow["slow"]["seconds"] < 30
    assert slow["next"]["status"] == "ok"


def test_benches_share_what_is_left() -> None:
    def bench(name: str, seconds: float) -> Step:
        return Step(name, [], seconds, shortens_itself=True)

    later = [bench("b", 30), bench("c", 60)]
    one = bench("a", 10)
    assert timed_steps.allowance(one, later, 100.0) == pytest.approx(10.0)
    assert timed_steps.allowance(one, later, 50.0) == pytest.approx(5.0)
    assert timed_steps.allowance(one, later, 200.0) == pytest.approx(20.0)
    assert timed_steps.allowance(one, later, -5.0) == pytest.approx(4.0)
    assert timed_steps.allowance(one, later, 1e6) == pytest.approx(40.0)
    assert timed_steps.allowance(Step("t", [], 7), later, 1.0) == 7


def test_a_bench_is_told_its_time_and_runs_alone(tmp_path: Path) -> None:
    imports = f"import json, sys, time; from pathlib import Path; here = Path({str(tmp_path)!r}); "
    # Goes on until the tests are through, and leaves a mark.
    beside = (
        f"{imports}\nfor _ in range(3000):\n  time.sleep(0.01)\n"
        "  if (here / 'tested').exists(): break\n(here / 'mark').touch()"
    )
    tests = f"{imports}\nassert not (here / 'mark').exists()\n(here / 'tested').touch()"
    bench = (
        f"{imports}\nprint('a line')\n"
        "print(json.dumps({'argv': sys.argv[1:], 'alone': (here / 'mark').exists()}))\n"
        "print('a warning', file=sys.stderr)"
    )
    out = run(
        tmp_path,
        [
            Step("core", [*script(beside), *script("print('at once')")], 60, is_beside=True),
            Step("tests", script(tests), 60),
            Step("ops", script(bench), 20, shortens_itself=True),
        ],
        total=10.0,
    )
    assert out["tests"]["status"] == out["core"]["status"] == out["ops"]["status"] == "ok"
    assert out["ops"]["result"]["alone"]
    option, seconds = out["ops"]["result"]["argv"]
    assert option == "--seconds"
    assert 8 <= float(seconds) <= 10
    assert list(out) == ["core", "tests", "ops"]


def test_the_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    every = gpu_check.steps(tmp_path, is_quick=True, reviews_csv="r.csv")
    names = [step.name for step in every]
    assert len(set(names)) == len(names)
    default = timed_steps.chosen_steps(every, "")
    assert {step.name for step in every} - {step.name for step in default} == {"ncu", "family"}
    assert [s.name for s in timed_steps.chosen_steps(every, "kv, build")] == ["build", "kv"]
    with pytest.raises(ValueError, match="got nothing"):
        timed_steps.chosen_steps(every, "kv nothing")
    in_turn = sum(step.seconds for step in default if not step.is_beside)
    assert in_turn <= 1.25 * 480  # the benches shorten themselves for the rest
    files = {arg for step in every for c in step.commands for arg in c if arg.startswith("tests/")}
    assert files
    assert all((ROOT / file).exists() for file in files)
    assert "tests/triton_kernels/test_on_gpu.py" in gpu_check.gpu_tests()
    benches = [step for step in every if step.shortens_itself]
    outs = [step.commands[0][step.commands[0].index("--out") + 1] for step in benches]
    assert len(set(outs)) == len(benches) == 6
    for command in {step.commands[0][3]: step.commands[0] for step in benches}.values():
        monkeypatch.setattr(sys, "argv", [command[3], "--help"])
        with pytest.raises(SystemExit, match="0"):
            importlib.import_module(f"bench.{command[3]}").main()
        shown = capsys.readouterr().out
        assert "--seconds" in shown
        assert "cuda" in shown
        assert all(arg in shown for arg in command[4:] if arg.startswith("--"))


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": str(tmp_path), "OUT": str(tmp_path)}
    command = [sys.executable, str(ROOT / "tools" / "gpu_check.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode
    assert "no nvidia-smi" in done.stderr
    wrong = {**environment, "ONLY": "everything"}
    done = subprocess.run(command, env=wrong, capture_output=True, text=True, check=False)
    assert "ONLY must name some of" in done.stderr


def test_the_whole_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a false nvidia-smi, and steps that do little."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'NVIDIA H100, 580.1, 81559 MiB, 9.0, 1980 MHz, 700 W'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setattr(gpu_check, "REPO", tmp_path)
    csv = tmp_path / "build/gpu-check/ops_cuda.csv"
    share = record(COLD, "ivg_fast", "share of copy bandwidth", "B=64 V=128256", 80.0)
    harness.write_csv(tmp_path / "ops.csv", [share])
    bench = (
        f"import json, shutil; shutil.copy({str(tmp_path / 'ops.csv')!r}, {str(csv)!r})\n"
        "print(json.dumps({'left_out': {'B=1': 'no time'}, 'failed': {}}))"
    )
    made = [
        Step("build", script("print('built')"), 20, needs=None),
        Step("tests", script("raise SystemExit(1)"), 20),
        Step("ops", script(bench), 20, shortens_itself=True),
    ]
    monkeypatch.setattr(gpu_check, "steps", lambda *_, **__: made)
    assert gpu_check.main() == 1
    report = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    assert report["device"]["name"] == "NVIDIA H100"
    assert report["device"]["driver_version"] == "580.1"
    assert report["versions"]["torch"] == torch.__version__
    assert report["failed"] == ["tests"]
    assert report["left_out"] == {"ops: B=1": "no time"}
    (target,) = report["targets"]
    assert (target["measured"], target["is_met"]) == (80.0, False)
    assert harness.read_csv(tmp_path / "out" / "gpu_check.csv") == [share]
    assert "=== build.0\nbuilt\n" in (tmp_path / "out" / "gpu_check.log").read_text()
    monkeypatch.setenv("ONLY", "build")
    assert gpu_check.main() == 0
    report = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    assert list(report["steps"]) == ["build"]
    assert report["targets"] == []  # nothing of the run before


def test_what_training_lacks_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step("family", [], 1)
    monkeypatch.setattr(gpu_check, "TRAINING_PACKAGES", ("torch", "no_such_package"))
    assert "no_such_package" in (gpu_check.obstacle(step, __file__) or "")
    monkeypatch.setattr(gpu_check, "TRAINING_PACKAGES", ("torch",))
    assert "REVIEWS_CSV" in (gpu_check.obstacle(step, "nowhere.csv") or "")
    assert gpu_check.obstacle(step, __file__) is None
    assert gpu_check.obstacle(Step("ops", [], 1), "") is None


COLD = "guided_sample, graph, cold"


def record(kernel: str, provider: str, metric: str, x: str, value: float) -> harness.Record:
    where = ("c", "NVIDIA H200", "v", "python -m bench")
    return harness.Record(kernel, provider, metric, "u", x, value, value, value, *where)


def test_targets() -> None:
    warm = "guided_sample, graph, warm"
    records = [
        record(COLD, "ivg_fast", "share of copy bandwidth", "B=64 V=128256", 86.0),
        record(warm, "ivg_fast", "time", "B=16 V=32000", 5.0),
        record("guided_sample", "multinomial chain", "time", "B=16 V=32000", 49.0),
        record("IVG, llama2", "ivg_fast", "time per step", "WK=16", 14.0),
        record("IVG, llama2", "bound: weights", "time per step", "WK=16", 10.0),
        record("IVG, llama2", "reference_style", "time per step", "WK=16", 36.0),
        record("IVG, llama3", "ivg_fast", "time per step", "WK=1", 8.0),
    ]
    found = {v["what"]: (round(v["measured"], 3), v["is_met"]) for v in targets.of_records(records)}
    assert found == {
        "guided_sample, B=64 V=128256, cold: of copy bandwidth": (86.0, True),
        "guided_sample, B=16 V=32000, in a graph": (5.0, True),
        "guided_sample, B=16 V=32000: eager chain / ours in a graph": (9.8, False),
        "three Llama-2-7B, 16 candidates: step / weights": (1.4, True),
        "three Llama-2-7B, 16 candidates: reference_style / ours": (2.571, True),
        "Llama-3-8B with two 1B guides, one sequence": (125.0, False),
    }
    assert targets.of_records([]) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiled kernels refuse the CPU's tensors")
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
@pytest.mark.parametrize(
    "part", ["sampling", "cache", pytest.param("attention", marks=needs_loops)]
)
def test_small_kernels(part: str) -> None:
    assert len(small_kernels.PARTS) == 3
    small_kernels.PARTS[part]("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiled kernels refuse the CPU's tensors")
def test_small_kernels_notice_a_wrong_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = small_kernels.copy_blocks_ref
    monkeypatch.setattr(small_kernels, "copy_blocks_ref", lambda pools, p: good(pools, p[:1]))
    monkeypatch.setattr(small_kernels, "PARTS", {"cache": small_kernels.cache})
    assert small_kernels.main(["--device", "cpu"]) == 1
    assert "cache: cache: error" in capsys.readouterr().out
