# SPDX-License-Identifier: Apache-2.0
"""Decoded cells on disk: what is done is never run again, what was interrupted goes on.

A cell is one method with one seed on the prompts of a split. Its file is named by a hash of all
that decides its responses (models, templates, prompts, seed, parameters, versions), so that a
changed setting makes another file. Line 1 is that configuration, each further line a batch of
prompts with its times; a line that an interruption cut short is dropped. The number of prompts is
no part of the configuration: with more prompts a cell grows.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench.experiments.families import Prompts
from bench.experiments.methods import Method
from ivg_fast import Engine, RequestOutput
from ivg_fast.prompts import derive_seed

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Cell:
    method: Method
    prompts: Prompts
    count: int
    seed: int

    def config(self, context: Mapping[str, Any]) -> dict[str, Any]:
        """All that decides the responses; `context` is what cells of a run share."""
        params = {name: v for name, v in asdict(self.method.params).items() if name != "seed"}
        return {
            **context,
            "prompts": self.prompts.digest,
            "split": self.prompts.split,
            "seed": self.seed,
            "params": params,
        }


@dataclass(frozen=True, slots=True)
class CellResult:
    """A finished cell: a record a prompt, and a time a batch of prompts."""

    key: str
    records: list[Record]
    batches: list[dict[str, Any]]


class CellStore:
    """The cells in a folder.

    Args:
        folder: made if it is not there.
        context: what the cells of a run share, JSON: family, versions.
        batch_size: prompts that decode together, and that an interruption can lose.
    """

    def __init__(self, folder: Path, context: Mapping[str, Any], batch_size: int) -> None:
        self._folder = folder
        self._context = dict(context)
        self._batch_size = batch_size
        folder.mkdir(parents=True, exist_ok=True)

    def key(self, cell: Cell) -> str:
        text = json.dumps(cell.config(self._context), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:20]

    def missing(self, cell: Cell) -> int:
        """Prompts of the cell that have not been decoded."""
        return max(0, cell.count - sum(len(b["records"]) for b in self._read(cell)))

    def load(self, cell: Cell) -> CellResult:
        """A cell that `run` has finished."""
        batches = self._read(cell)
        records = [record for batch in batches for record in batch["records"]][: cell.count]
        if len(records) < cell.count:
            raise ValueError(f"cell {self.key(cell)} has {len(records)} of {cell.count} prompts")
        times = [{k: v for k, v in batch.items() if k != "records"} for batch in batches]
        return CellResult(self.key(cell), records, times)

    def run(self, engine: Engine, cell: Cell, bar: tqdm) -> CellResult:
        """Decodes the prompts that are missing, and loads the cell."""
        done = sum(len(batch["records"]) for batch in self._read(cell, mend=True))
        prompts = cell.prompts.first(cell.count)
        for begin in range(done, cell.count, self._batch_size):
            end = min(begin + self._batch_size, cell.count)
            batch = decode(engine, cell, prompts[begin:end], begin)
            with self._path(cell).open("a", encoding="utf-8") as file:
                file.write(json.dumps(batch, ensure_ascii=False) + "\n")
            bar.update(end - begin)
        return self.load(cell)

    def _path(self, cell: Cell) -> Path:
        return self._folder / f"{cell.method.name}-{cell.prompts.split}-{self.key(cell)}.jsonl"

    def _read(self, cell: Cell, *, mend: bool = False) -> list[dict[str, Any]]:
        """The whole batches of a cell; `mend` starts its file, or cuts it behind them."""
        path, config = self._path(cell), cell.config(self._context)
        lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
        whole = [json.loads(line) for line in lines[:-1]]  # the last line ended: not cut short
        if mend and not whole:
            path.write_text(json.dumps(config) + "\n", encoding="utf-8")
        elif mend and lines[-1]:
            os.truncate(path, path.stat().st_size - len(lines[-1]))
        return whole[1:]


def decode(engine: Engine, cell: Cell, prompts: Sequence[str], begin: int) -> dict[str, Any]:
    """A batch: prompts [begin, begin + len(prompts)) of the cell, with its times.

    A prompt's seed depends on the cell's seed and on its place, not on the batch.
    """
    load = os.getloadavg()[0]
    seeds = [derive_seed(cell.seed, begin + i) for i in range(len(prompts))]
    start, start_cpu = time.perf_counter(), time.process_time()
    read = [cell.prompts.for_engine(text) for text in prompts]
    outputs = engine.generate(read, cell.method.params, seeds=seeds)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "load": load,
        "num_prompts": len(prompts),
        "records": [record_of(p, output) for p, output in zip(prompts, outputs, strict=True)],
    }


def record_of(prompt: str, output: RequestOutput) -> Record:
    """What is kept of a response."""
    best, stats = output.outputs[0], asdict(output.stats)
    counters = ("prefill_tokens", "decode_tokens", "score_tokens")
    forwarded: dict[str, int] = {}
    for counter in counters:
        for role, count in stats[counter].items():
            forwarded[role] = forwarded.get(role, 0) + count
    return {
        "prompt": prompt,
        "response": best.text,
        "prompt_ids": output.prompt_token_ids,
        "token_ids": best.token_ids,
        "logprob": best.cumulative_logprob,
        "score": best.score,
        "tokens_forwarded": forwarded,
    }


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One run at a time writes to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SystemExit(f"another run writes to {folder}") from error
        yield
