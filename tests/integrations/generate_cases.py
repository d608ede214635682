# SPDX-License-Identifier: Apache-2.0
"""Tiny families and padded batches for the tests of the transformers integration."""

from __future__ import annotations

import functools
from typing import Any

import torch
from engine_cases import value_model
from tiny_models import tiny_model, tiny_tokenizer

VOCAB = 97
EOS = 28
SHAPES = {
    "gpt2": ("gpt2", "llama"),
    "llama": ("llama", "gpt2"),
    "opt": ("opt", "mistral"),
    "mistral": ("mistral", "opt"),  # a window shorter than prompt and response
}


@functools.cache
def family(shape: str, seed: int) -> dict[str, Any]:
    """base, tuned, untuned and a vocabulary head as value; their guides of another shape."""
    base, pair = SHAPES[shape]
    models = {
        role: tiny_model(kind, seed=seed + i, vocab_size=VOCAB, eos_token_id=EOS)
        for i, (role, kind) in enumerate((("base", base), ("tuned", pair), ("untuned", pair)))
    }
    models["value"] = value_model("gpt2", vocab_size=VOCAB, seed=seed + 3)
    for role in ("base", "tuned", "untuned"):
        models[role].generation_config.eos_token_id = EOS
        models[role].generation_config.pad_token_id = 0
    return models


def guides(models: dict[str, Any], *roles: str) -> dict[str, Any]:
    return {role: models[role] for role in roles or ("tuned", "untuned")}


def prompts_of(seed: int, lengths: tuple[int, ...]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(30, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def padded(prompts: list[list[int]], pad: int = 0) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, padded on the left."""
    width = max(map(len, prompts))
    ids = [[pad] * (width - len(p)) + p for p in prompts]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def expected(
    inputs: dict[str, torch.Tensor], responses: list[list[int]], pad: int = 0
) -> torch.Tensor:
    """What generate returns for these responses."""
    per = len(responses) // len(inputs["input_ids"])
    width = max(map(len, responses))
    tail = torch.tensor([r + [pad] * (width - len(r)) for r in responses])
    return torch.cat([inputs["input_ids"].repeat_interleave(per, 0), tail], 1)


tokenizer = functools.cache(tiny_tokenizer)
