# SPDX-License-Identifier: Apache-2.0
"""`ivg-fast`: the engine from a shell."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import platform
import re
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ivg_fast import _C
from ivg_fast.engine import Engine
from ivg_fast.errors import InvalidParameterError, IVGError
from ivg_fast.ops.block_copy import gpu_backend
from ivg_fast.outputs import RequestOutput
from ivg_fast.params import EngineConfig, SearchParams
from ivg_fast.training import cli as training

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2

_METHODS = {
    "base": SearchParams.base,
    "eft": SearchParams.eft,
    "cbs": SearchParams.cbs,
    "ivg": SearchParams.ivg,
}
_EPILOG = """examples:
  ivg-fast generate --base gpt2-large --prompt "I saw this film" --max-tokens 50
  ivg-fast generate --base BASE --tuned T --untuned U --value V --method ivg --file prompts.txt
  ivg-fast generate --base BASE --file prompts.jsonl --format jsonl --max-tokens 50 > out.jsonl
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; 0: done, 1: it failed, 2: it was asked wrongly."""
    parser = argparse.ArgumentParser(
        prog="ivg-fast", description="Integrated Value Guidance for frozen language models."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_generate(commands)
    info = commands.add_parser("info", help="what was built, versions, devices")
    info.set_defaults(run=_info)
    training.add_parser(commands)
    arguments = parser.parse_args(argv)
    if arguments.command == "train":
        return training.run(arguments)
    try:
        return arguments.run(arguments)
    except InvalidParameterError as error:
        print(f"ivg-fast: {error}", file=sys.stderr)
        return EXIT_USAGE
    except (IVGError, OSError, json.JSONDecodeError) as error:
        print(f"ivg-fast: {error}", file=sys.stderr)
        return EXIT_FAILED


def _add_generate(commands: Any) -> None:
    parser = commands.add_parser(
        "generate",
        help="decode prompts",
        description="Decode prompts with a base model, steered by value functions.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    models = parser.add_argument_group("models (folders or hub names, safetensors only)")
    models.add_argument("--base", required=True, help="the model that is steered")
    models.add_argument("--tuned", help="small tuned model of the implicit value function")
    models.add_argument("--untuned", help="its untuned partner")
    models.add_argument("--value", help="explicit value function with score_head.weight")
    models.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")
    prompts = parser.add_argument_group("prompts (default: standard input)")
    source = prompts.add_mutually_exclusive_group()
    source.add_argument("--prompt", action="append", help="a prompt; may be repeated")
    source.add_argument(
        "--file", type=Path, help="one prompt a line; in .jsonl each line has a 'prompt'"
    )
    out = parser.add_argument_group("output")
    out.add_argument("--format", choices=("text", "jsonl"), default="text")
    out.add_argument("--no-progress", action="store_true", help="no progress bar on a terminal")
    search = parser.add_argument_group("search (see SearchParams)")
    search.add_argument(
        "--method",
        choices=_METHODS,
        help="a named method (default base); options below override its own",
    )
    _add_fields(search, SearchParams)
    _add_fields(parser.add_argument_group("engine (see EngineConfig)"), EngineConfig)
    parser.set_defaults(run=_generate)


def _add_fields(group: Any, cls: type) -> None:
    """One option a field of a dataclass; absent options stay out of the namespace."""
    hints = typing.get_type_hints(cls)
    documented = _attribute_docs(cls)
    for field in dataclasses.fields(cls):
        kinds = set(typing.get_args(hints[field.name])) or {hints[field.name]}
        option = "--" + field.name.replace("_", "-")
        keywords: dict[str, Any] = {"default": argparse.SUPPRESS, "dest": field.name}
        default = field.default
        is_required = default is dataclasses.MISSING
        keywords["help"] = documented[field.name].replace("%", "%%")
        if default not in (None, (), False, dataclasses.MISSING):
            keywords["help"] += f" (default {default})"
        if bool in kinds:
            group.add_argument(option, action="store_true", **keywords)
        elif field.name in ("stop", "stop_token_ids"):
            kind = int if field.name == "stop_token_ids" else str
            group.add_argument(option, action="append", type=kind, **keywords)
        elif field.name in ("guidance", "scorer"):
            group.add_argument(option, choices=("none", "implicit", "explicit"), **keywords)
        else:
            kinds -= {types.NoneType}
            (kind,) = kinds
            group.add_argument(option, type=kind, required=is_required, **keywords)


def _attribute_docs(cls: type) -> dict[str, str]:
    """The Attributes section of a docstring, an entry a field."""
    section = inspect.cleandoc(cls.__doc__ or "").split("Attributes:\n", 1)[1].split("\n\n")[0]
    entries = re.split(r"^ {4}(\w+): ", section, flags=re.MULTILINE)[1:]
    texts = (" ".join(text.split()).rstrip(".") for text in entries[1::2])
    return dict(zip(entries[::2], texts, strict=True))


def _fields(arguments: argparse.Namespace, cls: type) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(cls)}
    return {name: value for name, value in vars(arguments).items() if name in names}


def _generate(arguments: argparse.Namespace) -> int:
    options = _fields(arguments, SearchParams)
    method = _METHODS[arguments.method or "base"](max_tokens=arguments.max_tokens)
    params = dataclasses.replace(method, **options)
    config = EngineConfig(**_fields(arguments, EngineConfig))
    prompts = list(_read_prompts(arguments))
    if not prompts:
        raise InvalidParameterError("prompts", prompts, "must be given: there are none")
    with Engine.from_pretrained(
        arguments.base,
        arguments.tuned,
        arguments.untuned,
        arguments.value,
        dtype=arguments.dtype,
        config=config,
    ) as engine:
        show = sys.stderr.isatty() and not arguments.no_progress
        outputs = engine.generate(prompts, params, use_tqdm=show)
    for output in outputs:
        _write(output, arguments.format)
    return EXIT_OK


def _read_prompts(arguments: argparse.Namespace) -> Iterator[str]:
    if arguments.prompt is not None:
        yield from arguments.prompt
        return
    is_json = arguments.file is not None and arguments.file.suffix == ".jsonl"
    text = sys.stdin.read() if arguments.file is None else arguments.file.read_text("utf-8")
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        if not is_json:
            yield line
            continue
        record = json.loads(line)
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
            raise InvalidParameterError(
                "file", f"{arguments.file}:{number}", "must have a text 'prompt' in each line"
            )
        yield record["prompt"]


def _write(output: RequestOutput, form: str) -> None:
    if form == "jsonl":
        print(json.dumps(dataclasses.asdict(output), ensure_ascii=False))
        return
    for candidate in output.outputs:
        print(f"{output.prompt}{candidate.text}")
        print(
            f"  -- score {candidate.score:.3f}, implicit reward {candidate.implicit_reward:.3f}, "
            f"log-prob {candidate.cumulative_logprob:.2f} (base {candidate.base_logprob:.2f}), "
            f"{candidate.finish_reason}, seed {output.seed}"
        )


def _info(_: argparse.Namespace) -> int:
    def version(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "not installed"

    built = ", sm_".join(_C.cuda_architectures.split())
    rows = {
        "ivg_fast": version("ivg_fast"),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "triton")},
        "CPU kernels": f"{_C.cpu_isa()}, {torch.get_num_threads()} threads",
        "CUDA kernels": f"built for sm_{built}, PTX" if built else "not built",
        "GPU": f"sampling and attention by triton, copies of blocks by {gpu_backend()}",
        "devices": ", ".join(
            ["cpu", *(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))]
        ),
    }
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
