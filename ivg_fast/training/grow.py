# SPDX-License-Identifier: Apache-2.0
"""A wider and deeper GPT-2 that computes what a trained small one computes, to train on from.

After Net2Net (arXiv 1511.05641): units are duplicated, and what reads both copies splits each
weight at random between them, which keeps the function and lets the copies part ways; added
blocks write nothing at first. A large model so starts at the small one's loss.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch

from ivg_fast.errors import InvalidParameterError

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel


def _split_rows(weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """[in, out] -> [2 in, out], the two halves summing to the weight."""
    share = 0.25 + 0.5 * torch.rand(weight.shape, generator=generator)
    return torch.cat([weight * share, weight * (1 - share)])


def _double(weight: torch.Tensor, num_outputs: int, generator: torch.Generator) -> torch.Tensor:
    """[in, out] -> [2 in, 2 out]; `num_outputs` stacked outputs (q, k, v) double one by one."""
    parts = [
        _split_rows(part, generator) for part in weight.chunk(num_outputs, 1) for _ in range(2)
    ]
    return torch.cat(parts, 1)


def _double_vector(vector: torch.Tensor, num_parts: int = 1) -> torch.Tensor:
    return torch.cat([part for part in vector.chunk(num_parts) for _ in range(2)])


def grow_gpt2(model: GPT2LMHeadModel, num_layers: int, seed: int = 0) -> GPT2LMHeadModel:
    """Twice the width and heads, `num_layers` blocks; the same logits as `model`.

    Raises InvalidParameterError unless num_layers is between the model's and twice that.
    """
    from transformers import GPT2LMHeadModel

    old = model.config
    if not old.n_layer <= num_layers <= 2 * old.n_layer:
        raise InvalidParameterError(
            "num_layers", num_layers, f"must be in [{old.n_layer}, {2 * old.n_layer}]"
        )
    config = copy.deepcopy(old)
    config.n_embd, config.n_head, config.n_layer = 2 * old.n_embd, 2 * old.n_head, num_layers
    generator = torch.Generator().manual_seed(seed)
    small = model.state_dict()
    # Block i of the large model comes from sources[i]; a second copy of a block starts silent.
    sources = [i * old.n_layer // num_layers for i in range(num_layers)]
    state = {}
    for name in ("wte", "wpe"):
        weight = small[f"transformer.{name}.weight"]
        state[f"transformer.{name}.weight"] = torch.cat([weight, weight], 1)
    state["lm_head.weight"] = state["transformer.wte.weight"]
    for kind in ("weight", "bias"):
        # Halved, because every logit is now a sum over two equal halves.
        state[f"transformer.ln_f.{kind}"] = _double_vector(small[f"transformer.ln_f.{kind}"]) / 2
    for block, source in enumerate(sources):
        is_copy = block > 0 and sources[block - 1] == source
        to, of = f"transformer.h.{block}.", f"transformer.h.{source}."
        for norm in ("ln_1", "ln_2"):
            for kind in ("weight", "bias"):
                state[f"{to}{norm}.{kind}"] = _double_vector(small[f"{of}{norm}.{kind}"])
        for layer in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            num_outputs = 3 if layer == "attn.c_attn" else 1
            weight = _double(small[f"{of}{layer}.weight"], num_outputs, generator)
            bias = _double_vector(small[f"{of}{layer}.bias"], num_outputs)
            if is_copy and layer.endswith("c_proj"):
                weight, bias = torch.zeros_like(weight), torch.zeros_like(bias)
            state[f"{to}{layer}.weight"], state[f"{to}{layer}.bias"] = weight, bias
    large = GPT2LMHeadModel(config)
    large.load_state_dict(state)
    return large
