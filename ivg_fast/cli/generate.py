# SPDX-License-Identifier: Apache-2.0
"""`ivg-fast generate`: prompts in, steered text out."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from ivg_fast.cli.options import add_fields, add_models, check_models, fields_of
from ivg_fast.cli.records import (
    add_progress,
    add_source,
    prompt_of,
    read_lines,
    show_progress,
    write_json,
)
from ivg_fast.cli.search import add_search, search_of
from ivg_fast.engine import Engine
from ivg_fast.errors import InvalidParameterError
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
these by role (raw, base, tuned, untuned, value); "seed" may stand beside it. The lines of a prompt
are written as soon as it and those before it are done. A request that fails is a line {"prompt",
"error"}; the others are finished, and the exit code is 1.
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
    parser.add_argument("--device", default="cpu", help="cpu or cuda, of all models (default cpu)")
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
    prompts, seeds = _prompts(arguments, params)
    check_models(models, [("guidance", params.guidance), ("scorer", params.scorer)])
    with Engine.from_pretrained(
        **models,
        device=arguments.device,
        dtype=arguments.dtype,
        templates=asked.templates or None,
        config=config,
    ) as engine:
        every = _within(asked.settings, engine, asked.templates, prompts, params)
        lines = Lines(prompts, arguments.format)
        try:
            engine.generate(
                prompts,
                every,
                seeds=seeds,
                use_tqdm=show_progress(arguments),
                on_ended=lines.ended,
            )
        except Exception as error:
            if getattr(error, "failures", None) is None:
                raise
            return False
    return True


class Lines:
    """Writes each prompt's line once those before it are written."""

    def __init__(self, prompts: Sequence[PromptInput], form: str) -> None:
        self._prompts = prompts
        self._form = form
        self._ended: dict[int, RequestOutput | BaseException] = {}
        self._next = 0

    def ended(self, index: int, output: RequestOutput | BaseException) -> None:
        """Of Engine.generate."""
        self._ended[index] = output
        with tqdm.external_write_mode():
            while self._next in self._ended:
                ended = self._ended.pop(self._next)
                if isinstance(ended, RequestOutput):
                    _write(ended, self._form)
                else:
                    _write_failure(self._prompts[self._next], ended, self._form)
                self._next += 1


def _prompts(
    arguments: argparse.Namespace, params: SearchParams
) -> tuple[list[PromptInput], list[int] | None]:
    """The prompts, and their seeds if any line has one."""
    if arguments.prompt is not None and arguments.file is not None:
        raise InvalidParameterError("prompt", arguments.prompt, "must stand without --file")
    if arguments.prompt is not None:
        return list(arguments.prompt), None
    prompts: list[PromptInput] = []
    given: dict[int, int] = {}
    for index, (place, record) in enumerate(read_lines(arguments.file, arguments.input_format)):
        if isinstance(record, str):
            prompts.append(record)
            continue
        prompts.append(prompt_of(place, record))
        if record.get("seed") is not None:
            given[index] = record["seed"]
    if not prompts:
        raise InvalidParameterError("prompts", prompts, "must be given: there are none")
    if not given:
        return prompts, None
    if params.seed is None and len(given) < len(prompts):
        raise InvalidParameterError("seed", None, "must be in every line or none, or be an option")
    return prompts, [
        given[i] if i in given else derive_seed(params.seed or 0, i) for i in range(len(prompts))
    ]


def _within(
    settings: Preset | None,
    engine: Engine,
    templates: Mapping[str, str | Template],
    prompts: Sequence[PromptInput],
    params: SearchParams,
) -> SearchParams | list[SearchParams]:
    """The params; where a preset limits prompt and response together, those of each prompt."""
    if settings is None or settings.max_length is None:
        return params
    base = {role: template for role, template in templates.items() if role == "base"}
    renderer = PromptRenderer({"base": engine.tokenizer}, base)
    every = []
    for index, prompt in enumerate(prompts):
        room = settings.max_length - len(renderer.render(prompt, ["base"])["base"].token_ids)
        if room < 1:
            raise InvalidParameterError(
                "prompts", prompt, f"must be shorter than the preset's {settings.max_length} tokens"
            )
        seed = None if params.seed is None else derive_seed(params.seed, index)
        most = min(params.max_tokens, room)
        every.append(dataclasses.replace(params, max_tokens=most, seed=seed))
    return every


def _write(output: RequestOutput, form: str) -> None:
    if form == "jsonl":
        write_json(dataclasses.asdict(output))
        return
    for candidate in output.outputs:
        print(f"{output.prompt or ''}{candidate.text}")
        print(
            f"  -- score {candidate.score:.3f}, implicit reward {candidate.implicit_reward:.3f}, "
            f"log-prob {candidate.cumulative_logprob:.2f} (base {candidate.base_logprob:.2f}), "
            f"{candidate.finish_reason}, seed {output.seed}",
            flush=True,
        )


def _write_failure(prompt: PromptInput, error: BaseException, form: str) -> None:
    shown = prompt if isinstance(prompt, str) else repr(prompt)
    message = f"{type(error).__name__}: {error}"
    if form == "jsonl":
        write_json({"prompt": shown, "error": message})
    print(f"ivg-fast: prompt {shown!r}: {message}", file=sys.stderr)
