# SPDX-License-Identifier: Apache-2.0
"""Options that commands share, and those that are made from the fields of a dataclass."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import json
import os
import re
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from ivg_fast.errors import InvalidParameterError
from ivg_fast.models.checkpoints import check_checkpoints
from ivg_fast.request import GUIDES, ROLES
from ivg_fast.templates import TEMPLATES, Template

_MODEL_HELP = {
    "base": "the model that is steered",
    "tuned": "small tuned model of the implicit value function",
    "untuned": "its untuned partner",
    "value": "explicit value function: a vocabulary head (score_head.weight) or a reward model "
    "with one label, of the base's vocabulary or another",
}


def add_models(parser: argparse.ArgumentParser, base_help: str | None = None) -> None:
    """--base, --tuned, --untuned, --value, --dtype, --model-kwargs, --template; --device
    too, save for a command with a help of its own for --base, which runs on the CPU."""
    group = parser.add_argument_group("models (folders or hub names, safetensors only)")
    for role in ROLES:
        text = base_help if role == "base" and base_help else _MODEL_HELP[role]
        group.add_argument(f"--{role}", metavar="MODEL", help=text)
    if base_help is None:
        group.add_argument("--device", default="cpu", help="cpu or cuda, of all (default cpu)")
    group.add_argument(
        "--dtype",
        default="auto",
        help="auto, float32, bfloat16 or float16 (default auto: the checkpoint's)",
    )
    group.add_argument(
        "--model-kwargs",
        type=_json_object,
        metavar="JSON",
        help="more arguments for loading the language models, as an object; under base, tuned or "
        'untuned those of one role: \'{"tuned": {"revision": "v2"}}\'',
    )
    group.add_argument(
        "--template",
        action="append",
        default=[],
        metavar="[ROLE=]TEMPLATE",
        help="how a role, or every role, writes a prompt: a text with {raw} in it (\\n is a line "
        "end), or one of " + ", ".join(TEMPLATES),
    )


def templates_of(arguments: argparse.Namespace) -> dict[str, str | Template]:
    """The templates by role that --template asks for; a later one wins."""
    templates: dict[str, str | Template] = {}
    for text in arguments.template:
        role, equals, rest = text.partition("=")
        roles, given = ((role,), rest) if equals and role in ROLES else (ROLES, text)
        if "{raw}" in given:
            template: str | Template = Template(given.replace("\\n", "\n"))
        elif given in TEMPLATES:
            template = given
        else:
            raise InvalidParameterError(
                "template", text, f"must have {{raw}} in it or be one of {sorted(TEMPLATES)}"
            )
        templates.update(dict.fromkeys(roles, template))
    return templates


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"must be JSON ({error})") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text}")
    return value


def check_models(
    models: Mapping[str, str | None],
    kinds: Sequence[tuple[str, Any]],
    model_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """What can be known before anything is loaded: that every model is there, and those that
    `kinds` need, pairs of a parameter's name and "implicit", "explicit" or anything else.

    Raises:
        InvalidParameterError: names the parameter and the value.
    """
    for name, kind in kinds:
        needed = () if callable(kind) else GUIDES.get(kind, ())
        missing = [role for role in needed if models.get(role) is None]
        if missing:
            options = " and ".join(f"--{role}" for role in missing)
            raise InvalidParameterError(name, kind, f"needs {' and '.join(missing)} ({options})")
    check_checkpoints(models, model_kwargs)


def scorer_of(name: str) -> Any:
    """A kind of scorer by its name, or the callable that "module:function" names; modules of the
    working directory count.

    Raises:
        InvalidParameterError: there is no such callable.
    """
    if name in GUIDES:
        return name
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        scorer = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InvalidParameterError(
            "scorer", name, f"must be one of {sorted(GUIDES)} or a module:function ({error})"
        ) from error
    if not callable(scorer):
        raise InvalidParameterError("scorer", name, "must name a callable")
    return scorer


def add_fields(group: Any, cls: type) -> None:
    """One option a field of a dataclass; absent options stay out of the namespace."""
    hints = typing.get_type_hints(cls)
    documented = _attribute_docs(cls)
    for field in dataclasses.fields(cls):
        kinds = set(typing.get_args(hints[field.name])) or {hints[field.name]}
        option = "--" + field.name.replace("_", "-")
        keywords: dict[str, Any] = {"default": argparse.SUPPRESS, "dest": field.name}
        keywords["help"] = documented[field.name].replace("%", "%%")
        if field.default not in (None, (), False, dataclasses.MISSING):
            keywords["help"] += f" (default {field.default})"
        if bool in kinds:
            group.add_argument(option, action=argparse.BooleanOptionalAction, **keywords)
        elif field.name in ("stop", "stop_token_ids"):
            kind = int if field.name == "stop_token_ids" else str
            keywords["help"] += "; may be repeated"
            if kind is str:
                keywords["help"] += "; taken as it stands: a line end is $'\\n' in bash"
            group.add_argument(option, action="append", type=kind, **keywords)
        elif field.name == "guidance":
            group.add_argument(option, choices=tuple(GUIDES), **keywords)
        elif field.name == "scorer":
            keywords["help"] += "; here: the callable's module:function"
            group.add_argument(option, **keywords)
        else:
            (kind,) = kinds - {types.NoneType}
            group.add_argument(option, type=kind, **keywords)


def fields_of(arguments: argparse.Namespace, cls: type) -> dict[str, Any]:
    """The options that were given for the fields of a dataclass."""
    names = {field.name for field in dataclasses.fields(cls)}
    return {name: value for name, value in vars(arguments).items() if name in names}


def _attribute_docs(cls: type) -> dict[str, str]:
    """The Attributes section of a docstring, an entry a field."""
    section = inspect.cleandoc(cls.__doc__ or "").split("Attributes:\n", 1)[1].split("\n\n")[0]
    entries = re.split(r"^ {4}(\w+): ", section, flags=re.MULTILINE)[1:]
    texts = (" ".join(text.split()).rstrip(".") for text in entries[1::2])
    return dict(zip(entries[::2], texts, strict=True))
