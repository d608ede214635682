# SPDX-License-Identifier: Apache-2.0
"""Value models with a vocabulary head: a backbone and a bias-free map to the vocabulary."""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import MODEL_MAPPING, AutoConfig
from transformers.utils.hub import cached_file

from ivg_fast.errors import InvalidParameterError
from ivg_fast.models.loading import check_complete, checked_dtype, place

HEAD_NAME = "score_head.weight"


class ValueHeadModel(torch.nn.Module):
    """s(y | prefix) = w_y . h of the prefix's last token (arXiv 2409.17819, the released models).

    Attributes:
        backbone: a transformers decoder without a language-model head.
        score_head: Linear(H, V) without a bias; row y of its weight is w_y.
    """

    backbone: Any
    score_head: torch.nn.Linear

    def __init__(self, backbone: torch.nn.Module, score_head: torch.nn.Linear) -> None:
        super().__init__()
        config: Any = backbone.config
        width = config.get_text_config().hidden_size
        if score_head.bias is not None:
            raise InvalidParameterError("score_head.bias", "a bias", "must be None")
        if score_head.in_features != width:
            raise InvalidParameterError(
                "score_head.in_features",
                score_head.in_features,
                f"must be the backbone's hidden size {width}",
            )
        self.backbone = backbone
        self.score_head = score_head

    @property
    def config(self) -> Any:
        return self.backbone.config

    @property
    def dtype(self) -> torch.dtype:
        return self.backbone.dtype

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Token values s(. | prefix) [B, T, V] of each prefix of `input_ids` [B, T]."""
        return self.score_head(self.backbone(input_ids, **kwargs).last_hidden_state)


def load_value_model(
    path: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = "auto",
) -> ValueHeadModel:
    """Loads a vocabulary-head value model from a folder (or a hub repository's name).

    The folder holds the backbone's config.json and model.safetensors, or its shards with
    model.safetensors.index.json: the backbone under the names that its causal language model uses
    (`transformer.*`, `model.*`), and `score_head.weight` [V, H]. Pickles are never opened.

    Args:
        path: the folder.
        device, dtype: as for `load_model`.

    Raises:
        InvalidParameterError: no safetensors there, no score head, or weights missing.
    """
    name = os.fspath(path)
    dtype = checked_dtype(dtype)
    state: dict[str, torch.Tensor] = {}
    for file in _weight_files(name):
        state.update(load_file(file))
    head = state.pop(HEAD_NAME, None)
    if head is None or head.ndim != 2:
        raise InvalidParameterError("value", name, f"must hold {HEAD_NAME} of shape [V, H]")
    state.pop("lm_head.weight", None)
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    backbone, loading = MODEL_MAPPING[type(config)].from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    check_complete("value", name, loading)
    score_head = torch.nn.Linear(head.shape[1], head.shape[0], bias=False, dtype=backbone.dtype)
    with torch.no_grad():
        score_head.weight.copy_(head)
    model = ValueHeadModel(backbone, score_head)
    place(model, name, device, dtype)
    return model


def _weight_files(name: str) -> list[str]:
    """The safetensors files of a checkpoint, single or sharded."""
    single = _find(name, "model.safetensors")
    if single is not None:
        return [single]
    index = _find(name, "model.safetensors.index.json")
    if index is None:
        raise InvalidParameterError(
            "value", name, "must hold model.safetensors or its shards; pickles are not loaded"
        )
    with open(index, encoding="utf-8") as lines:
        shards = sorted(set(json.load(lines)["weight_map"].values()))
    files = [(shard, _find(name, shard)) for shard in shards]
    for shard, file in files:
        if file is None:
            raise InvalidParameterError("value", name, f"must hold the shard {shard}")
    return [file for _, file in files if file is not None]


def _find(name: str, file: str) -> str | None:
    try:
        return cached_file(name, file)
    except OSError:
        return None
