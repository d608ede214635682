# SPDX-License-Identifier: Apache-2.0
"""Whether checkpoints are there, asked of all of them before the first one is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
)
from transformers.utils.hub import cached_file

from ivg_fast.errors import InvalidParameterError
from ivg_fast.models.loading import PLACE_KWARGS, kwargs_of

_CONFIGS = ("config.json", "adapter_config.json")


def check_pair(tuned: Any, untuned: Any) -> None:
    """InvalidParameterError where only one of the pair is given."""
    if (tuned is None) != (untuned is None):
        missing = "tuned" if tuned is None else "untuned"
        raise InvalidParameterError(
            missing, None, "must be given too: the implicit value is a pair"
        )


def check_checkpoints(
    paths: Mapping[str, str | os.PathLike[str] | None],
    model_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Looks for the configuration of every checkpoint; reads no weights.

    Args:
        paths: a folder or a hub repository's name by role; None: that role has none.
        model_kwargs: as of Engine.from_pretrained; a subfolder or revision counts.

    Raises:
        InvalidParameterError: names the role and the path: half a pair, no folder of a model, or
            nothing that a hub or its cache has.
    """
    check_pair(paths.get("tuned"), paths.get("untuned"))
    for role, path in paths.items():
        if path is not None:
            if not isinstance(path, str | os.PathLike):
                requirement = "must be a folder or hub name; the constructor takes what is loaded"
                raise InvalidParameterError(role, path, requirement)
            own = kwargs_of(role, model_kwargs)
            _check(role, os.fspath(path), {k: v for k, v in own.items() if k in PLACE_KWARGS})


def _check(role: str, name: str, places: Mapping[str, Any]) -> None:
    if os.path.isdir(name):
        folder = os.path.join(name, places.get("subfolder") or "")
        if not any(os.path.isfile(os.path.join(folder, config)) for config in _CONFIGS):
            raise InvalidParameterError(role, name, f"must be a model: no {_CONFIGS[0]} in it")
        return
    if os.path.exists(name) or _is_path(name):
        raise InvalidParameterError(role, name, "must be a folder: there is none")
    if any(_is_cached(name, config, places) for config in _CONFIGS):
        return
    for config in _CONFIGS:
        try:
            if cached_file(name, config, **places) is not None:
                return
        except (OSError, ValueError) as error:
            cause = error.__cause__
            is_missing = isinstance(cause, EntryNotFoundError)
            if not is_missing or isinstance(cause, LocalEntryNotFoundError):
                break  # not this file is missing: the repository is, or the way to it
    raise InvalidParameterError(
        role, name, "must be a folder or the name of a repository that can be had; it is neither"
    )


def _is_cached(name: str, config: str, places: Mapping[str, Any]) -> bool:
    file = "/".join(part for part in (places.get("subfolder"), config) if part)
    where = {key: places[key] for key in ("cache_dir", "revision") if places.get(key) is not None}
    try:
        return isinstance(try_to_load_from_cache(name, file, **where), str)
    except HFValidationError:
        return False


def _is_path(name: str) -> bool:
    """Whether it cannot be a repository's name, which is `name` or `owner/name`."""
    parts = name.split("/")
    return os.path.isabs(name) or len(parts) > 2 or not all(part.strip(".~") for part in parts)
