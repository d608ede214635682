# SPDX-License-Identifier: Apache-2.0
"""`ivg-fast generate`: prompts in, steered text out."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ivg_fast.cli.options import (
    add_fields,
    add_models,
    check_models,
    fields_of,
    scorer_of,
    templates_of,
)
from ivg_fast.cli.records import (
    add_progress,
    add_source,
    prompt_of,
    read_lines,
    show_progress,
    write_json,
)
from ivg_fast.engine import Engine
from ivg_fast.errors import InvalidParameterError
from ivg_fast.outputs import RequestOutput
from ivg_fast.params import EngineConfig, SearchParams
from ivg_fast.prompts import derive_seed
from ivg_fast.rendering import PromptInput, PromptRenderer
from ivg_fast.request import ROLES
from ivg_fast.templates import PRESET_NAMES, Preset, Template, preset

_METHODS = {
    "base": SearchParams.base,
    "eft": SearchParams.eft,
    "cbs": SearchParams.cbs,
    "ivg": SearchParams.ivg,
}
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
these by role (raw, base, tuned, untuned, value); "seed" may stand beside it. A request that fails
is a line {"prompt", "error"}; the others are finished, and the exit code is 1.
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
    search = parser.add_argument_group("search (see SearchParams); given ones override the named")
    named = search.add_mutually_exclusive_group()
    named.add_argument("--method", choices=_METHODS, help="a named method (default base)")
    named.add_argument(
        "--preset",
        choices=PRESET_NAMES,
        help="an experiment of the paper: its models, templates, search and length; --base, "
        "--tuned, --untuned, --value and --template override its own",
    )
    add_fields(search, SearchParams)
    add_fields(parser.add_argument_group("engine (see EngineConfig)"), EngineConfig)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> bool:
    """Whether every request succeeded."""
    settings = None if arguments.preset is None else _preset(arguments)
    models: dict[str, Any] = {role: getattr(arguments, role) for role in ROLES}
    templates = templates_of(arguments)
    if settings is not None:
        models = {role: models[role] or settings.models.get(role) for role in ROLES}
        templates = {**settings.templates, **templates}
    if models["base"] is None:
        raise InvalidParameterError("base", None, "must be given: --base or --preset")
    params = _params(arguments, settings)
    config = EngineConfig(**fields_of(arguments, EngineConfig))
    prompts, seeds = _prompts(arguments, params)
    check_models(models, [("guidance", params.guidance), ("scorer", params.scorer)])
    with Engine.from_pretrained(
        **models, dtype=arguments.dtype, templates=templates or None, config=config
    ) as engine:
        every = _within(settings, engine, templates, prompts, params)
        outputs: Sequence[RequestOutput | None]
        failures: Mapping[int, BaseException] = {}
        try:
            outputs = engine.generate(
                prompts, every, seeds=seeds, use_tqdm=show_progress(arguments)
            )
        except Exception as error:
            if getattr(error, "failures", None) is None:
                raise
            outputs, failures = error.outputs, error.failures  # type: ignore[attr-defined]
    for index, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        if output is None:
            _write_failure(prompt, failures[index], arguments.format)
        else:
            _write(output, arguments.format)
    return not failures


def _preset(arguments: argparse.Namespace) -> Preset:
    try:
        return preset(arguments.preset, base=arguments.base)
    except InvalidParameterError:  # a folder, or a model of the user's
        return preset(arguments.preset)


def _params(arguments: argparse.Namespace, settings: Preset | None) -> SearchParams:
    options = fields_of(arguments, SearchParams)
    if "scorer" in options:
        options["scorer"] = scorer_of(options["scorer"])
    if settings is not None:
        return dataclasses.replace(settings.params, **options)
    if "max_tokens" not in options:
        raise InvalidParameterError("max_tokens", None, "must be given: --max-tokens or --preset")
    method = _METHODS[arguments.method or "base"](max_tokens=options["max_tokens"])
    return dataclasses.replace(method, **options)


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
            f"{candidate.finish_reason}, seed {output.seed}"
        )


def _write_failure(prompt: PromptInput, error: BaseException, form: str) -> None:
    shown = prompt if isinstance(prompt, str) else repr(prompt)
    message = f"{type(error).__name__}: {error}"
    if form == "jsonl":
        write_json({"prompt": shown, "error": message})
    print(f"ivg-fast: prompt {shown!r}: {message}", file=sys.stderr)
