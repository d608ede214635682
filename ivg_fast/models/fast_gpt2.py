# SPDX-License-Identifier: Apache-2.0
"""GPT-2 on the paged cache with no more operators than it takes: nine a block instead of thirty.

A small model on the CPU spends as long between its matrix products as in them. Here GELU and the
residual sums belong to the products, and nothing else is left between them but the two norms and
attention; around the blocks, no mask is thought of, which paged attention would not read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.activations import NewGELUActivation
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention, GPT2Block, GPT2Model

from ivg_fast.models.attention import paged_context
from ivg_fast.models.fast_linear import FastLinear


def fast_block(
    block: nn.Module, linears: Mapping[nn.Module, FastLinear]
) -> Callable[..., Any] | None:
    """A faster forward of a GPT2Block; None where it would not do what the block does.

    Args:
        block: in eval mode.
        linears: faster forms of linear layers that have one.
    """
    if type(block) is not GPT2Block or hasattr(block, "crossattention"):
        return None
    attention: Any = block.attn
    mlp: Any = block.mlp
    norms: tuple[Any, Any] = (block.ln_1, block.ln_2)
    layers = (attention.c_attn, attention.c_proj, mlp.c_fc, mlp.c_proj)
    is_known = (
        type(attention) is GPT2Attention
        and type(mlp) is GPT2MLP
        and type(mlp.act) is NewGELUActivation
        and all(type(norm) is nn.LayerNorm for norm in norms)
        and all(layer in linears for layer in layers)
    )
    if not is_known:
        return None
    qkv, out, up, down = (linears[layer] for layer in layers)
    # Somebody's hooks want the modules that they are on to run.
    hooks: list[Mapping[int, Any]] = [
        of_module
        for module in block.modules()
        if module is not block
        for of_module in (module._forward_hooks, module._forward_pre_hooks)
    ]
    num_heads, head_dim, scale = attention.num_heads, attention.head_dim, attention.scaling
    layer_idx = attention.layer_idx
    first, second = ((norm.normalized_shape, norm.weight, norm.bias, norm.eps) for norm in norms)

    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        context = paged_context()
        if context is None or any(hooks):
            return GPT2Block.forward(block, hidden_states, *args, **kwargs)
        shape = hidden_states.shape
        heads = qkv(functional.layer_norm(hidden_states, *first)).view(-1, 3, num_heads, head_dim)
        attended = context.attend_tokens(layer_idx, *heads.unbind(1), scale=scale)
        hidden_states = out.plus(attended.view(shape), hidden_states)
        widened = up.gelu(functional.layer_norm(hidden_states, *second))
        return down.plus(widened, hidden_states)

    return forward


def fast_decoder(model: Any) -> Callable[..., Any] | None:
    """A faster forward of a GPT2Model's packed tokens; None for another model."""
    if type(model) is not GPT2Model:
        return None

    def forward(
        input_ids: torch.Tensor | None = None, *args: Any, **kwargs: Any
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        asked = {name: value for name, value in kwargs.items() if value is not None}
        positions = asked.pop("position_ids", None)
        is_packed = asked in _PACKED and not args and paged_context() is not None
        if not is_packed or input_ids is None or positions is None:
            return GPT2Model.forward(model, input_ids, *args, **kwargs)
        hidden_states = model.drop(model.wte(input_ids) + model.wpe(positions))
        for block in model.h:
            hidden_states = block(hidden_states)
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=model.ln_f(hidden_states)
        )

    return forward


# What else a ModelRunner's call may say, by way of a head or directly.
_PACKED = ({"use_cache": False}, {"use_cache": False, "return_dict": True})
