# SPDX-License-Identifier: Apache-2.0
"""Responses to instructions on disk, written by any number of ranks, each resumable; their merge.

Item i belongs to rank i % world_size. Each rank and method writes one file of JSON lines, whose
first line holds all that decides a response (models, templates, parameters, seed, versions) and
whose name holds a hash of it. What any rank of any world size has answered under the same settings
is not answered again. A response depends on the settings and on the instruction's text alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench.experiments.instructions import Item
from bench.experiments.setups import METHODS, method_params
from ivg_fast import Engine, SearchParams
from ivg_fast.errors import InvalidParameterError, IVGError
from ivg_fast.integrations.alpaca_eval import prompt_seed
from ivg_fast.rendering import PromptRenderer

Record = dict[str, Any]


class IncompleteError(IVGError, RuntimeError):
    """Responses are missing: ranks have not finished."""


@dataclass(frozen=True, slots=True)
class Rank:
    """A part of the work.

    Raises:
        InvalidParameterError: not 0 <= index < world_size.
    """

    index: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.world_size < 1:
            raise InvalidParameterError("world_size", self.world_size, "must be >= 1")
        if not 0 <= self.index < self.world_size:
            raise InvalidParameterError("rank", self.index, f"must be in [0, {self.world_size})")

    @property
    def name(self) -> str:
        return f"{self.index}-of-{self.world_size}"


class ShardStore:
    """The responses below a folder.

    Args:
        folder: made when something is written.
        context: what all methods share and what decides responses, JSON.
        ivg: the parameters of IVG, from which those of other methods follow.
        seed: an instruction's random numbers are a function of it and of the text.
        max_length: tokens of the base's prompt and the response together, or None.
    """

    def __init__(
        self,
        folder: Path,
        context: Mapping[str, Any],
        ivg: SearchParams,
        seed: int,
        max_length: int | None,
    ) -> None:
        self._folder, self._context, self._seed = folder, dict(context), seed
        self._max_length = max_length
        self._params = {name: method_params(name, ivg) for name in METHODS}

    def _config(self, method: str) -> dict[str, Any]:
        params = {k: v for k, v in asdict(self._params[method]).items() if k != "seed"}
        return {**self._context, "method": method, "seed": self._seed, "params": params}

    def key(self, method: str) -> str:
        text = json.dumps(self._config(method), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _files(self, method: str) -> Iterator[Path]:
        return iter(sorted(self._folder.glob(f"*/{method}-{self.key(method)}.jsonl")))

    def load(self, method: str, items: Sequence[Item]) -> dict[int, Record]:
        """What is there of the items, by index; records are those of `run`."""
        by_text: dict[str, Record] = {}
        for file in self._files(method):
            for record in _lines(file)[1:]:
                by_text.setdefault(record["instruction"], record)
        return {item.index: by_text[item.text] for item in items if item.text in by_text}

    def merged(self, method: str, items: Sequence[Item]) -> list[Record]:
        """A record an item, in order.

        Raises:
            IncompleteError: says how many are missing.
        """
        found = self.load(method, items)
        if len(found) < len(items):
            raise IncompleteError(
                f"{method}: {len(items) - len(found)} of {len(items)} instructions have no "
                "response yet (run the ranks that are missing, with the same settings)"
            )
        return [found[item.index] for item in items]

    def missing(self, method: str, items: Sequence[Item], rank: Rank) -> list[Item]:
        """The items of a rank that nobody has answered."""
        found = self.load(method, items)
        own = [item for i, item in enumerate(items) if i % rank.world_size == rank.index]
        return [item for item in own if item.index not in found]

    def run(
        self, engine: Engine, method: str, items: Sequence[Item], rank: Rank, batch_size: int
    ) -> None:
        """Answers what is missing of a rank, writing after every batch.

        A record has instruction, output, finish_reason, num_tokens, prompt_tokens, forwarded
        (tokens by role); the batch's seconds are shared among its records.
        """
        left = self.missing(method, items, rank)
        if not left:
            return
        file = self._folder / rank.name / f"{method}-{self.key(method)}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        _mend(file, self._config(method))
        renderer = PromptRenderer({"base": engine.tokenizer}, self._base_template())
        with (
            file.open("a", encoding="utf-8") as handle,
            tqdm(total=len(left), desc=f"{method}, rank {rank.name}", unit="prompt") as bar,
        ):
            for begin in range(0, len(left), batch_size):
                batch = left[begin : begin + batch_size]
                start = time.perf_counter()
                outputs = engine.generate(
                    [item.text for item in batch],
                    [self._limited(method, renderer, item) for item in batch],
                    seeds=[prompt_seed(self._seed, item.text) for item in batch],
                )
                seconds = (time.perf_counter() - start) / len(batch)
                for item, output in zip(batch, outputs, strict=True):
                    record = _record(item, output, seconds)
                    handle.write(json.dumps(record, ensure_ascii=False) + "\n")
                handle.flush()
                bar.update(len(batch))

    def _base_template(self) -> dict[str, str]:
        return {"base": self._context["templates"]["base"]}

    def _limited(self, method: str, renderer: PromptRenderer, item: Item) -> SearchParams:
        """The method's parameters, `max_tokens` being what the prompt leaves of `max_length`."""
        params = self._params[method]
        if self._max_length is None:
            return params
        prompt = len(renderer.render(item.text, ("base",))["base"].token_ids)
        if prompt >= self._max_length:
            raise InvalidParameterError(
                f"instruction {item.index}", prompt, f"must be below {self._max_length} tokens"
            )
        return replace(params, max_tokens=min(params.max_tokens, self._max_length - prompt))


def _record(item: Item, output: Any, seconds: float) -> Record:
    best, stats = output.outputs[0], asdict(output.stats)
    forwarded: dict[str, int] = {}
    for counter in ("prefill_tokens", "decode_tokens", "score_tokens"):
        for role, count in stats[counter].items():
            forwarded[role] = forwarded.get(role, 0) + count
    return {
        "instruction": item.text,
        "output": best.text,
        "finish_reason": best.finish_reason,
        "num_tokens": len(best.token_ids),
        "prompt_tokens": len(output.prompt_token_ids),
        "forwarded": forwarded,
        "seconds": seconds,
    }


def _lines(file: Path) -> list[Record]:
    """The whole lines; one that was cut short is left out."""
    lines = file.read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines]


def _mend(file: Path, config: Record) -> None:
    """Starts a file with its configuration, or cuts it behind its last whole line."""
    if not file.exists() or not _lines(file):
        file.write_text(json.dumps(config) + "\n", encoding="utf-8")
        return
    whole = file.read_bytes().rfind(b"\n") + 1
    os.truncate(file, whole)


def write_alpaca(
    path: Path, items: Sequence[Item], records: Sequence[Record], generator: str
) -> None:
    """alpaca_eval's model outputs: a list of {instruction, output, generator, dataset?}."""
    rows = []
    for item, record in zip(items, records, strict=True):
        row = {"dataset": item.dataset} if item.dataset else {}
        row |= {
            "instruction": item.text,
            "output": record["output"].strip(),
            "generator": generator,
        }
        rows.append(row)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(rows, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
