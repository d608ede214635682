# SPDX-License-Identifier: Apache-2.0
"""`ivg-fast generate`: prompts in, steered text out."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from ivg_fast.cli.options import add_fields, add_models, check_models, fields_of
from ivg_fast.cli.records import (
    add_progress,
    add_source,
    check_names,
    line_of,
    prompt_of,
    read_lines,
    show_progress,
    write_json,
)
from ivg_fast.cli.search import add_search, search_of
from ivg_fast.engine import Engine
from ivg_fast.errors import InvalidParameterError, IVGError
from ivg_fast.outputs import RequestOutput
from ivg_fast.params import EngineConfig, SearchParams
from ivg_fast.prompts import derive_seed
from ivg_fast.rendering import PromptInput, PromptRenderer
from ivg_fast.templates import Preset, Template

_DESCRIPTION = """Decode prompts with a base model, steered by value functions.

--guidance tilts every next-token distribution, --scorer ranks whole chunks in a search over
--beam-width * --num-candidates candidates; --method names the usual settings of both:
  base  neither            eft   --guidance implicit (needs --tuned and --untuned)
  cbs   --scorer implicit, W, K, L = 4, 4, 5
  ivg   --guidance implicit --scorer explicit (needs --value too), W, K, L = 4, 4, 5
  best_of_n  --scorer explicit (needs --value), the best of --num-candidates (16) whole responses
"""
_EPILOG = """examples:
  a prompt, the base model as it is:
    ivg-fast generate --base MODEL --prompt "I saw this film" --max-tokens 50
  integrated value guidance, a prompt a line:
    ivg-fast generate --base MODEL --tuned T --untuned U --value V --method ivg \\
      --max-tokens 50 --temperature 0.7 --file prompts.txt
  JSON lines in and out, the best three of each, reproducible:
    ivg-fast generate --base MODEL --tuned T --untuned U --method cbs --n 3 --seed 7 \\
      --max-tokens 50 --file prompts.jsonl --format jsonl > out.jsonl
  ranked by a function of your own, list[ScoreInput] -> one number each:
    ivg-fast generate --base MODEL --method cbs --scorer my_module:my_function --max-tokens 50 \\
      --prompt "I saw this film"
  an experiment of the paper, models and templates included:
    ivg-fast generate --preset imdb --file prompts.txt

In JSON lines "prompt" is a text, a list of chat messages, a list of token ids, or an object of
these by role (raw, base, tuned, untuned, value); beside it may stand a "seed", and an "id", any
JSON, which is in the line out too. Other fields, and what is wrong in the file itself, are refused
before a model is loaded, by their line, with exit code 2. The lines of a prompt are written as soon
as it and those before it are done. A request that fails, or that the models cannot take, is a line
{"prompt", "line", "error"}; the others are finished, and the exit code is 1.
"""


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "generate",
        help="decode prompts",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_models(parser)
    prompts = parser.add_argument_group("prompts (default: standard input)")
    prompts.add_argument("--prompt", action="append", help="a prompt; may be repeated")
    add_source(prompts, "the prompts", "one prompt a line")
    out = parser.add_argument_group("output")
    out.add_argument("--format", choices=("text", "jsonl"), default="text", help="(default text)")
    add_progress(out)
    add_search(parser, "search (see SearchParams); given ones override the named")
    add_fields(parser.add_argument_group("engine (see EngineConfig)"), EngineConfig)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> bool:
    """Whether every request succeeded."""
    asked = search_of(arguments)
    models, params = asked.models, asked.params
    config = EngineConfig(**fields_of(arguments, EngineConfig))
    asks = _asks(arguments, params)
    kinds = [("guidance", params.guidance), ("scorer", params.scorer)]
    check_models(models, kinds, arguments.model_kwargs)
    with Engine.from_pretrained(
        **models,
        device=arguments.device,
        dtype=arguments.dtype,
        templates=asked.templates or None,
        model_kwargs=arguments.model_kwargs,
        config=config,
    ) as engine:
        lines = Lines(asks, arguments.format)
        accepted: list[int] = []
        every: list[SearchParams] = []
        for index, ask in enumerate(asks):
            try:
                own = _within(asked.settings, engine, asked.templates, ask.prompt, params)
                engine.check_request(ask.prompt, own)
            except IVGError as error:
                lines.ended(index, error)
            else:
                accepted.append(index)
                every.append(own)
        seeds = [seed for i in accepted if (seed := asks[i].seed) is not None]
        try:
            engine.generate(
                [asks[i].prompt for i in accepted],
                every,
                seeds=seeds or None,  # all have one, or none
                use_tqdm=show_progress(arguments),
                on_ended=lambda i, output: lines.ended(accepted[i], output),
            )
        except Exception as error:
            if getattr(error, "failures", None) is None:
                raise
            return False
    return len(accepted) == len(asks)


@dataclass(frozen=True, slots=True)
class Ask:
    """A prompt: where it stands, what its line says (a text, or JSON), the seed if it has one."""

    place: str
    record: Any
    prompt: PromptInput
    seed: int | None = None


class Lines:
    """Writes each prompt's line once those before it are written."""

    def __init__(self, asks: Sequence[Ask], form: str) -> None:
        self._asks = asks
        self._form = form
        self._ended: dict[int, RequestOutput | BaseException] = {}
        self._next = 0

    def ended(self, index: int, output: RequestOutput | BaseException) -> None:
        """Of Engine.generate."""
        self._ended[index] = output
        with tqdm.external_write_mode():
            while self._next in self._ended:
                ended, ask = self._ended.pop(self._next), self._asks[self._next]
                if isinstance(ended, RequestOutput):
                    _write(ask, ended, self._form)
                else:
                    _write_failure(ask, ended, self._form)
                self._next += 1


def _asks(arguments: argparse.Namespace, params: SearchParams) -> list[Ask]:
    """The prompts; a seed each, or none."""
    if arguments.prompt is not None and arguments.file is not None:
        raise InvalidParameterError("prompt", arguments.prompt, "must stand without --file")
    if arguments.prompt is not None:
        read: list[tuple[str, Any]] = [
            (f"--prompt:{n}", text) for n, text in enumerate(arguments.prompt, 1)
        ]
    else:
        read = read_lines(arguments.file, arguments.input_format)
    if not read:
        raise InvalidParameterError("prompts", [], "must be given: there are none")
    asks = [_ask(place, record) for place, record in read]
    if params.seed is not None:
        return [
            dataclasses.replace(ask, seed=derive_seed(params.seed, i)) if ask.seed is None else ask
            for i, ask in enumerate(asks)
        ]
    if len({ask.seed is None for ask in asks}) > 1:
        raise InvalidParameterError("seed", None, "must be in every line or none, or be an option")
    return asks


def _ask(place: str, record: Any) -> Ask:
    if isinstance(record, str):
        return Ask(place, record, record)
    prompt = prompt_of(place, record)
    check_names(place, record, ("prompt", "seed", "id"), can_pass=False)
    seed = record.get("seed")
    if seed is not None and (type(seed) is not int or not 0 <= seed < 2**64):
        raise InvalidParameterError("file", place, "must have an integer in [0, 2^64) for 'seed'")
    return Ask(place, record, prompt, seed)


def _within(
    settings: Preset | None,
    engine: Engine,
    templates: Mapping[str, str | Template],
    prompt: PromptInput,
    params: SearchParams,
) -> SearchParams:
    """The params; where a preset limits prompt and response together, those of this prompt."""
    if settings is None or settings.max_length is None:
        return params
    base = {role: template for role, template in templates.items() if role == "base"}
    renderer = PromptRenderer({"base": engine.tokenizer}, base)
    room = settings.max_length - len(renderer.render(prompt, ["base"])["base"].token_ids)
    if room < 1:
        raise InvalidParameterError(
            "prompts", prompt, f"must be shorter than the preset's {settings.max_length} tokens"
        )
    return dataclasses.replace(params, max_tokens=min(params.max_tokens, room))


def _of(ask: Ask) -> dict[str, Any]:
    """What a line takes over from its prompt's."""
    has_id = isinstance(ask.record, dict) and "id" in ask.record
    return {"id": ask.record["id"]} if has_id else {}


def _write(ask: Ask, output: RequestOutput, form: str) -> None:
    if form == "jsonl":
        write_json({**_of(ask), **dataclasses.asdict(output)})
        return
    for candidate in output.outputs:
        print(f"{output.prompt or ''}{candidate.text}")
        print(
            f"  -- score {candidate.score:.3f}, implicit reward {candidate.implicit_reward:.3f}, "
            f"log-prob {candidate.cumulative_logprob:.2f} (base {candidate.base_logprob:.2f}), "
            f"{candidate.finish_reason}, seed {output.seed}",
            flush=True,
        )


def _write_failure(ask: Ask, error: BaseException, form: str) -> None:
    given = ask.record["prompt"] if isinstance(ask.record, dict) else ask.record
    message = f"{type(error).__name__}: {error}"
    if form == "jsonl":
        line = line_of(ask.place)
        write_json({**_of(ask), "prompt": given, "line": line, "error": message})
    print(f"ivg-fast: {ask.place}: prompt {given!r}: {message}", file=sys.stderr)
