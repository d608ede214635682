# SPDX-License-Identifier: Apache-2.0
"""JSON lines in and out, checked before any training starts."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ivg_fast.errors import IVGError

Record = dict[str, Any]

SAMPLE_COLUMNS = {"prompt": str, "response": str, "reward": float}
PAIR_COLUMNS = {"prompt": str, "chosen": str, "rejected": str}
# Squared, it must stay within float32.
MAX_REWARD = 1e15
RESPONSES = ("response", "chosen", "rejected")


class TrainingDataError(IVGError, ValueError):
    """A training file that cannot be used; the message names the file, the line and the column."""


def flag_of(response: str) -> str:
    """Name of the optional column that says whether the response so named ended by itself."""
    return f"{response}_is_whole"


def is_whole(record: Mapping[str, Any], response: str = "response") -> bool:
    """False where the record says that its response was cut, so that no end of text follows it."""
    return bool(record.get(flag_of(response), True))


def check_records(
    records: Sequence[Mapping[str, Any]], columns: Mapping[str, type], source: str = "records"
) -> None:
    """Raise TrainingDataError unless each record has each column, of its type, numbers finite.

    A text is not empty; a response may be, where the record says that it is whole: the model then
    answered with an end of text alone.
    """
    if not records:
        raise TrainingDataError(f"{source} is empty")
    for number, record in enumerate(records, 1):
        for name, kind in columns.items():
            if name not in record:
                raise TrainingDataError(
                    f"{source}, record {number}: missing column {name!r}, found {sorted(record)}"
                )
            value = record[name]
            if kind is float:
                is_number = isinstance(value, int | float) and not isinstance(value, bool)
                if not is_number or value != value or abs(value) == math.inf:
                    raise TrainingDataError(
                        f"{source}, record {number}: {name} must be a finite number, got {value!r}"
                    )
                if abs(value) > MAX_REWARD:
                    raise TrainingDataError(
                        f"{source}, record {number}: {name} must be at most {MAX_REWARD:g} in "
                        f"size, got {value!r}"
                    )
            elif not isinstance(value, kind):
                raise TrainingDataError(
                    f"{source}, record {number}: {name} must be {kind.__name__}, got {value!r}"
                )
            elif name in RESPONSES and not isinstance(record.get(flag_of(name), True), bool):
                raise TrainingDataError(
                    f"{source}, record {number}: {flag_of(name)} must be bool, got "
                    f"{record[flag_of(name)]!r}"
                )
            elif kind is str and not value and not record.get(flag_of(name), False):
                raise TrainingDataError(f"{source}, record {number}: {name} is an empty string")


def read_jsonl(path: str | Path, columns: Mapping[str, type]) -> list[Record]:
    """Records of a JSON lines file (blank lines skipped), each checked against `columns`."""
    file = Path(path)
    if not file.is_file():
        raise TrainingDataError(f"no such file: {file}")
    records = []
    with file.open("rb") as handle:
        for number, line in enumerate(handle, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise TrainingDataError(f"{file}, line {number}: not UTF-8 ({error})") from error
            except json.JSONDecodeError as error:
                raise TrainingDataError(f"{file}, line {number}: not JSON ({error})") from error
            if not isinstance(record, dict):
                raise TrainingDataError(f"{file}, line {number}: not a JSON object")
            records.append(record)
    check_records(records, columns, str(file))
    return records


def whole_lines(path: str | Path) -> list[Any]:
    """What the lines of a growing file hold as JSON, [] where there is none. A last line that an
    interruption cut short, maybe within a character, is cut off the file."""
    file = Path(path)
    if not file.exists():
        return []
    *lines, torn = file.read_bytes().split(b"\n")  # no other line ends: JSON's texts may hold them
    if torn:
        os.truncate(file, file.stat().st_size - len(torn))
    return [json.loads(line) for line in lines]


def read_texts(path: str | Path) -> list[str]:
    """Texts of a JSON lines file: column "text", or "prompt" and "response" joined."""
    records = read_jsonl(path, {})
    if "text" in records[0]:
        check_records(records, {"text": str}, str(path))
        return [record["text"] for record in records]
    check_records(records, {"prompt": str, "response": str}, str(path))
    return [record["prompt"] + record["response"] for record in records]


def write_jsonl(path: str | Path, records: Iterable[Mapping[str, Any]]) -> None:
    with Path(path).open("w", encoding="utf-8") as handle:
        for record in records:
            handle.write(json.dumps(record, ensure_ascii=False) + "\n")
