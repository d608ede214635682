# SPDX-License-Identifier: Apache-2.0
"""Engines in Ray's actors: one is killed, and the job returns what it would have."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import tiny_model, tiny_tokenizer

from ivg_fast import Engine, EngineConfig, InvalidParameterError, SearchParams
from ivg_fast.integrations.ray_data import EngineActor, rows_of

ROOT = Path(__file__).parents[2]
PROMPTS = [f"prompt number {i} is here" for i in range(28)]
PARAMS = SearchParams.eft(max_tokens=16, temperature=0.7)  # of the example, with a pair
ROLES = ("base", "tuned", "untuned")
CONFIG = EngineConfig(num_blocks=500, num_threads=1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    home = tmp_path_factory.mktemp("models")
    for i, role in enumerate(ROLES):
        tiny_model("gpt2" if i else "llama", seed=i).save_pretrained(home / role)
        tiny_tokenizer().save_pretrained(home / role)
    return {role: str(home / role) for role in ROLES}


@pytest.fixture(scope="module")
def expected(folders: dict[str, str]) -> list[str]:
    rows = rows_of(PROMPTS)
    with Engine.from_pretrained(**folders, config=CONFIG) as engine:
        outputs = engine.generate(PROMPTS, PARAMS, seeds=[row["seed"] for row in rows])
    return [output.outputs[0].text for output in outputs]


@pytest.fixture
def job(folders: dict[str, str], tmp_path: Path) -> Iterator[Any]:
    """Starts the example on a folder; ends it in any case."""
    started: list[subprocess.Popen[str]] = []
    (tmp_path / "prompts").write_text("".join(f"{prompt}\n" for prompt in PROMPTS), "utf-8")

    def start(out: Path) -> subprocess.Popen[str]:
        environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        with (tmp_path / "prompts").open() as lines:
            process = subprocess.Popen(
                [sys.executable, "examples/ray_batch.py", str(out), *folders.values()],
                cwd=ROOT,
                env=environment,
                stdin=lines,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.wait(60)


def rows_in(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for f in out.glob("*.jsonl") for line in f.read_text().splitlines()]
    return sorted(rows, key=lambda row: row["index"])


def test_a_job_goes_on_after_a_worker_is_killed(
    job: Any, expected: list[str], tmp_path: Path
) -> None:
    """It is also one that was stopped before: what it has written stays as it is."""
    pytest.importorskip("ray", reason="needs the extra `ray`")
    out = tmp_path / "out"
    out.mkdir()
    kept = [{**row, "response": "!", "pid": 0} for row in rows_of(PROMPTS)[3:7]]
    (out / "000000003.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept), "utf-8")
    process = job(out)
    deadline = time.monotonic() + 300
    while len(rows_in(out)) == 4 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    before = [row for row in rows_in(out) if row["pid"]]
    assert before, process.communicate(timeout=60)[1][-2000:]
    killed = before[0]["pid"]
    os.kill(killed, signal.SIGKILL)
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-2000:]
    rows = rows_in(out)
    assert [row["index"] for row in rows] == list(range(len(PROMPTS)))
    answers = expected[:3] + ["!"] * 4 + expected[7:]
    assert [row["response"] for row in rows] == answers
    assert [p for p, a in zip(PROMPTS, answers, strict=True) if p + a not in printed] == []
    workers = {row["pid"] for row in rows} - {0, killed}
    assert len(workers) == 2, "the killed worker was not started anew"


def test_the_actor_by_itself(folders: dict[str, str], expected: list[str]) -> None:
    """What Ray does to it: batches of any size, columns as NumPy arrays."""
    actor = EngineActor(params=PARAMS, config=CONFIG, **folders)
    rows = rows_of(PROMPTS[:5], done=[3])
    assert [row["index"] for row in rows] == [0, 1, 2, 4]
    found = []
    for part in (rows[:3], rows[3:]):
        batch = {name: np.array([row[name] for row in part]) for name in part[0]}
        result = actor(batch)
        assert {len(column) for column in result.values()} == {len(part)}
        assert set(batch) < set(result)
        found += result["response"].tolist()
    assert found == [expected[i] for i in (0, 1, 2, 4)]
    assert actor._engine.stats()["num_requests_running"] == 0


def test_refusals(folders: dict[str, str]) -> None:
    with pytest.raises(InvalidParameterError, match="params"):
        EngineActor(folders["base"], {"max_tokens": 3})
    actor = EngineActor(folders["base"], SearchParams(max_tokens=2), config=CONFIG)
    with pytest.raises(InvalidParameterError, match="'seed'"):
        actor({"prompt": np.array(["a"])})
    assert rows_of(["a", "b"], seed=1) != rows_of(["a", "b"], seed=2)
