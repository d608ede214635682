# SPDX-License-Identifier: Apache-2.0
"""The models of an engine and their tokenizers, from checkpoints."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from ivg_fast.errors import InvalidParameterError
from ivg_fast.models.checkpoints import check_checkpoints
from ivg_fast.models.loading import kwargs_of, load_model, load_tokenizer
from ivg_fast.models.text_value import load_value
from ivg_fast.models.vocabulary import load_guide_tokenizer


def load_roles(
    paths: Mapping[str, str | os.PathLike[str] | None],
    *,
    device: torch.device | str | None,
    dtype: torch.dtype | str,
    model_kwargs: Mapping[str, Any] | None,
    can_differ: bool,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Models by role, None where there is no path; tokenizers of the base and of those that have
    their own.

    Args:
        paths: by role, "base" first; whether all are there is checked before the first is loaded.
        device, dtype, model_kwargs: as of Engine.from_pretrained.
        can_differ: whether the pair may have another vocabulary than the base.

    Raises:
        As Engine.from_pretrained.
    """
    base_path = paths["base"]
    if base_path is None:
        raise InvalidParameterError("base", None, "must be a folder or hub name")
    check_checkpoints(paths, model_kwargs)
    base = load_tokenizer(base_path, kwargs_of("base", model_kwargs))
    models: dict[str, Any] = dict.fromkeys(paths)
    tokenizers = {"base": base}
    for role, path in paths.items():
        if path is None:
            continue
        if role == "value":
            models[role], own = load_value(path, base, device=device, dtype=dtype)
        else:
            options = kwargs_of(role, model_kwargs)
            models[role] = load_model(path, device=device, dtype=dtype, model_kwargs=options)
            if role == "base":
                continue
            own = (
                load_tokenizer(path, options)
                if can_differ
                else load_guide_tokenizer(base, path, role, options)
            )
        if own is not None:
            tokenizers[role] = own
    return models, tokenizers
