# SPDX-License-Identifier: Apache-2.0
"""`ivg-fast score`: what a value function says of given prompts and responses."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ivg_fast.cli.options import add_models, check_models, scorer_of, templates_of
from ivg_fast.cli.records import (
    add_progress,
    check_names,
    line_of,
    prompt_of,
    read_lines,
    show_progress,
    write_json,
)
from ivg_fast.errors import InvalidParameterError, IVGError
from ivg_fast.rendering import PromptInput
from ivg_fast.request import GUIDES, ROLES
from ivg_fast.response_scorer import ResponseScorer

_DESCRIPTION = """Score given responses with a value function, as a search scores its own.

Reads JSON lines {"prompt", "response"} and writes them back with a "score":
  --tuned T --untuned U       implicit: sum of log tuned - log untuned over the response
  --value V                   explicit: a vocabulary head or a reward model; where its tokenizer is
                              not the base's it reads prompt + response as one text
  --scorer module:function    a callable, list[ScoreInput] -> one number each
No base model is run, and nothing on a GPU. With several of these, --scorer says which is meant.
"""
_EPILOG = """examples:
  the pair's value of the responses in a file:
    ivg-fast score --tuned T --untuned U --file responses.jsonl > scored.jsonl
  a reward model with its own prompt template, over finished responses:
    ivg-fast score --value V --template value=human-assistant --ends-text --file responses.jsonl
  a function of your own:
    ivg-fast score --scorer my_module:my_function --file responses.jsonl
  from standard input:
    echo '{"prompt": "I saw this film", "response": " and loved it"}' | ivg-fast score --value V

"prompt" is as for `ivg-fast generate`, "response" a text or a list of token ids; "ends_text": true
in a line says that an end of text is read behind that response. Other fields, such as an "id", are
written back as they came; a near miss of these names ("end_text") is refused. What is wrong in the
file itself is refused before a model is loaded, by its line, with exit code 2. A line that cannot
be scored is written with its "line" number and an "error" instead, and the exit code is 1.
"""
_BATCH = 64


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "score",
        help="value of given responses",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_models(
        parser,
        "whose token ids the responses are; only its tokenizer is read (default: that of --tuned, "
        "else of --value)",
    )
    scoring = parser.add_argument_group("scoring")
    scoring.add_argument("--scorer", help="implicit, explicit, or a callable's module:function")
    scoring.add_argument(
        "--ends-text", action="store_true", help="an end of text is read behind every response"
    )
    scoring.add_argument(
        "--max-batch-tokens", type=int, default=2048, help="tokens a forward (default 2048)"
    )
    files = parser.add_argument_group("input and output")
    files.add_argument("--file", type=Path, help="JSON lines (default: standard input)")
    add_progress(files)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> bool:
    """Whether every line was scored."""
    models: dict[str, Any] = {role: getattr(arguments, role) for role in ROLES}
    scorer = _scorer(arguments.scorer, models)
    templates = templates_of(arguments)
    lines = [
        _line(place, record, arguments.ends_text)
        for place, record in read_lines(arguments.file, "jsonl")
    ]
    if not lines:
        raise InvalidParameterError("file", None, "must hold a line: there is none")
    check_models(models, [("scorer", scorer)], arguments.model_kwargs)
    is_good = True
    with (
        ResponseScorer.from_pretrained(
            **_needed(models, scorer),
            dtype=arguments.dtype,
            model_kwargs=arguments.model_kwargs,
            templates=templates or None,
            max_batch_tokens=arguments.max_batch_tokens,
        ) as value,
        tqdm(total=len(lines), unit="line", disable=not show_progress(arguments)) as bar,
    ):
        for begin in range(0, len(lines), _BATCH):
            batch = lines[begin : begin + _BATCH]
            for line, score in zip(batch, _scores(value, batch, scorer), strict=True):
                if isinstance(score, Exception):
                    is_good = False
                    said = f"{type(score).__name__}: {score}"
                    write_json({**line.record, "line": line_of(line.place), "error": said})
                    tqdm.write(f"ivg-fast: {line.place}: {score}", file=sys.stderr)
                else:
                    write_json({**line.record, "score": score})
            bar.update(len(batch))
    return is_good


@dataclass(frozen=True, slots=True)
class _Line:
    place: str
    record: dict[str, Any]
    prompt: PromptInput
    ends_text: bool


def _line(place: str, record: Any, ends_text: bool) -> _Line:
    prompt = prompt_of(place, record)
    check_names(place, record, ("prompt", "response", "ends_text", "id"), can_pass=True)
    response = record.get("response")
    is_ids = isinstance(response, list) and all(type(token) is int for token in response)
    if not isinstance(response, str) and not is_ids:
        raise InvalidParameterError(
            "file", place, "must have a 'response' in each line: a text or token ids"
        )
    ends = record.get("ends_text", ends_text)
    if not isinstance(ends, bool):
        raise InvalidParameterError("file", place, "must have true or false for 'ends_text'")
    return _Line(place, record, prompt, ends)


def _scorer(name: str | None, models: Mapping[str, str | None]) -> Any:
    """What --scorer names, or the one value function that the models are."""
    if name is not None:
        if name == "none":
            raise InvalidParameterError("scorer", name, "must be one that scores")
        return scorer_of(name)
    has_pair = models["tuned"] is not None or models["untuned"] is not None
    if has_pair == (models["value"] is not None):
        what = "must say which of both is meant" if has_pair else "or a model must be given"
        raise InvalidParameterError("scorer", None, what)
    return "implicit" if has_pair else "explicit"


def _needed(models: Mapping[str, Any], scorer: Any) -> dict[str, Any]:
    """The models that the scorer needs, and whose token ids the responses are."""
    needed = ("base",) if callable(scorer) else ("base", *GUIDES[scorer])
    return {role: models[role] for role in needed}


def _scores(
    value: ResponseScorer, lines: Sequence[_Line], scorer: Any
) -> Sequence[float | Exception]:
    """The lines' scores; where they fail together, each gets its own score or error."""
    try:
        return value.score(
            [line.prompt for line in lines],
            [line.record["response"] for line in lines],
            scorer,
            ends_text=[line.ends_text for line in lines],
        )
    except IVGError as error:
        if len(lines) == 1:
            return [error]
        return [_scores(value, [line], scorer)[0] for line in lines]
