# SPDX-License-Identifier: Apache-2.0
"""What is to be answered: alpaca_eval's instructions, IFEval's prompts, or a file of the like."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ivg_fast.errors import InvalidParameterError
from ivg_fast.training.records import TrainingDataError, check_records, read_jsonl


@dataclass(frozen=True, slots=True)
class Item:
    """An instruction, and what of its record is needed later.

    Attributes:
        index: its place in the file, 0-based.
        text: what a model is asked.
        dataset: alpaca_eval's column, "" where there is none.
        checks: IFEval's `instruction_id_list` and `kwargs`; None for other files.
        key: IFEval's own number of the prompt, else the index.
    """

    index: int
    text: str
    dataset: str = ""
    checks: dict[str, Any] | None = None
    key: int = 0


def load_instructions(path: str | Path) -> list[Item]:
    """A JSON list of {"instruction", "dataset"?, ...}, as alpaca_eval's data and outputs are.

    Raises:
        TrainingDataError: no such file, or not such a list.
    """
    file = Path(path)
    if not file.is_file():
        raise TrainingDataError(f"no such file: {file}")
    try:
        records = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise TrainingDataError(f"{file}: not JSON ({error})") from error
    if not isinstance(records, list) or not all(isinstance(r, dict) for r in records):
        raise TrainingDataError(f"{file}: must be a list of objects")
    check_records(records, {"instruction": str}, str(file))
    return [
        Item(index, record["instruction"], str(record.get("dataset", "")), None, index)
        for index, record in enumerate(records)
    ]


def load_ifeval(path: str | Path) -> list[Item]:
    """IFEval's JSON lines: {"prompt", "instruction_id_list", "kwargs", "key" or "id"?}.

    Raises:
        TrainingDataError: no such file, a column that is not there, lists of unequal length.
    """
    columns = {"prompt": str, "instruction_id_list": list, "kwargs": list}
    items = []
    for index, record in enumerate(read_jsonl(path, columns)):
        checks = {name: record[name] for name in ("instruction_id_list", "kwargs")}
        if len({len(column) for column in checks.values()}) != 1 or not checks["kwargs"]:
            raise TrainingDataError(
                f"{path}, record {index + 1}: instruction_id_list and kwargs must be of one length"
            )
        key = record.get("key", record.get("id", index))
        if not isinstance(key, int):
            raise TrainingDataError(f"{path}, record {index + 1}: key must be int, got {key!r}")
        items.append(Item(index, record["prompt"], "", checks, key))
    return items


def subset(items: Sequence[Item], count: int | None, seed: int) -> list[Item]:
    """`count` of the items, drawn by `seed`, in the file's order; None: all of them.

    A larger count holds a smaller one of the same seed, so that a run can grow.

    Raises:
        InvalidParameterError: more than there are, or fewer than 1.
    """
    if count is None:
        return list(items)
    if not 1 <= count <= len(items):
        raise InvalidParameterError("num_prompts", count, f"must be in [1, {len(items)}]")
    order = list(range(len(items)))
    random.Random(seed).shuffle(order)
    return [items[i] for i in sorted(order[:count])]
