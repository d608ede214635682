# SPDX-License-Identifier: Apache-2.0
"""Value models with a vocabulary head: a backbone and a bias-free map to the vocabulary."""

from __future__ import annotations

import json
import logging
import os
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModel
from transformers.utils.hub import cached_file

from ivg_fast.errors import InvalidParameterError
from ivg_fast.models.loading import checked_dtype, place

logger = logging.getLogger("ivg_fast")

HEAD_NAME = "score_head.weight"
_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"


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
    head = _read_tensor(name, HEAD_NAME)
    backbone, loading = AutoModel.from_pretrained(
        name,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    if loading["missing_keys"]:
        missing = ", ".join(sorted(loading["missing_keys"])[:3])
        raise InvalidParameterError(
            "value", name, f"must hold every backbone weight (no {missing})"
        )
    unused = sorted(set(loading["unexpected_keys"]) - {HEAD_NAME, "lm_head.weight"})
    if unused:
        logger.warning("%s holds weights that its backbone has no place for: %s", name, unused)
    if head.ndim != 2:
        raise InvalidParameterError("value", tuple(head.shape), f"must hold {HEAD_NAME} as [V, H]")
    score_head = torch.nn.Linear(head.shape[1], head.shape[0], bias=False, dtype=backbone.dtype)
    with torch.no_grad():
        score_head.weight.copy_(head)
    model = ValueHeadModel(backbone, score_head)
    place(model, name, device, dtype)
    return model


def _read_tensor(name: str, key: str) -> torch.Tensor:
    """One tensor of a safetensors checkpoint, single or sharded."""
    file = _find(name, _SINGLE_FILE)
    if file is None:
        index = _find(name, _INDEX_FILE)
        if index is None:
            raise InvalidParameterError(
                "value", name, f"must hold {_SINGLE_FILE} or {_INDEX_FILE}; pickles are not loaded"
            )
        with open(index, encoding="utf-8") as lines:
            shard = json.load(lines)["weight_map"].get(key)
        file = shard and _find(name, shard)
    if file is not None:
        with safe_open(file, framework="pt") as tensors:
            if key in tensors.keys():  # noqa: SIM118, not a mapping
                return tensors.get_tensor(key)
    raise InvalidParameterError("value", name, f"must hold {key}, the vocabulary value head")


def _find(name: str, file: str) -> str | None:
    try:
        return cached_file(name, file)
    except OSError:
        return None
