# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of the architectures of the paper's sentiment experiment, as folders.

GPT-2s with a byte-level BPE, a vocabulary-head value model, a DistilBERT classifier with WordPiece.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_models import redraw_weights, tiny_model
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedTokenizerFast,
)

from ivg_fast.training.data import test_prompts
from ivg_fast.training.tokenizer import train_tokenizer

VOCAB_SIZE = 300


def save_standins(folder: Path, num_positions: int = 256) -> dict[str, str]:
    """Writes base, tuned, untuned, value and gold; returns their folders by name."""
    tokenizer = train_tokenizer(test_prompts(100), VOCAB_SIZE, num_positions)
    folders = {name: folder / name for name in ("base", "tuned", "untuned", "value", "gold")}
    shape = {"vocab_size": VOCAB_SIZE, "n_layer": 1, "eos_token_id": 0, "bos_token_id": 0}
    shape["n_positions"] = num_positions
    for seed, role in enumerate(("base", "tuned", "untuned")):
        model = tiny_model("gpt2", seed=seed, **shape)
        model.save_pretrained(folders[role])
        tokenizer.save_pretrained(folders[role])
    backbone = tiny_model("gpt2", seed=7, **shape)
    tensors = {f"transformer.{name}": t for name, t in backbone.transformer.state_dict().items()}
    tensors["score_head.weight"] = torch.randn(
        VOCAB_SIZE, 32, generator=torch.Generator().manual_seed(8)
    )
    backbone.config.save_pretrained(folders["value"])
    save_file(tensors, folders["value"] / "model.safetensors", {"format": "pt"})
    tokenizer.save_pretrained(folders["value"])
    save_classifier(folders["gold"])
    return {name: str(path) for name, path in folders.items()}


def save_classifier(folder: Path, num_labels: int = 2) -> None:
    """A DistilBERT with its tokenizer: negative and positive, or a reward model of one label."""
    letters = [chr(code) for code in range(33, 127)]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    pieces += ["good", "bad", "film", "##ing", "the"]
    core = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", model_max_length=128
    )
    config = DistilBertConfig(
        vocab_size=len(pieces),
        dim=32,
        hidden_dim=48,
        n_layers=2,
        n_heads=4,
        max_position_embeddings=128,
        num_labels=num_labels,
        id2label={0: "NEGATIVE", 1: "POSITIVE"} if num_labels == 2 else {0: "LABEL_0"},
    )
    model = DistilBertForSequenceClassification(config)
    redraw_weights(model, 3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
