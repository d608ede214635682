# SPDX-License-Identifier: Apache-2.0
"""One packed forward of one role."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike

from ivg_fast.ops._backend import choose_backend
from ivg_fast.ops.packed import upload
from ivg_fast.ops.paged_attention import AttentionMetadata, PagedPlan

BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One token of each of B rows, in device buffers that stay where they are: nothing here is read
    by the host, so that a forward of it can be captured in a graph.

        input_ids     i64 [1, B]
        position_ids  i64 [1, B]
        slot_mapping  i32 [B]      as of ForwardBatch
        plan          the rows as attention knows them
        backend       of the ops

    The outputs of all rows are wanted.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    slot_mapping: torch.Tensor
    plan: PagedPlan
    backend: str = "auto"

    @property
    def logit_positions(self) -> None:
        """Every row."""
        return None

    def attention_rows(self) -> AttentionMetadata | PagedPlan:
        """The plan where Triton attends; else its rows as they are now, on the CPU."""
        if choose_backend(self.backend, self.slot_mapping) == "triton":
            return self.plan
        plan = self.plan
        return AttentionMetadata.build(
            block_table=plan.block_table,
            query_start_loc=plan.query_start_loc,
            prompt_lens=plan.prompt_lens,
            response_lens=plan.response_lens,
            response_block_start=plan.response_block_start,
        )


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

    @property
    def backend(self) -> str:
        """Of the ops."""
        return "auto"

    def attention_rows(self) -> AttentionMetadata:
        """The rows as attention takes them, checked."""
        return AttentionMetadata.build(
            block_table=self.block_table,
            query_start_loc=self.query_start_loc,
            prompt_lens=self.prompt_lens,
            response_lens=self.response_lens,
            response_block_start=self.response_block_start,
        )

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
        """Makes a batch from NumPy arrays or lists, without waiting for the device.

        On the CPU an array of the right dtype and layout is shared, not copied: it must not
        change while the batch is in use.
        """

        def tensor(values: ArrayLike, dtype: type[np.generic]) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(values, dtype=dtype))

        def on_device(values: ArrayLike, dtype: type[np.generic]) -> torch.Tensor:
            return upload(np.asarray(values, dtype=dtype), device)

        return cls(
            input_ids=on_device(input_ids, np.int64).view(1, -1),
            position_ids=on_device(position_ids, np.int64).view(1, -1),
            slot_mapping=on_device(slot_mapping, np.int32),
            query_start_loc=tensor(query_start_loc, np.int32),
            prompt_lens=tensor(prompt_lens, np.int32),
            response_lens=tensor(response_lens, np.int32),
            response_block_start=tensor(response_block_start, np.int32),
            block_table=tensor(block_table, np.int32),
            logit_positions=on_device(logit_positions, np.int64),
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
