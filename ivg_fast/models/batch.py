# SPDX-License-Identifier: Apache-2.0
"""One packed forward of one role."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike

BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """The new tokens of several rows, packed end to end, and where their keys and values live.

    Row i owns the packed tokens [query_start_loc[i], query_start_loc[i + 1]). They are the last
    tokens of its sequence, which has prompt_lens[i] prompt keys in the first slots of its blocks
    and response_lens[i] response keys from block column response_block_start[i] on, the new tokens
    included. What the model reads is on its device; what attention is planned with stays on the
    host. T packed tokens, B rows, N wanted positions:

        input_ids             i64 [1, T]
        position_ids          i64 [1, T]
        slot_mapping          i32 [T]      block_id * 16 + offset of each new token; -1: a pad
        logit_positions       i64 [N]      packed indices whose logits or hidden states are wanted
        query_start_loc       i32 [B + 1]  on the host, like the rest
        prompt_lens           i32 [B]
        response_lens         i32 [B]
        response_block_start  i32 [B]
        block_table           i32 [B, width]
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    slot_mapping: torch.Tensor
    query_start_loc: torch.Tensor
    prompt_lens: torch.Tensor
    response_lens: torch.Tensor
    response_block_start: torch.Tensor
    block_table: torch.Tensor
    logit_positions: torch.Tensor

    @classmethod
    def from_host(
        cls,
        *,
        input_ids: ArrayLike,
        position_ids: ArrayLike,
        slot_mapping: ArrayLike,
        query_start_loc: ArrayLike,
        prompt_lens: ArrayLike,
        response_lens: ArrayLike,
        response_block_start: ArrayLike,
        block_table: ArrayLike,
        logit_positions: ArrayLike,
        device: torch.device | str = "cpu",
    ) -> ForwardBatch:
        """Makes a batch from NumPy arrays or lists.

        On the CPU an array of the right dtype and layout is shared, not copied: it must not
        change while the batch is in use.
        """

        def tensor(values: ArrayLike, dtype: type[np.generic]) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(values, dtype=dtype))

        return cls(
            input_ids=tensor(input_ids, np.int64).view(1, -1).to(device),
            position_ids=tensor(position_ids, np.int64).view(1, -1).to(device),
            slot_mapping=tensor(slot_mapping, np.int32).to(device),
            query_start_loc=tensor(query_start_loc, np.int32),
            prompt_lens=tensor(prompt_lens, np.int32),
            response_lens=tensor(response_lens, np.int32),
            response_block_start=tensor(response_block_start, np.int32),
            block_table=tensor(block_table, np.int32),
            logit_positions=tensor(logit_positions, np.int64).to(device),
        )

    @classmethod
    def of_texts(
        cls,
        texts: Sequence[Sequence[int]],
        tables: Sequence[Sequence[int]],
        num_cached: Sequence[int] | None = None,
        num_wanted: Sequence[int] | None = None,
        *,
        device: torch.device | str = "cpu",
    ) -> ForwardBatch:
        """Texts that are all prompt, each in blocks of its own from its first token on.

        Args:
            texts: token ids of each.
            tables: its block ids.
            num_cached: how many of its first tokens have been written before; None: none.
            num_wanted: how many of its last tokens' outputs are wanted; None: one.
        """
        table = np.zeros((len(texts), max(map(len, tables))), np.int32)
        ids, positions, slots, wanted = [], [], [], []
        end = 0
        for i, (line, text, blocks) in enumerate(zip(table, texts, tables, strict=True)):
            first = 0 if num_cached is None else num_cached[i]
            line[: len(blocks)] = blocks
            position = np.arange(first, len(text))
            ids.append(np.asarray(text[first:], np.int64))
            positions.append(position)
            slots.append(line[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE)
            end += len(position)
            wanted.append(np.arange(end - (1 if num_wanted is None else num_wanted[i]), end))
        lengths = np.array([len(text) for text in texts])
        return cls.from_host(
            input_ids=np.concatenate(ids),
            position_ids=np.concatenate(positions),
            slot_mapping=np.concatenate(slots),
            query_start_loc=np.cumsum([0, *map(len, ids)]),
            prompt_lens=lengths,
            response_lens=np.zeros(len(texts), np.int32),
            response_block_start=-(-lengths // BLOCK_SIZE),
            block_table=table,
            logit_positions=np.concatenate(wanted),
            device=device,
        )
