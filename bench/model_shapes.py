# SPDX-License-Identifier: Apache-2.0
"""Models of well-known shapes with random weights, made on a device: no download, no host copy.

What a step costs depends on shapes, not on what a model has learned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

_LLAMA = {"tie_word_embeddings": False, "hidden_act": "silu", "attention_bias": False}


def _rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


# name -> (config class, its fields)
_SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-2-7b": (
        "LlamaConfig",
        {
            **_LLAMA,
            "vocab_size": 32_000,
            "hidden_size": 4096,
            "intermediate_size": 11_008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 4096,
            "rope_parameters": _rope(10_000.0),
        },
    ),
    "llama-3-8b": (
        "LlamaConfig",
        {
            **_LLAMA,
            "vocab_size": 128_256,
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
            "rope_parameters": _rope(500_000.0),
        },
    ),
    # Without the stretched rope of the released model: it has no part in the shapes.
    "llama-3.2-1b": (
        "LlamaConfig",
        {
            **_LLAMA,
            "tie_word_embeddings": True,
            "vocab_size": 128_256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
            "rope_parameters": _rope(500_000.0),
        },
    ),
    "gpt2-large": ("GPT2Config", {"n_embd": 1280, "n_layer": 36, "n_head": 20}),
    "gpt2": ("GPT2Config", {"n_embd": 768, "n_layer": 12, "n_head": 12}),
    # For the tests of whatever uses the others.
    "tiny-llama": (
        "LlamaConfig",
        {
            **_LLAMA,
            "vocab_size": 97,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "rope_parameters": _rope(10_000.0),
        },
    ),
    "tiny-gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 97}),
}


@dataclass(frozen=True, slots=True)
class Family:
    """A base with two guides of one shape; the explicit value is a head on the tuned guide's trunk.

    Attributes:
        base, guide: names of shapes.
        chunk_length: L of its searches, the paper's for models of this kind or near it.
    """

    base: str
    guide: str
    chunk_length: int

    @property
    def roles(self) -> dict[str, str]:
        return {"base": self.base, "tuned": self.guide, "untuned": self.guide}


FAMILIES = {
    "llama2": Family("llama-2-7b", "llama-2-7b", 16),
    "llama3": Family("llama-3-8b", "llama-3.2-1b", 16),
    "gpt2": Family("gpt2-large", "gpt2", 5),
    "tiny-llama": Family("tiny-llama", "tiny-llama", 4),
    "tiny-gpt2": Family("tiny-gpt2", "tiny-gpt2", 3),
}
SHAPES = tuple(_SHAPES)


def config_of(shape: str) -> PretrainedConfig:
    name, fields = _SHAPES[shape]
    return getattr(transformers, name)(**fields, bos_token_id=1, eos_token_id=2, pad_token_id=None)


def build(shape: str, device: str, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """A causal language model of this shape in eval mode, its weights drawn on `device`.

    Args:
        device: "meta" gives a model without weights.
    """
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config_of(shape), dtype=dtype, attn_implementation="sdpa"
        )
    return model.eval().requires_grad_(False)


def value_head(shape: str, device: str, dtype: torch.dtype, seed: int = 0) -> nn.Linear:
    """A vocabulary head for the backbone of this shape."""
    torch.manual_seed(seed)
    config = config_of(shape)
    head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, device=device, dtype=dtype)
    return head.requires_grad_(False)


def num_parameters(shape: str) -> int:
    return sum(p.numel() for p in build(shape, "meta", torch.bfloat16).parameters())


def streamed_bytes(shape: str, dtype: torch.dtype = torch.bfloat16) -> int:
    """Weights that a decode step reads whole, whatever the batch: all but the tables of which it
    looks up rows (a tied embedding is the head, which is read)."""
    model = build(shape, "meta", dtype)
    tables = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)
    } - {id(model.get_output_embeddings().weight)}
    return sum(p.nbytes for p in model.parameters() if id(p) not in tables)


@dataclass(frozen=True, slots=True)
class KVShape:
    """Keys (or values) of a model: layers, heads and elements of a head."""

    num_layers: int
    num_heads: int
    head_size: int

    def bytes_per_token(self, dtype: torch.dtype = torch.bfloat16) -> int:
        """Keys and values of all layers."""
        return 2 * self.num_layers * self.num_heads * self.head_size * dtype.itemsize


def kv_shape(shape: str) -> KVShape:
    config = config_of(shape)
    num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = config.hidden_size // config.num_attention_heads
    return KVShape(config.num_hidden_layers, num_heads, head_size)


def step_bytes(
    family: Family,
    *,
    prompt: int,
    response: int,
    beam_width: int,
    num_candidates: int,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[int, int]:
    """The least that a decode step of one request has to read, over all roles, in the mean.

    Args:
        prompt, response: tokens.

    Returns:
        Bytes of weights; bytes of keys and values: the prompt's once, then those of W survivors up
        to the last selection and of W * K candidates behind it.
    """
    weights = sum(streamed_bytes(shape, dtype) for shape in family.roles.values())
    own = beam_width * num_candidates * min(family.chunk_length, response) / 2
    tokens = prompt + beam_width * response / 2 + own
    kv = sum(kv_shape(shape).bytes_per_token(dtype) for shape in family.roles.values())
    return weights, int(kv * tokens)
