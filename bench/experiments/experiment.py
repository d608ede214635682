# SPDX-License-Identifier: Apache-2.0
"""A run of the experiment: dev split, weights, main table, sweeps, times; each stage resumes."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tqdm import tqdm

import ivg_fast
from bench.experiments.cells import Cell, CellResult, CellStore, decode
from bench.experiments.families import Family, Prompts
from bench.experiments.measures import base_measure, judge_measure
from bench.experiments.methods import (
    Method,
    choose_weights,
    main_methods,
    search_sweep,
    weight_methods,
)
from bench.experiments.statistics import distinct_n
from bench.experiments.summary import (
    Judges,
    MethodResult,
    differences,
    measure_method,
    order,
    times,
)
from bench.experiments.tasks import SENTIMENT, Task
from bench.run import device_name
from ivg_fast import Engine, EngineConfig
from ivg_fast.errors import InvalidParameterError
from ivg_fast.request import ROLES
from ivg_fast.training.records import write_jsonl

DEV_SEED = 1000
NUM_SAMPLES = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a run does; sizes in prompts. `judge` is a language model's folder, name or .gguf."""

    num_prompts: int = 200
    num_dev_prompts: int = 64
    num_sweep_prompts: int = 48
    num_timed_prompts: int = 16
    seeds: tuple[int, ...] = (0, 1, 2)
    weights: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    wide_weights: tuple[float, ...] = (1.5, 2.0, 3.0)
    min_distinct: float = 0.9
    judge: str | None = None
    judge_name: str | None = None
    num_judged: int = 200
    batch_size: int = 50
    num_threads: int = field(default_factory=torch.get_num_threads)
    device: str | None = None
    dtype: str = "auto"

    def __post_init__(self) -> None:
        for item in fields(self):
            if item.name.startswith("num_") or item.name == "batch_size":
                self._require(item.name, getattr(self, item.name) >= 1, "must be at least 1")
        for name in ("seeds", "weights"):
            self._require(name, len(getattr(self, name)) > 0, "must not be empty")
        distinct = len(set(self.seeds)) == len(self.seeds)
        self._require("seeds", distinct, "must differ, or a run counts twice")
        for name in ("weights", "wide_weights"):
            positive = all(0 < w < math.inf for w in getattr(self, name))
            self._require(name, positive, "must be positive and finite")
        self._require("min_distinct", 0 <= self.min_distinct <= 1, "must be in [0, 1]")

    def _require(self, name: str, holds: bool, what: str) -> None:
        if not holds:
            raise InvalidParameterError(name, getattr(self, name), what)


class Experiment:
    """Stages over one folder. Engine and models load when something is missing."""

    def __init__(
        self,
        out: Path,
        family: Family,
        prompts: dict[str, Prompts],
        settings: Settings,
        task: Task = SENTIMENT,
    ) -> None:
        self.task = task
        self.out, self.family, self.prompts, self.settings = out, family, prompts, settings
        self.versions = {
            "ivg_fast": ivg_fast.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        context = {
            "family": family.describe(),
            "versions": self.versions,
            "device": settings.device or "cpu",
            "dtype": settings.dtype,
        }
        self.cells = CellStore(out / "cells", context, settings.batch_size)
        device = settings.device or "cpu"
        self._judges = Judges(
            out / "measures",
            task.gold(family, device),
            task.second(prompts),
            base_measure(family, task.sampling["temperature"], device),
        )
        self._judge = judge_measure(settings.judge, device) if settings.judge else None

    @cached_property
    def engine(self) -> Engine:
        options: dict[str, Any] = {}
        if self.family.templates:
            options["templates"] = dict(self.family.templates)
        return Engine.from_pretrained(
            *(self.family.models[role] for role in ROLES),
            device=self.settings.device,
            dtype=self.settings.dtype,
            config=EngineConfig(num_threads=self.settings.num_threads),
            **options,
        )

    def close(self) -> None:
        if "engine" in vars(self):
            self.engine.close()
            del self.engine

    def decode(
        self, methods: Sequence[Method], split: str, count: int, seeds: Sequence[int], what: str
    ) -> list[list[CellResult]]:
        """The cells of each method, one a seed; decodes what is missing, then frees the models."""
        grid = [
            [Cell(method, self.prompts[split], count, seed) for seed in seeds] for method in methods
        ]
        missing = sum(self.cells.missing(cell) for cells in grid for cell in cells)
        with tqdm(total=missing, desc=what, unit="prompt", disable=not missing) as bar:
            results = [[self._cell(cell, bar) for cell in cells] for cells in grid]
        self.close()
        return results

    def _cell(self, cell: Cell, bar: tqdm) -> CellResult:
        if not self.cells.missing(cell):
            return self.cells.load(cell)
        bar.set_postfix_str(f"{cell.method.name}, seed {cell.seed}")
        return self.cells.run(self.engine, cell, bar)

    # --- stages ----------------------------------------------------------------------------------

    def choose(self) -> dict[str, float]:
        """Guidance weights, chosen on the dev prompts."""
        s = self.settings
        methods = weight_methods({*s.weights, *s.wide_weights}, self.task.sampling)
        cells = self.decode(methods, "dev", s.num_dev_prompts, [DEV_SEED], "dev")
        rows = []
        for method, (cell,) in zip(methods, cells, strict=True):
            gold = self._judges.gold.rows(self._judges.folder, cell)
            texts = [record["response"] for record in cell.records]
            rows.append(
                {
                    "method": method.name,
                    "weight": method.weight,
                    "gold": float(np.mean(gold)),
                    "distinct_2": distinct_n(texts, 2),
                }
            )
        self._dev = rows
        return choose_weights(rows, s.weights, s.min_distinct)

    def main_table(self, chosen: dict[str, float]) -> dict[str, MethodResult]:
        """Every method with every seed on the test prompts."""
        s = self.settings
        methods = main_methods(chosen, self.task.sampling)
        cells = self.decode(methods, "test", s.num_prompts, s.seeds, "test")
        judged = min(s.num_judged, s.num_prompts)
        judges = replace(self._judges, judge=self._judge, num_judged=judged)
        results = {}
        for method, own in tqdm(list(zip(methods, cells, strict=True)), desc="measure"):
            results[method.name] = measure_method(method, own, judges, s.num_threads)
        self._write_rows(results, cells)
        return results

    def weight_sweep(self) -> list[dict[str, Any]]:
        """Each guided method over its weight: the dev prompts that chose it, in full."""
        s = self.settings
        methods = weight_methods({*s.weights, *s.wide_weights}, self.task.sampling)
        return self._sweep(methods, s.num_dev_prompts, "weights")

    def search_sweep(self, ivg_weight: float) -> list[dict[str, Any]]:
        """CBS(explicit) and IVG over W, K, L."""
        methods = search_sweep(ivg_weight, self.task.sampling)
        return self._sweep(methods, self.settings.num_sweep_prompts, "W, K, L")

    def _sweep(self, methods: Sequence[Method], count: int, what: str) -> list[dict[str, Any]]:
        cells = self.decode(methods, "dev", count, [DEV_SEED], what)
        rows = []
        for method, own in zip(methods, cells, strict=True):
            result = measure_method(method, own, self._judges, self.settings.num_threads)
            rows.append({"method": method.name, "num_prompts": count, **result.figures})
        return rows

    def time(self, chosen: dict[str, float], rounds: int = 3) -> None:
        """Times alone, methods taking turns: the median round of each. Writes timing.json."""
        count = self.settings.num_timed_prompts
        cells = self._timed_cells(main_methods(chosen, self.task.sampling))
        prompts = self.prompts["test"].first(count)
        batches: dict[str, list[dict[str, Any]]] = {cell.method.name: [] for cell in cells}
        with tqdm(total=len(cells) * (rounds + 1), desc="times", unit="run") as bar:
            for turn in range(rounds + 1):
                for cell in cells:
                    batch = decode(self.engine, cell, prompts, 0)
                    bar.update()
                    if turn:  # the first round warms up
                        batches[cell.method.name].append(batch)
        timing = self._known_times()
        for cell in cells:
            own = batches[cell.method.name]
            middle = sorted(own, key=lambda batch: batch["seconds"])[rounds // 2]
            timing[self._time_key(cell)] = {
                **times([middle], self.settings.num_threads),
                "is_loaded": times(own, self.settings.num_threads)["is_loaded"],
                "rounds": [batch["seconds"] / count for batch in own],
                "num_prompts": count,
            }
        _write_json(self.out / "timing.json", timing)

    def _timed_cells(self, methods: Sequence[Method]) -> list[Cell]:
        count = self.settings.num_timed_prompts
        return [Cell(method, self.prompts["test"], count, 0) for method in methods]

    def _time_key(self, cell: Cell) -> str:
        return f"{self.cells.key(cell)}-{cell.count}-{self.settings.num_threads}"

    def _known_times(self) -> dict[str, Any]:
        path = self.out / "timing.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    # --- reports ---------------------------------------------------------------------------------

    def summary(
        self, chosen: dict[str, float], results: dict[str, MethodResult], command: str
    ) -> dict[str, Any]:
        """What is known so far, as JSON."""
        s = self.settings
        found = differences(results)
        summary = {
            "settings": {
                "family": self.family.name,
                "models": self.family.describe()["models"],
                "num_prompts": s.num_prompts,
                "num_dev_prompts": s.num_dev_prompts,
                "seeds": list(s.seeds),
                "dev_seed": DEV_SEED,
                "weights": list(s.weights),
                "wide_weights": list(s.wide_weights),
                "min_distinct": s.min_distinct,
                "judge": s.judge_name,
                "num_judged": min(s.num_judged, s.num_prompts),
            },
            "chosen_weights": chosen,
            "dev": self._dev,
            "methods": {name: result.figures for name, result in results.items()},
            "differences": found,
            "order": order(found),
            "versions": self.versions,
            "device": device_name(s.device or "cpu"),
            "command": command,
        }
        if self.task is not SENTIMENT:
            summary["task"] = self.task.name
            summary["second_differences"] = differences(results, "second")
            summary["samples"] = self._samples
        known = self._known_times()
        cells = self._timed_cells([result.method for result in results.values()])
        timing = {cell.method.name: known.get(self._time_key(cell)) for cell in cells}
        if None not in timing.values():
            summary["timing"] = timing
        return summary

    def _write_rows(
        self, results: dict[str, MethodResult], cells: Sequence[Sequence[CellResult]]
    ) -> None:
        """per_prompt.csv, every reward; samples.jsonl, the first prompts with the first seed."""
        samples = []
        with (self.out / "per_prompt.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["method", "seed", "prompt", "gold", self._judges.second.name])
            for (name, result), own in zip(results.items(), cells, strict=True):
                for i, seed in enumerate(self.settings.seeds):
                    pairs = zip(result.gold[i], result.second[i], strict=True)
                    for index, (gold, second) in enumerate(pairs):
                        writer.writerow([name, seed, index, f"{gold:.4f}", f"{second:.4f}"])
                for index, record in enumerate(own[0].records[:NUM_SAMPLES]):
                    sample = {key: record[key] for key in ("prompt", "response")}
                    gold = float(result.gold[0, index])
                    samples.append({"method": name, **sample, "gold": gold})
        write_jsonl(self.out / "samples.jsonl", samples)
        references = self.prompts["test"].references
        self._samples = [{**s, "reference": references.get(s["prompt"], "")} for s in samples]


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def write_report(out: Path, summary: dict[str, Any]) -> None:
    """summary.json, report.md and the plots."""
    from bench.experiments.plots import draw
    from bench.experiments.report import markdown

    _write_json(out / "summary.json", summary)
    (out / "report.md").write_text(markdown(summary), encoding="utf-8")
    draw(summary, out)
