# SPDX-License-Identifier: Apache-2.0
"""Options of the commands that search: a named method or a preset, and what overrides it."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from ivg_fast.cli.options import add_fields, fields_of, scorer_of, templates_of
from ivg_fast.errors import InvalidParameterError
from ivg_fast.params import SearchParams
from ivg_fast.request import ROLES
from ivg_fast.templates import PRESET_NAMES, Preset, Template, preset

_METHODS: dict[str, Callable[..., SearchParams]] = {
    "base": SearchParams.base,
    "eft": SearchParams.eft,
    "cbs": SearchParams.cbs,
    "ivg": SearchParams.ivg,
    "best_of_n": partial(SearchParams.best_of_n, 16),
}


@dataclass(frozen=True, slots=True)
class Search:
    """What the options ask for.

    Attributes:
        models: by role, None where there is none.
        templates: by role.
        params: how to decode.
        settings: the preset that the rest comes from, if any.
    """

    models: dict[str, Any]
    templates: Mapping[str, str | Template]
    params: SearchParams
    settings: Preset | None


def add_search(parser: argparse.ArgumentParser, title: str) -> None:
    """--method or --preset, and an option for each field of SearchParams."""
    group = parser.add_argument_group(title)
    named = group.add_mutually_exclusive_group()
    named.add_argument("--method", choices=_METHODS, help="a named method (default base)")
    named.add_argument(
        "--preset",
        choices=PRESET_NAMES,
        help="an experiment of the paper: its models, templates, search and length; --base, "
        "--tuned, --untuned, --value and --template override its own",
    )
    add_fields(group, SearchParams)


def search_of(arguments: argparse.Namespace, *, max_tokens: int | None = None) -> Search:
    """What was asked for, by --method or --preset and the options that override it.

    Args:
        max_tokens: where neither says so; None: one of them must.

    Raises:
        InvalidParameterError: names the parameter and the value.
    """
    settings = None if arguments.preset is None else _preset(arguments)
    models: dict[str, Any] = {role: getattr(arguments, role) for role in ROLES}
    templates = templates_of(arguments)
    if settings is not None:
        models = {role: models[role] or settings.models.get(role) for role in ROLES}
        templates = {**settings.templates, **templates}
    if models["base"] is None:
        raise InvalidParameterError("base", None, "must be given: --base or --preset")
    return Search(models, templates, _params(arguments, settings, max_tokens), settings)


def _preset(arguments: argparse.Namespace) -> Preset:
    try:
        return preset(arguments.preset, base=arguments.base)
    except InvalidParameterError:  # a folder, or a model of the user's
        return preset(arguments.preset)


def _params(
    arguments: argparse.Namespace, settings: Preset | None, max_tokens: int | None
) -> SearchParams:
    options = fields_of(arguments, SearchParams)
    if "scorer" in options:
        options["scorer"] = scorer_of(options["scorer"])
    if settings is not None:
        return dataclasses.replace(settings.params, **options)
    most = options.get("max_tokens", max_tokens)
    if most is None:
        raise InvalidParameterError("max_tokens", None, "must be given: --max-tokens or --preset")
    method = _METHODS[arguments.method or "base"](max_tokens=most)
    return dataclasses.replace(method, **options)
