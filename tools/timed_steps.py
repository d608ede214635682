# SPDX-License-Identifier: Apache-2.0
"""Steps of a check that has to fit a time: each runs commands, the report says how it went.

A step that fails or takes too long does not stop the others. Steps that can shorten themselves are
told how long they have (`--seconds`): their part of what is left.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Of what a step was given, before it is ended; a step that shortens itself gets seconds on top.
PATIENCE = 2.0
EXTRA_SECONDS = 45.0
LEAST_SHARE, LARGEST_SHARE = 0.4, 4.0


@dataclass(frozen=True, slots=True)
class Step:
    """One step.

    Attributes:
        name: in ONLY and in the report.
        commands: run in turn, even after one has failed; all at once where `is_beside`.
        seconds: that it should take.
        shortens_itself: takes `--seconds N`, and its last line on stdout is a JSON object.
        is_beside: runs beside the steps that follow, up to the first that shortens itself, whose
            times it would disturb.
        is_default: part of a run that names no steps.
        needs: name of the step that has to succeed before; where it was not asked for it counts as
            done.
        environment: beside that of the check.
    """

    name: str
    commands: Sequence[Sequence[str]]
    seconds: float
    shortens_itself: bool = False
    is_beside: bool = False
    is_default: bool = True
    needs: str | None = "build"
    environment: Mapping[str, str] = field(default_factory=dict)


def chosen_steps(every: Sequence[Step], only: str) -> list[Step]:
    """Those that `only` names, separated by spaces or commas; the default ones where it is empty.

    Raises:
        ValueError: an unknown name.
    """
    names = only.replace(",", " ").split()
    unknown = sorted(set(names) - {step.name for step in every})
    if unknown:
        known = ", ".join(step.name for step in every)
        raise ValueError(f"ONLY must name some of {known}, got {', '.join(unknown)}")
    return [step for step in every if (step.name in names if names else step.is_default)]


def allowance(step: Step, later: Sequence[Step], left: float) -> float:
    """Seconds for a step, of the `left` that it shares with the `later` ones."""
    if not step.shortens_itself:
        return step.seconds
    planned = step.seconds + sum(one.seconds for one in later if not one.is_beside)
    share = min(LARGEST_SHARE, max(LEAST_SHARE, left / planned))
    return step.seconds * share


class Runner:
    """Runs steps in `folder` and keeps their logs in `out`; see `run`.

    `on_result` is called after each step, in case the whole is ended before the last.
    """

    def __init__(
        self,
        folder: Path,
        out: Path,
        total_seconds: float,
        environment: Mapping[str, str],
        on_result: Callable[[dict[str, dict[str, Any]]], object] = lambda _: None,
    ) -> None:
        self._folder, self._out = folder, out
        self._total = total_seconds
        self._on_result = on_result
        self._saying = threading.Lock()
        self._environment = dict(environment)
        self._begin = time.monotonic()
        self._beside: list[threading.Thread] = []
        self.results: dict[str, dict[str, Any]] = {}

    def run(self, steps: Sequence[Step]) -> dict[str, dict[str, Any]]:
        """By name: status ("ok", "failed", "timed out", "not run"), returncodes, seconds, the
        result that a bench printed."""
        for i, step in enumerate(steps):
            if step.needs in self.results and self.results[step.needs]["status"] != "ok":
                self._say(step.name, {"status": "not run", "why": f"{step.needs} did not succeed"})
                continue
            if step.shortens_itself:
                self.wait()
            left = self._total - (time.monotonic() - self._begin)
            seconds = allowance(step, steps[i + 1 :], left)
            if step.is_beside:
                thread = threading.Thread(target=self._run, args=(step, seconds))
                thread.start()
                self._beside.append(thread)
            else:
                self._run(step, seconds)
        self.wait()
        return {step.name: self.results[step.name] for step in steps}

    def wait(self) -> None:
        """For the steps beside."""
        while self._beside:
            self._beside.pop().join()

    def _run(self, step: Step, seconds: float) -> None:
        begin = time.monotonic()
        limit = seconds + EXTRA_SECONDS if step.shortens_itself else seconds * PATIENCE
        logs = [self._out / f"{step.name}.{i}.log" for i in range(len(step.commands))]
        running: list[subprocess.Popen[bytes]] = []
        outcomes: list[int | str] = []
        for command, log in zip(step.commands, logs, strict=True):
            argv = [*command, *(["--seconds", f"{seconds:.0f}"] if step.shortens_itself else [])]
            try:
                with log.open("wb") as file:
                    running.append(
                        subprocess.Popen(
                            argv,
                            cwd=self._folder,
                            env={**self._environment, **step.environment},
                            stdout=file,
                            stderr=subprocess.STDOUT,
                            stdin=subprocess.DEVNULL,
                            start_new_session=True,
                        )
                    )
            except OSError as error:
                log.write_text(f"{error}\n", encoding="utf-8")
                outcomes.append(f"cannot start: {error}")
                continue
            if not step.is_beside:
                outcomes.append(_ended(running.pop(), begin + limit))
        outcomes += [_ended(process, begin + limit) for process in running]
        result: dict[str, Any] = {
            "status": _status(outcomes),
            "returncodes": outcomes,
            "seconds": round(time.monotonic() - begin, 1),
            "given_s": round(seconds, 1),
            "last_lines": [_last_line(log) for log in logs],
        }
        if step.shortens_itself:
            result["result"] = _result(logs[-1])
        self._say(step.name, result)

    def _say(self, name: str, result: dict[str, Any]) -> None:
        last = result["last_lines"][-1][:100] if "last_lines" in result else result["why"]
        seconds = result.get("seconds", 0)
        with self._saying:
            self.results[name] = result
            print(f"{name:<10} {result['status']:<9} {seconds:>6} s  {last}", flush=True)
            self._on_result(dict(self.results))


def _ended(process: subprocess.Popen[bytes], until: float) -> int | str:
    """Its exit status; with all that it started it is ended at `until`."""
    try:
        return process.wait(max(0.1, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return "timed out"


def _status(outcomes: Sequence[int | str]) -> str:
    if "timed out" in outcomes:
        return "timed out"
    return "ok" if all(outcome == 0 for outcome in outcomes) else "failed"


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else ""


def _result(log: Path) -> Any:
    """The JSON object in the last line that is one; None without."""
    for line in reversed(log.read_text(encoding="utf-8", errors="replace").splitlines()):
        if line.startswith("{"):
            try:
                return json.loads(line)
            except json.JSONDecodeError:
                return None
    return None
