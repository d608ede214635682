# SPDX-License-Identifier: Apache-2.0
"""What commands read and write: lines of text, JSON lines."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ivg_fast.errors import InvalidParameterError
from ivg_fast.params import is_whole_text
from ivg_fast.rendering import Prompt, PromptInput
from ivg_fast.request import ROLES

_PROMPT = "must have a 'prompt': a text, chat messages, token ids, or these by role"


def add_source(group: Any, what: str, help_: str) -> None:
    """--file, and the form of what it holds."""
    group.add_argument("--file", type=Path, help=help_)
    group.add_argument(
        "--input-format",
        choices=("text", "jsonl"),
        help=f"of {what} (default: jsonl for a file that ends so, else text)",
    )


def show_progress(arguments: argparse.Namespace) -> bool:
    """A bar on a terminal, unless it is not wanted."""
    return sys.stderr.isatty() and not arguments.no_progress


def add_progress(group: Any) -> None:
    """--no-progress."""
    group.add_argument("--no-progress", action="store_true", help="no progress bar on a terminal")


def read_lines(file: Path | None, form: str | None) -> list[tuple[str, Any]]:
    """The lines that are not blank, of a file or standard input: (its place, a text or what its
    JSON says).

    Raises:
        InvalidParameterError: no such file, or a line that is not JSON.
    """
    name = "standard input" if file is None else str(file)
    try:
        text = sys.stdin.read() if file is None else file.read_text("utf-8")
        text = text.removeprefix("\ufeff")  # a mark of byte order
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidParameterError("file", name, f"must be readable text ({error})") from error
    if form is None:
        form = "jsonl" if file is not None and file.suffix == ".jsonl" else "text"
    # Only line ends, not all that str.splitlines takes for one: JSON and prompts may hold those.
    lines = [(f"{name}:{n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if form == "text":
        return [(place, line.removesuffix("\r")) for place, line in lines]
    records: list[tuple[str, Any]] = []
    for place, line in lines:
        try:
            records.append((place, json.loads(line)))
        except json.JSONDecodeError as error:
            raise InvalidParameterError("file", place, f"must be JSON ({error})") from error
    return records


def prompt_of(place: str, record: Any) -> PromptInput:
    """The prompt of a JSON line.

    Raises:
        InvalidParameterError: it has none.
    """
    given = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(given, str | list | dict):
        raise InvalidParameterError("file", place, _PROMPT)
    if isinstance(given, dict):
        unknown = sorted(set(given) - {"raw", *ROLES})
        if unknown:
            raise InvalidParameterError("file", place, f"{_PROMPT}; not {', '.join(unknown)}")
    try:
        whole = Prompt(**given) if isinstance(given, dict) else Prompt(given)
    except InvalidParameterError as error:
        raise InvalidParameterError("file", place, f"{_PROMPT} ({error})") from error
    return whole if isinstance(given, dict) else given


def check_names(
    place: str, record: dict[str, Any], known: Collection[str], *, can_pass: bool
) -> None:
    """InvalidParameterError for a field that is none of `known`; with `can_pass` only for one that
    reads like a slip of the pen."""
    for name in sorted(set(record) - set(known)):
        meant = difflib.get_close_matches(name, known, n=1, cutoff=0.85 if can_pass else 0.6)
        if meant or not can_pass:
            hint = f" (is {meant[0]!r} meant?)" if meant else ""
            raise InvalidParameterError(
                "file", place, f"must have no field {name!r} in a line{hint}"
            )


def line_of(place: str) -> int:
    """The number at the end of a place."""
    return int(place.rpartition(":")[2])


def write_json(record: dict[str, Any]) -> None:
    """One line on standard output."""
    text = json.dumps(record, ensure_ascii=False)
    print(text if is_whole_text(text) else json.dumps(record), flush=True)
