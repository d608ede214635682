# SPDX-License-Identifier: Apache-2.0
"""Tiny random models to start the summarization family from, and a tiny sentence encoder."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from ivg_fast.training.sft import new_gpt2
from ivg_fast.training.tokenizer import train_tokenizer

WORDS = [
    *("the", "film", "was", "great", "awful", "boring", "lovely", "plot", "actor", "scene"),
    *("and", "but", "very", "not", "so", "it", "is"),
]


def save_start(folder: Path) -> Path:
    """base and untuned, of one tokenizer."""
    tokenizer = train_tokenizer([" ".join(WORDS)] * 50 + ["TL;DR: A.B.C\n"], 300, 256)
    for seed, (name, hidden) in enumerate((("base", 64), ("untuned", 32))):
        new_gpt2(tokenizer, 1, hidden, 256, seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def save_encoder(folder: Path) -> Path:
    """A BERT with WordPiece, its letters and WORDS in the vocabulary."""
    letters = [chr(code) for code in range(33, 127)]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{c}" for c in letters), *WORDS]
    core = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", model_max_length=256
    ).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(pieces),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=256,
        )
    ).save_pretrained(folder)
    return folder
