# SPDX-License-Identifier: Apache-2.0
"""Cells on disk: an interrupted run goes on, what is done stays, what changed is not mixed in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

from bench.experiments.cells import Cell, CellResult, CellStore, locked
from bench.experiments.families import Prompts
from bench.experiments.measures import Measure
from bench.experiments.methods import method
from ivg_fast import Prompt, RequestOutput, SearchParams
from ivg_fast.outputs import CandidateOutput, SearchStats

PROMPTS = Prompts("test", tuple(f"prompt {i}" for i in range(20)))
CONTEXT = {"family": "toy", "versions": "1"}


class ToyEngine:
    """Answers with the prompt and its seed; fails at its `fail_at`-th call."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.calls: list[list[Any]] = []
        self._fail_at = fail_at

    def generate(
        self, prompts: Sequence[Prompt], params: SearchParams, *, seeds: Sequence[int]
    ) -> list[RequestOutput]:
        self.calls.append([prompt.raw for prompt in prompts])
        self.of_value = [prompt.value for prompt in prompts]
        if len(self.calls) == self._fail_at:
            raise KeyboardInterrupt
        return [
            RequestOutput(
                prompt=prompt.raw,
                prompt_token_ids=[1],
                seed=seed,
                outputs=[
                    CandidateOutput(
                        text=f" {prompt.raw} {seed} {params.guidance_weight}",
                        token_ids=[seed % 97],
                        score=0.0,
                        implicit_reward=0.0,
                        cumulative_logprob=-1.0,
                        base_logprob=-2.0,
                        finish_reason="length",
                        stop_reason=None,
                        candidate_id=0,
                    )
                ],
                stats=SearchStats(
                    prefill_tokens={"base": 3},
                    decode_tokens={"base": 10},
                    score_tokens={"value": 7},
                ),
            )
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]


def _cell(**changes: Any) -> Cell:
    cell = Cell(method("eft", 0.5), PROMPTS, 10, seed=4)
    return replace(cell, **changes)


def _run(store: CellStore, engine: ToyEngine, cell: Cell) -> CellResult:
    return store.run(engine, cell, tqdm(disable=True))  # type: ignore[arg-type]


def _records(result: CellResult) -> list[tuple[str, str]]:
    return [(record["prompt"], record["response"]) for record in result.records]


@pytest.fixture
def store(tmp_path: Path) -> CellStore:
    return CellStore(tmp_path / "cells", CONTEXT, batch_size=4)


def test_an_interrupted_cell_goes_on(store: CellStore, tmp_path: Path) -> None:
    whole = _run(CellStore(tmp_path / "whole", CONTEXT, 4), ToyEngine(), _cell())
    with pytest.raises(KeyboardInterrupt):
        _run(store, ToyEngine(fail_at=3), _cell())
    assert store.missing(_cell()) == 2
    engine = ToyEngine()
    resumed = _run(store, engine, _cell())
    assert engine.calls == [["prompt 8", "prompt 9"]]
    assert _records(resumed) == _records(whole)
    assert [batch["num_prompts"] for batch in resumed.batches] == [4, 4, 2]
    # Every prompt draws from its own seed, whatever batch it is in.
    assert len({record["token_ids"][0] for record in resumed.records}) > 1
    other = _run(CellStore(tmp_path / "one", CONTEXT, 1), ToyEngine(), _cell())
    assert _records(other) == _records(whole)


def test_a_line_that_was_cut_short_is_dropped(store: CellStore, tmp_path: Path) -> None:
    whole = _records(_run(store, ToyEngine(), _cell()))
    (path,) = (tmp_path / "cells").iterdir()
    text = path.read_bytes()
    for cut in (len(text) - 30, len(text) - 1, text.index(b"\n") // 2, 0):
        path.write_bytes(text[:cut])
        assert store.missing(_cell()) > 0
        engine = ToyEngine()
        assert _records(_run(store, engine, _cell())) == whole
        assert engine.calls
        assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_finished_cell_is_not_run_again(store: CellStore) -> None:
    _run(store, ToyEngine(), _cell())
    assert store.missing(_cell()) == 0
    engine = ToyEngine()
    _run(store, engine, _cell())
    assert store.missing(_cell(count=6)) == 0
    assert len(store.load(_cell(count=6)).records) == 6
    assert engine.calls == []
    _run(store, engine, _cell(count=12))  # more prompts: only the new ones
    assert engine.calls == [["prompt 10", "prompt 11"]]


def test_a_changed_setting_is_another_cell(store: CellStore, tmp_path: Path) -> None:
    cell = _cell()
    changed = [
        _cell(seed=5),
        _cell(method=method("eft", 0.25)),
        _cell(method=method("args", 0.5)),
        _cell(prompts=Prompts("dev", PROMPTS.texts)),
        _cell(prompts=Prompts("test", PROMPTS.texts[:15])),
        _cell(prompts=replace(PROMPTS, value_texts={"prompt 3": "three"})),
        _cell(prompts=replace(PROMPTS, value_texts={"prompt 4": "three"})),
    ]
    keys = {store.key(c) for c in [cell, *changed]}
    keys.add(CellStore(tmp_path / "x", {**CONTEXT, "versions": "2"}, 4).key(cell))
    assert len(keys) == 9
    # What decides no response is no part of the key: how many prompts, the batch, the name, and a
    # seed in the parameters, which the cell's own replaces.
    seeded = replace(cell.method, name="other", params=replace(cell.method.params, seed=9))
    same = [store.key(_cell(count=3)), store.key(_cell(method=seeded))]
    same.append(CellStore(tmp_path / "y", CONTEXT, 9).key(cell))
    assert set(same) == {store.key(cell)}


def test_tokens_forwarded_are_those_of_every_kind(store: CellStore) -> None:
    record = _run(store, ToyEngine(), _cell()).records[0]
    assert record["tokens_forwarded"] == {"base": 13, "value": 7}


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(SystemExit, match="another run"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_a_measure_reads_each_record_once(tmp_path: Path, store: CellStore) -> None:
    seen: list[str] = []

    def make() -> Any:
        def run(records: Sequence[dict[str, Any]]) -> list[list[float]]:
            seen.extend(record["prompt"] for record in records)
            return [[float(record["prompt"].split()[1])] for record in records]

        return run

    small, large = (_run(store, ToyEngine(), _cell(count=n)) for n in (6, 9))
    for version, expected in (("1", 9), ("1", 9), ("2", 18)):
        measure = Measure("toy", version, make)
        assert measure.rows(tmp_path / "m", small, 4) == [[0.0], [1.0], [2.0], [3.0]]
        assert measure.rows(tmp_path / "m", large) == [[float(i)] for i in range(9)]
        assert measure.rows(tmp_path / "m", small) == [[float(i)] for i in range(6)]
        assert len(seen) == expected


def test_the_value_reads_its_own_prompts(tmp_path) -> None:
    prompts = replace(PROMPTS, value_texts={"prompt 1": "one"})
    engine = ToyEngine()
    result = _run(CellStore(tmp_path, CONTEXT, 5), engine, _cell(prompts=prompts, count=2))
    assert engine.of_value == [None, "one"]
    assert [record["prompt"] for record in result.records] == ["prompt 0", "prompt 1"]
