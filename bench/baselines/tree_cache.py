# SPDX-License-Identifier: Apache-2.0
"""Own KV tensors behind the HF cache interface, for rows that each carry a small tree of siblings.

A row is one surviving hypothesis, its trunk; its G children sit side by side in the query dimension
of the same row, told apart by the attention mask. Slots of a row:

    [0, pad)        left padding, masked
    [pad, base)     prompt and response of the trunk
    base + j*G + g  token j of the current chunk of child g

So children never copy their trunk, and a trunk is read once for G queries.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache


class TreeCache(Cache):
    """K and V of each layer in a tensor of its own, written in place.

    (One tensor for all layers makes compiled code copy all of it at each write.)

    Attributes:
        buffers: K and V of layer 0, K and V of layer 1 ..., each [rows, kv_heads, slots, head_dim].
        num_rows: rows in use.
        start: first slot that the next forward writes.
        slots: the slots it writes, as a tensor. With it, attention sees all slots at constant
            shapes (for CUDA graphs); without, the slots up to the last one written.
    """

    is_compileable = True

    def __init__(self, buffers: list[Tensor], num_rows: int) -> None:
        self.layers = []
        self.buffers = buffers
        self.num_rows = num_rows
        self.start = 0
        self.slots: Tensor | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes [rows, kv_heads, q, head_dim] and returns what attention may see."""
        keys = self.buffers[2 * layer_idx][: self.num_rows]
        values = self.buffers[2 * layer_idx + 1][: self.num_rows]
        if self.slots is not None:
            keys.index_copy_(2, self.slots, key_states)
            values.index_copy_(2, self.slots, value_states)
            return keys, values
        end = self.start + key_states.shape[2]
        keys[:, :, self.start : end] = key_states
        values[:, :, self.start : end] = value_states
        return keys[:, :, :end], values[:, :, :end]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Slots written before the next forward."""
        return self.start

    def repeat_rows(self, times: int) -> None:
        """Each row becomes `times` adjacent rows."""
        for buffer in self.buffers:
            repeated = buffer[: self.num_rows].repeat_interleave(times, dim=0)
            buffer[: len(repeated)] = repeated
        self.num_rows *= times

    def keep(self, rows: Tensor, first: int, base: int, local_slots: Tensor) -> None:
        """Makes row a the trunk of old row `rows[a]` [A] with `local_slots[a]` [A, n] behind it.

        Slots before `first` are known to be right already.
        """
        kept = len(rows)
        end = base + local_slots.shape[1]
        moves = kept != self.num_rows or rows.tolist() != list(range(kept))
        for buffer in self.buffers:
            local = buffer[rows[:, None], :, local_slots]  # [A, n, heads, dim]
            if moves:
                buffer[:kept, :, first:base] = buffer[:, :, first:base].index_select(0, rows)
            buffer[:kept, :, base:end] = local.transpose(1, 2)
        self.num_rows = kept


def cache_shape(model: nn.Module, rows: int, slots: int) -> tuple[int, ...]:
    """The shape of each of a TreeCache's buffers for `model`."""
    config = model.config.get_text_config()
    num_heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    return (rows, kv_heads, slots, head_dim)


def tree_mask(
    padding: Tensor, base: int, fanout: int, depth: int, num_slots: int, dtype: torch.dtype
) -> Tensor:
    """Additive mask of one step, or of a chunk: [A, 1, fanout * depth, num_slots].

    Query (j, g) sees the slots of its row behind `padding` [A] and before `base`, and the local
    slots base + i*fanout + g with i <= j. The mask of step j alone is rows
    [j * fanout, (j + 1) * fanout).
    """
    device = padding.device
    slot = torch.arange(num_slots, device=device)
    query = torch.arange(fanout * depth, device=device)[:, None]
    local = slot - base
    own = (local >= 0) & (local % fanout == query % fanout) & (local <= query)
    seen = ((slot < base) | own) & (slot >= padding[:, None, None])
    hidden = torch.finfo(dtype).min
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, hidden)[:, None]
