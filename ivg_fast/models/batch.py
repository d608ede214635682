# SPDX-License-Identifier: Apache-2.0
"""One packed forward of one role."""

from __future__ import annotations

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
