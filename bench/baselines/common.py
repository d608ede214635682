# SPDX-License-Identifier: Apache-2.0
"""What both baselines share: the request check, the result, private views of the models."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ivg_fast.params import SearchParams

_DEFAULTS = {
    "min_tokens": 0,
    "stop": (),
    "n": 1,
    "logprobs": False,
    "deadline_s": None,
    "score_eos_on_truncation": False,
    "dedup_finished": False,
}


class ValueModel(NamedTuple):
    """An explicit prefix value with a vocabulary head: V(x, y<=t) = w_{y_t} . h_{t-1}.

    Attributes:
        backbone: a HF decoder without a head; its output has `last_hidden_state` [B, S, H].
        head_weight: [V, H].
    """

    backbone: nn.Module
    head_weight: Tensor


@dataclass(frozen=True, slots=True)
class BaselineResult:
    """The best response to a prompt.

    Attributes:
        token_ids: all sampled tokens, an end of text included.
        score: by the scorer, of the whole response; 0.0 with scorer "none".
    """

    token_ids: list[int]
    score: float


def check_request(
    prompt_ids: Sequence[Sequence[int]], params: SearchParams, *, has_pair: bool, has_value: bool
) -> None:
    """Raises ValueError for a request that a baseline would not compute as the engine does."""
    if not prompt_ids or not all(prompt_ids):
        raise ValueError("prompt_ids must hold at least one prompt, and none of them empty")
    for name, default in _DEFAULTS.items():
        if getattr(params, name) != default:
            raise ValueError(f"{name} is not part of the baselines, got {getattr(params, name)!r}")
    for name in ("guidance", "scorer"):
        kind = getattr(params, name)
        if callable(kind):
            raise ValueError(f"{name} must be none, implicit or explicit, got {kind!r}")
        if kind == "implicit" and not has_pair:
            raise ValueError(f"{name}='implicit' needs the tuned and untuned models")
        if kind == "explicit" and not has_value:
            raise ValueError(f"{name}='explicit' needs a value model")


def stop_ids(eos_token_ids: Sequence[int], params: SearchParams) -> list[int]:
    """The ids that end a response."""
    eos = () if params.ignore_eos else eos_token_ids
    return sorted({*eos, *params.stop_token_ids})


def chunk_length(params: SearchParams) -> int:
    """Tokens between two selections; all of them where there is nothing to select."""
    if params.chunk_length is None or params.pool_size == 1:
        return params.max_tokens
    return params.chunk_length


def private_view(
    model: nn.Module, attention: str, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """A copy of a HF model that shares its weights, so that its settings can be changed.

    Weights are copied only where device or dtype differ. Asks for attention implementation
    `attention` and eval mode.
    """
    weights = (*model.parameters(), *model.buffers())
    view = copy.deepcopy(model, {id(weight): weight for weight in weights})
    view.set_attn_implementation(attention)
    if any(w.device != device or w.dtype != dtype for w in model.parameters()):
        view = copy.deepcopy(view).to(device=device, dtype=dtype)
    return view.eval()


def check_length(model: nn.Module, length: int) -> None:
    """Raises ValueError where `length` positions do not fit the model, or exceed its window."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise ValueError(f"{length} positions needed, {type(model).__name__} has {limit}")
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if kinds is not None and "sliding_attention" not in kinds:
        window = None
    if window is not None and getattr(config, "use_sliding_window", True) and length > window:
        raise ValueError(f"{length} positions exceed the sliding window of {window}")
