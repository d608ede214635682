# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of the architectures of the paper's instruction following, as folders."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_models import tiny_model, tiny_tokenizer
from transformers import PreTrainedTokenizerFast

CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}<assistant>"


def _tokenizer() -> PreTrainedTokenizerFast:
    """Characters, and the line breaks that the templates need."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["\n"])
    tokenizer.chat_template = CHAT
    return tokenizer


def _save(folder: Path, shape: str, seed: int) -> None:
    tokenizer = _tokenizer()
    model = tiny_model(shape, seed=seed, vocab_size=len(tokenizer), eos_token_id=96)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_paper(folder: Path, base_shape: str = "llama") -> dict[str, str]:
    """A base of `base_shape`, Llamas as guides, a Llama with a vocabulary head; by role."""
    shapes = {"base": base_shape, "tuned": "llama", "untuned": "llama"}
    for seed, (role, shape) in enumerate(shapes.items()):
        _save(folder / role, shape, seed)
    _save(folder / "value", "llama", 7)
    model = tiny_model("llama", seed=7, vocab_size=98, eos_token_id=96)
    tensors = {f"model.{name}": t.contiguous() for name, t in model.model.state_dict().items()}
    noise = torch.randn(98, 32, generator=torch.Generator().manual_seed(8))
    tensors["score_head.weight"] = noise
    save_file(tensors, folder / "value" / "model.safetensors", {"format": "pt"})
    return {role: str(folder / role) for role in (*shapes, "value")}


def save_recipe(folder: Path) -> Path:
    """What the recipe leaves behind: untuned, tuned, and a scalar head on tuned's trunk."""
    for seed, name in enumerate(("untuned", "tuned")):
        _save(folder / name, "llama", seed)
    from ivg_fast.training.value_model import value_model_from

    value = value_model_from(folder / "tuned", "scalar")
    value.shared.data.normal_(generator=torch.Generator().manual_seed(5))
    value.save(folder / "value", _tokenizer())
    return folder
