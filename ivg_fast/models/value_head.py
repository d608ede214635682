# SPDX-License-Identifier: Apache-2.0
"""Value models: a backbone with a vocabulary head or a scalar head."""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.utils.hub import cached_file

from ivg_fast.errors import InvalidParameterError, UnsupportedModelError
from ivg_fast.models.attention import ATTENTION_NAME
from ivg_fast.models.loading import check_complete, checked_dtype, place
from ivg_fast.models.support import plain_network

HEAD_NAME = "score_head.weight"

# By PEFT's names of tasks.
_CLASSIFIERS: dict[Any, Any] = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
}


class ValueModel(torch.nn.Module):
    """An explicit value function: a backbone and a linear head; see its two kinds below.

    Attributes:
        backbone: a transformers decoder without a language-model head.
        score_head: the Linear that reads its hidden states.
    """

    backbone: Any
    score_head: torch.nn.Linear

    def __init__(self, backbone: torch.nn.Module, score_head: torch.nn.Linear) -> None:
        super().__init__()
        config: Any = backbone.config
        width = config.get_text_config().hidden_size
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
        """The head's outputs at every position of `input_ids` [B, T]: [B, T, V] or [B, T, 1]."""
        return self.score_head(self.backbone(input_ids, **kwargs).last_hidden_state)


class ValueHeadModel(ValueModel):
    """s(y | prefix) = w_y . h of the prefix's last token (arXiv 2409.17819, the released models).

    `score_head` is Linear(H, V) without a bias; row y of its weight is w_y.
    """

    def __init__(self, backbone: torch.nn.Module, score_head: torch.nn.Linear) -> None:
        if score_head.bias is not None:
            raise InvalidParameterError("score_head.bias", "a bias", "must be None")
        super().__init__(backbone, score_head)


class ScalarHeadModel(ValueModel):
    """V(prefix) = w . h + b of the prefix's last token: a reward model with one label.

    `score_head` is Linear(H, 1), with or without a bias.
    """

    def __init__(self, backbone: torch.nn.Module, score_head: torch.nn.Linear) -> None:
        if score_head.out_features != 1:
            raise InvalidParameterError(
                "score_head.out_features", score_head.out_features, "must be 1"
            )
        super().__init__(backbone, score_head)


def as_value_model(model: torch.nn.Module) -> ValueModel:
    """A value model in hand, or the scalar head of a sequence or token classification model, with a
    PEFT adapter too.

    Raises:
        InvalidParameterError: a classification model with another number of labels than one.
        UnsupportedModelError: anything else, or a classification model that is more than a linear
            head on a decoder's last hidden states.
    """
    if isinstance(model, ValueModel):
        return model
    model = plain_network(model, "value")
    kind = type(model).__name__
    if not is_classifier(kind):
        raise UnsupportedModelError(
            "value must be a ValueHeadModel, a ScalarHeadModel, or a sequence or token "
            f"classification model of transformers with one label, got {kind}"
        )
    network: Any = model
    check_one_label(network.config)
    head: Any = getattr(network, "score", getattr(network, "classifier", None))
    if hasattr(head, "modules_to_save"):  # PEFT keeps a trained head beside the first one
        (adapter,) = head.active_adapters
        head = head.modules_to_save[adapter]
    if not isinstance(head, torch.nn.Linear) or network.base_model is network:
        raise UnsupportedModelError(f"value: {kind} has no linear `score` or `classifier` head")
    scalar = ScalarHeadModel(network.base_model, head)
    _check_equal(network.eval(), scalar.eval())
    return scalar


def is_classifier(architecture: str) -> bool:
    """Whether the class name is that of a sequence or token classification model."""
    return architecture.endswith(("ForSequenceClassification", "ForTokenClassification"))


def check_one_label(config: Any) -> None:
    """InvalidParameterError unless the config has one label."""
    if config.num_labels != 1:
        raise InvalidParameterError(
            "num_labels", config.num_labels, "must be 1 for a model to be a value function"
        )


@torch.inference_mode()
def _check_equal(network: Any, scalar: ScalarHeadModel) -> None:
    """Refuses a classification model that does more than its head on the last hidden states."""
    pad = network.config.get_text_config().pad_token_id
    ids = torch.tensor([[i for i in range(6) if i != pad][:4]], device=network.device)
    is_served = network.config._attn_implementation == ATTENTION_NAME  # another engine has it
    if is_served:
        network.set_attn_implementation("eager")
    try:
        theirs = network(input_ids=ids, use_cache=False).logits.reshape(-1)[-1].float()
        ours = scalar(ids, use_cache=False)[0, -1, 0].float()
    finally:
        if is_served:
            network.set_attn_implementation(ATTENTION_NAME)
    if not torch.allclose(theirs, ours, rtol=1e-2, atol=1e-3):
        raise UnsupportedModelError(
            f"value: {type(network).__name__} is more than a linear head on its last hidden "
            f"states: it gives {float(theirs):.4g}, that head {float(ours):.4g}"
        )


def load_value_model(
    path: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = "auto",
) -> ValueModel:
    """Loads a value model from a folder (or a hub repository's name).

    The folder holds config.json and model.safetensors, or its shards with
    model.safetensors.index.json. With `score_head.weight` [V, H] among the weights it is a
    ValueHeadModel, whose backbone stands under the names that its causal language model uses
    (`transformer.*`, `model.*`). With a sequence or token classification model for its architecture
    it is a ScalarHeadModel; so is a folder of a PEFT adapter of one. Pickles are never opened.

    Args:
        path: the folder.
        device, dtype: as for `load_model`.

    Raises:
        InvalidParameterError: no safetensors there, neither kind of head, more than one label, or
            weights missing.
        UnsupportedModelError: as `as_value_model`.
    """
    name = os.fspath(path)
    dtype = checked_dtype(dtype)
    if _find(name, "adapter_config.json") is not None:
        model = _load_adapter(name, dtype)
        place(model, name, device, dtype)
        return model
    files = _weight_files(name)
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    if any(HEAD_NAME in _names(file) for file in files):
        model = _load_vocabulary_head(name, files, config, dtype)
    else:
        model = _load_scalar_head(name, config, dtype)
    place(model, name, device, dtype)
    return model


def _load_vocabulary_head(
    name: str, files: list[str], config: Any, dtype: torch.dtype | str
) -> ValueHeadModel:
    state: dict[str, torch.Tensor] = {}
    for file in files:
        state.update(load_file(file))
    head = state.pop(HEAD_NAME)
    if head.ndim != 2:
        raise InvalidParameterError("value", name, f"must hold {HEAD_NAME} of shape [V, H]")
    state.pop("lm_head.weight", None)
    backbone, loading = MODEL_MAPPING[type(config)].from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    check_complete("value", name, loading)
    score_head = torch.nn.Linear(head.shape[1], head.shape[0], bias=False, dtype=backbone.dtype)
    with torch.no_grad():
        score_head.weight.copy_(head)
    return ValueHeadModel(backbone, score_head)


def _load_scalar_head(name: str, config: Any, dtype: torch.dtype | str) -> ScalarHeadModel:
    architecture = next(iter(config.architectures or ()), "")
    if not is_classifier(architecture):
        raise InvalidParameterError(
            "value",
            name,
            f"must hold {HEAD_NAME} of shape [V, H], or be a sequence or token classification "
            "model with one label",
        )
    check_one_label(config)
    is_sequence = architecture.endswith("ForSequenceClassification")
    loader = AutoModelForSequenceClassification if is_sequence else AutoModelForTokenClassification
    try:
        network, loading = loader.from_pretrained(
            name,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except ValueError as error:
        raise UnsupportedModelError(f"value: {architecture} cannot be loaded: {error}") from error
    check_complete("value", name, loading)
    model = as_value_model(network)
    assert isinstance(model, ScalarHeadModel)
    return model


def _load_adapter(name: str, dtype: torch.dtype | str) -> ValueModel:
    """A classification model with one label and its PEFT adapter."""
    import peft

    adapter = peft.PeftConfig.from_pretrained(name)
    auto = _CLASSIFIERS.get(adapter.task_type)
    if auto is None:
        raise InvalidParameterError(
            "value",
            name,
            f"must be an adapter of task type {' or '.join(_CLASSIFIERS)}, not {adapter.task_type}",
        )
    network = auto.from_pretrained(
        adapter.base_model_name_or_path,
        num_labels=1,  # the head itself is the adapter's
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
    )
    return as_value_model(peft.PeftModel.from_pretrained(network, name))


def _names(file: str) -> set[str]:
    with safe_open(file, framework="pt") as tensors:
        return set(tensors.keys())


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
