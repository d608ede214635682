# SPDX-License-Identifier: Apache-2.0
"""What a config tells: whether the model can be served, its windows, its last position."""

from __future__ import annotations

from typing import Any

import torch

from ivg_fast.errors import InvalidParameterError, UnsupportedModelError

_SERVED_LAYER_TYPES = {"full_attention", "sliding_attention"}


def check_config(config: Any) -> None:
    """Raises UnsupportedModelError for an architecture that the paged cache cannot hold."""
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"model type {config.model_type!r} is an encoder-decoder; only decoders can be served"
        )
    layer_types = getattr(config.get_text_config(), "layer_types", None) or ()
    unserved = sorted(set(layer_types) - _SERVED_LAYER_TYPES)
    if unserved:
        raise UnsupportedModelError(
            f"model type {config.model_type!r} has layers of type {', '.join(unserved)}; "
            "only full and sliding-window attention can be served"
        )


def layer_windows(config: Any, num_layers: int) -> list[int | None]:
    """The sliding window of each layer by the config: None where a layer sees everything."""
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None)
    layer_types = getattr(text, "layer_types", None)
    if window is None or not layer_types:
        return [window] * num_layers
    return [window if kind == "sliding_attention" else None for kind in layer_types]


def max_position(config: Any) -> int | None:
    """One past the last position that the model can take, or None where its config names no limit.

    A learned position table ends there. Rotary models do not fail past
    `max_position_embeddings`, but they were not made for it, and the "dynamic" kind would change
    its frequencies for every row of a batch: so their limit is as hard. The "longrope" kind changes
    frequencies past `original_max_position_embeddings`, for which reason it ends there already.
    """
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    for rope in _rope_parameters(text):
        original = rope.get("original_max_position_embeddings")
        if rope.get("rope_type") == "longrope":
            original = original or getattr(text, "original_max_position_embeddings", None)
            if original:
                limit = min(limit or original, original)
    return int(limit) if limit else None


def _rope_parameters(config: Any) -> list[dict[str, Any]]:
    parameters = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in parameters:
        return [parameters]
    return [per_type for per_type in parameters.values() if isinstance(per_type, dict)]


def eos_token_ids(model: Any) -> tuple[int, ...]:
    """The ids that end a text, by the generation config, else by the config; empty when unnamed."""
    for config in (getattr(model, "generation_config", None), model.config.get_text_config()):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return tuple(ids) if isinstance(ids, list | tuple) else (int(ids),)
    return ()


def check_on_cpu(model: torch.nn.Module, role: str) -> None:
    """Raises InvalidParameterError for a model with weights elsewhere."""
    for parameter in model.parameters():
        if parameter.device.type != "cpu":
            raise InvalidParameterError(role, str(parameter.device), "must be on the CPU")


def is_quantized(model: torch.nn.Module) -> bool:
    """Whether its layers may round their inputs by a scale that depends on the whole batch."""
    kinds = {type(module).__module__ for module in model.modules()}
    return bool(getattr(model, "is_quantized", False)) or any("quantized" in kind for kind in kinds)


def plain_network(model: torch.nn.Module, role: str) -> torch.nn.Module:
    """The transformers model that runs: of a PEFT model, the one that its adapters live in.

    Raises:
        UnsupportedModelError: an adapter that lives outside of the model (virtual tokens).
    """
    if not hasattr(model, "get_base_model"):
        return model
    adapter: Any = model
    if adapter.active_peft_config.is_prompt_learning:
        kind = adapter.active_peft_config.peft_type.value
        raise UnsupportedModelError(
            f"{role}: adapters of type {kind} put tokens before the prompt, which cannot be served"
        )
    return adapter.get_base_model()
