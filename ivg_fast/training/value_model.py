# SPDX-License-Identifier: Apache-2.0
"""Prefix value models: a backbone with a vocabulary head or a scalar head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import load_file, save_file

from ivg_fast.errors import InvalidParameterError
from ivg_fast.training import common

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Head = Literal["vocabulary", "scalar"]
HEADS = ("vocabulary", "scalar")
# The vocabulary head's name is that of the paper's released models, the scalar head's that of
# transformers' sequence classification.
_HEAD_NAMES = {"vocabulary": "score_head.weight", "scalar": "score.weight"}


class PrefixValueModel(torch.nn.Module):
    """V(x, y<=t) for every t of a text, from a causal backbone and a head without bias.

    Vocabulary head: V = w_{y_t} . h_{t-1}. Scalar head: V = w . h_t. The vocabulary head is
    trained as w_y = shared + delta_y, so that rare tokens inherit what is common to all;
    `head_weight()` is the sum, and only the sum is saved.
    """

    def __init__(self, backbone: PreTrainedModel, head: Head) -> None:
        super().__init__()
        if head not in HEADS:
            raise InvalidParameterError("head", head, f"must be one of {HEADS}")
        self.backbone = backbone
        self.head: Head = head
        hidden = backbone.config.hidden_size
        self.shared = torch.nn.Parameter(torch.zeros(1, hidden))
        if head == "vocabulary":
            size = backbone.get_input_embeddings().weight.shape[0]
            self.delta = torch.nn.Parameter(torch.zeros(size, hidden))

    def head_weight(self) -> torch.Tensor:
        """Weight of the head: [vocab_size, hidden_size], or [1, hidden_size] if scalar."""
        return self.shared + self.delta if self.head == "vocabulary" else self.shared

    def values(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """V of every prefix that ends at positions 1 .. T-1: float[B, T-1] for ids int[B, T].

        Pad on the right; values at padding are meaningless.
        """
        return self.values_of(self.hidden_states(input_ids, attention_mask), input_ids)

    def hidden_states(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The trunk's last hidden states, float[B, T, hidden_size]."""
        return self.backbone(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state

    def values_of(self, hidden: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """`values` of hidden states that are there already."""
        if self.head == "scalar":
            return (hidden[:, 1:] @ self.shared[0]).float()
        weights = torch.nn.functional.embedding(input_ids[:, 1:], self.head_weight())
        return (weights * hidden[:, :-1]).float().sum(-1)

    def save(
        self, folder: str | Path, tokenizer: PreTrainedTokenizerBase, dtype: str = "float32"
    ) -> None:
        """Write config.json, model.safetensors and the tokenizer.

        Keys are the backbone's as in its language model (such as `transformer.*`) plus the
        head's: `score_head.weight` (vocabulary) or `score.weight` (scalar, one label: the folder
        is then one of transformers' sequence-classification models). `config.json` says
        `"value_head": "vocabulary"` or `"scalar"`.
        """
        kind = getattr(torch, dtype)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        prefix = self.backbone.base_model_prefix
        tensors = {f"{prefix}.{k}": v for k, v in self.backbone.state_dict().items()}
        tensors[_HEAD_NAMES[self.head]] = self.head_weight().detach()
        tensors = {k: v.to(kind).contiguous().clone() for k, v in tensors.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config: dict[str, Any] = self.backbone.config.to_diff_dict()
        config |= {"value_head": self.head, "dtype": dtype, "use_cache": True}
        family = type(self.backbone).__name__.removesuffix("Model")
        if self.head == "scalar":
            config |= {
                "architectures": [f"{family}ForSequenceClassification"],
                "id2label": {"0": "LABEL_0"},
                "label2id": {"LABEL_0": 0},
            }
        else:
            config["architectures"] = ["PrefixValueModel"]
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")
        tokenizer.save_pretrained(folder)

    @classmethod
    def load(cls, folder: str | Path) -> PrefixValueModel:
        """Read what `save` wrote, in float32."""
        from transformers import AutoConfig, AutoModel

        folder = Path(folder)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        head = getattr(config, "value_head", None)
        if head not in HEADS:
            raise InvalidParameterError("value_head", head, f"of {folder} must be one of {HEADS}")
        config.dtype = torch.float32
        model = cls(AutoModel.from_config(config), head)
        tensors = load_file(folder / "model.safetensors")
        weight = tensors.pop(_HEAD_NAMES[head]).float()
        prefix = model.backbone.base_model_prefix + "."
        model.backbone.load_state_dict(
            {k.removeprefix(prefix): v.float() for k, v in tensors.items()}
        )
        (model.delta if head == "vocabulary" else model.shared).data.copy_(weight)
        return model.eval()


def value_model_from(path: str | Path, head: Head) -> PrefixValueModel:
    """A new value model whose backbone is that of the causal language model at `path`."""
    return PrefixValueModel(common.load_model(path).base_model, head)
