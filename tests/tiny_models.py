# SPDX-License-Identifier: Apache-2.0
"""Tiny decoders of the well-known shapes, made from configs: no download, a few milliseconds each.

The weights are redrawn so that attention is peaked, depth matters, and the next-token
distributions are far from uniform and differ by seed; default initialisation would give
near-uniform logits, under which most mistakes are invisible.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

EOS_PIECE = "<|endoftext|>"

_COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}

# name -> (config class, what differs from _COMMON; None drops an entry)
_SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2Config",
        {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 256,
            "n_inner": 48,
            "common": False,
        },
    ),
    "opt": (
        "OPTConfig",
        {
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            "word_embed_proj_dim": 32,
            "common": False,
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", {"rotary_pct": 0.5, "num_key_value_heads": None}),
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": 8}),
    "mixtral": (
        "MixtralConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "qwen2": ("Qwen2Config", {"use_sliding_window": False}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "gemma2": (
        "Gemma2Config",
        {
            "head_dim": 16,
            "num_hidden_layers": 3,
            "sliding_window": 8,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "head_dim": 16,
            "num_hidden_layers": 3,
            "sliding_window": 8,
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        {
            "head_dim": 16,
            "sliding_window": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "phi3": ("Phi3Config", {"sliding_window": 8}),
    "stablelm": ("StableLmConfig", {"partial_rotary_factor": 0.5}),
}

TINY_MODELS = tuple(_SHAPES)


def tiny_config(name: str, vocab_size: int = 97, **overrides: Any) -> PretrainedConfig:
    """The config of `tiny_model`; `overrides` are fields of the config class."""
    class_name, special = _SHAPES[name]
    special = dict(special)
    fields = dict(_COMMON) if special.pop("common", True) else {"tie_word_embeddings": False}
    fields.update(special)
    fields.update(
        vocab_size=vocab_size,
        bos_token_id=vocab_size - 1,
        eos_token_id=vocab_size - 1,
        pad_token_id=None,
    )
    fields.update(overrides)
    if fields.get("num_key_value_heads", 0) is None:
        del fields["num_key_value_heads"]
    return getattr(transformers, class_name)(**fields)


def tiny_model(
    name: str,
    *,
    vocab_size: int = 97,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> torch.nn.Module:
    """A random decoder of shape `name` (one of TINY_MODELS) in eval mode, a function of `seed`."""
    config = tiny_config(name, vocab_size, **overrides)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention_of(name))
    redraw_weights(model, seed)
    for parameter in model.parameters():  # not the buffers: rotary frequencies stay in float32
        parameter.data = parameter.data.to(dtype)
    return model.eval().requires_grad_(False)


def attention_of(name: str) -> str | None:
    """SDPA leaves Gemma-2's soft cap out in some versions of transformers; None: the default."""
    return "eager" if name == "gemma2" else None


def redraw_weights(model: torch.nn.Module, seed: int) -> None:
    """Gives every parameter an informative random value, drawn from `seed` alone."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                is_embedding = "embed" in name or "wte" in name or "wpe" in name
                fan_in = parameter.shape[-1]
                scale = 0.6 if is_embedding else 1.3 / math.sqrt(fan_in)
                if "lm_head" in name or "embed_out" in name:
                    scale = 2.2 / math.sqrt(fan_in)
                parameter.copy_(noise * scale)
            elif "norm" in name or "ln_" in name:
                centre = parameter.mean()  # 1 for most norms, 0 for biases and for Gemma's (1 + w)
                parameter.copy_(centre + 0.1 * noise)
            else:
                parameter.copy_(0.1 * noise)


def tiny_tokenizer(vocab_size: int = 97) -> PreTrainedTokenizerFast:
    """One piece a printable ASCII character, then pairs of letters, then EOS as the last id.

    97 pieces hold the 95 characters, one merge ("th") and EOS. Decoding concatenates the pieces, so
    stop strings can span tokens.
    """
    pieces = [chr(code) for code in range(32, 127)]
    letters = "tahisnroeldcumfpgwybvkxjqz"
    merges = list(dict.fromkeys((a, b) for b in "h" + letters for a in letters))
    pieces += [a + b for a, b in merges]
    if vocab_size - 1 > len(pieces):
        raise ValueError(f"vocab_size must be at most {len(pieces) + 1}, got {vocab_size}")
    pieces = pieces[: vocab_size - 1]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [pair for pair in merges if "".join(pair) in vocab and set(pair) <= set(vocab)]
    vocab[EOS_PIECE] = vocab_size - 1
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=EOS_PIECE,
        bos_token=EOS_PIECE,
        clean_up_tokenization_spaces=False,
    )
