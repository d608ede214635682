# SPDX-License-Identifier: Apache-2.0
"""Drives a ModelRunner over random ragged batches, with an allocator of its own."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from ivg_fast.models.batch import ForwardBatch

BLOCK = 16


@dataclass
class Row:
    """One sequence: its tokens, how many of them are prompt, where its response blocks start."""

    ids: np.ndarray
    prompt_len: int
    response_column: int
    blocks: list[int] = field(default_factory=list)
    done: int = 0

    def slot(self, position: int) -> int:
        column, offset = divmod(position, BLOCK)
        if position >= self.prompt_len:
            column, offset = divmod(position - self.prompt_len, BLOCK)
            column += self.response_column
        return self.blocks[column] * BLOCK + offset


class PagedDriver:
    """Random rows over one pool; block ids are dealt from a shuffled deck."""

    def __init__(self, seed: int, *, num_rows: int, vocab_size: int, max_len: int = 60) -> None:
        self.rng = np.random.default_rng(seed)
        self.num_blocks = num_rows * 8
        deck = list(self.rng.permutation(self.num_blocks))
        self.rows = []
        for _ in range(num_rows):
            prompt_len = int(self.rng.integers(1, 35))
            other_role_prompt_len = int(self.rng.integers(1, 35))
            column = -(-max(prompt_len, other_role_prompt_len) // BLOCK)
            length = int(self.rng.integers(prompt_len + 1, max_len))
            ids = self.rng.integers(0, vocab_size, length)
            num_blocks = column - (-(length - prompt_len) // BLOCK)
            blocks = [deck.pop() for _ in range(num_blocks)]
            self.rows.append(Row(ids, prompt_len, column, blocks))

    @property
    def is_done(self) -> bool:
        return all(row.done == len(row.ids) for row in self.rows)

    def next_batch(self) -> tuple[ForwardBatch, list[tuple[int, int]]]:
        """A random mixture of whole prompts, pieces of prompts, single tokens, chunks and pad rows.

        Also returns (row, position) of each wanted logit.
        """
        waiting = [i for i, row in enumerate(self.rows) if row.done < len(row.ids)]
        picked = [i for i in waiting if self.rng.random() < 0.7] or waiting[:1]
        self.rng.shuffle(picked)
        order = list(zip(picked, self.rng.random(len(picked)) < 0.2, strict=True))

        ids, positions, slots, wanted, indices = [], [], [], [], []
        starts, prompts, responses = [0], [], []
        for i, is_pad in order:
            row = self.rows[i]
            if is_pad:
                count = 1
            elif row.done == 0 and self.rng.random() < 0.5:
                count = row.prompt_len
            else:
                count = int(self.rng.choice([1, 1, 2, 5, 20]))
            span = range(row.done, min(row.done + count, len(row.ids)))
            for position in span:
                if not is_pad and self.rng.random() < 0.7:
                    wanted.append((i, position))
                    indices.append(starts[-1] + position - row.done)
                ids.append(row.ids[position])
                positions.append(position)
                slots.append(-1 if is_pad else row.slot(position))
            prompts.append(min(span.stop, row.prompt_len))
            responses.append(span.stop - prompts[-1])
            starts.append(starts[-1] + len(span))
            if not is_pad:
                row.done = span.stop
        width = max(len(self.rows[i].blocks) for i, _ in order) + int(self.rng.integers(0, 3))
        # Columns past a row's blocks hold an id outside the pool: reading one would be seen.
        table = np.full((len(order), width), 2**30, dtype=np.int32)
        for line, (i, _) in zip(table, order, strict=True):
            line[: len(self.rows[i].blocks)] = self.rows[i].blocks
        batch = ForwardBatch.from_host(
            input_ids=ids,
            position_ids=positions,
            slot_mapping=slots,
            query_start_loc=starts,
            prompt_lens=prompts,
            response_lens=responses,
            response_block_start=[self.rows[i].response_column for i, _ in order],
            block_table=table,
            logit_positions=indices,
        )
        return batch, wanted


@torch.inference_mode()
def stock_logits(model: torch.nn.Module, row: Row) -> torch.Tensor:
    """[n, V]: the whole sequence at once by the model's own attention."""
    output = model(input_ids=torch.from_numpy(row.ids)[None], use_cache=False)
    return getattr(output, "logits", output)[0]
