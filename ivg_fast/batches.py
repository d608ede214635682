# SPDX-License-Identifier: Apache-2.0
"""From the scheduler's plans to packed forwards: the first step of a burst, its decode steps, and
the extension of candidates by a chunk that is to be scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ivg_fast.models.batch import BLOCK_SIZE, ForwardBatch
from ivg_fast.request import LiveRequest

Int32s = NDArray[np.int32]
Int64s = NDArray[np.int64]
Ints = NDArray[np.integer[Any]]


def prompt_lens(requests: Sequence[LiveRequest], role: str) -> Int32s:
    """Prompt tokens of each request in a role, 0 where it takes no part."""
    ids = [request.prompt_ids.get(request.reader(role), ()) for request in requests]
    return np.array([len(prompt) for prompt in ids], np.int32)


def first_batch(
    plan: Any,
    requests: Sequence[LiveRequest],
    role: str,
    prompts: dict[int, Int64s],
    rows: Int64s,
    device: torch.device | str = "cpu",
) -> ForwardBatch:
    """Pieces of prompts, then one token of each row.

    Wanted are the outputs of the last tokens of prompts, then of the rows.

    Args:
        plan: of Scheduler.plan().
        requests: those of plan.request_ids.
        role: whose forward it is.
        prompts: by index into plan.prefill_request_ids, the prompts that the role goes on reading.
        rows: indices of the plan's rows that it forwards.
        device: the role's.
    """
    which = list(prompts)
    whole = np.array([len(prompt) for prompt in prompts.values()], np.int32)
    begins = plan.prefill_begin[which]
    stops = np.minimum(plan.prefill_end[which], whole)
    spans = [np.arange(*span) for span in zip(begins, stops, strict=True)]
    texts = [prompt[span] for prompt, span in zip(prompts.values(), spans, strict=True)]
    tables = plan.prefill_tables[which]
    slots = [_slots(table, span) for table, span in zip(tables, spans, strict=True)]
    of_request = plan.row_request[rows]
    position = plan.row_position[rows]
    row_prompt = prompt_lens(requests, role)[of_request]
    lens = stops - begins
    ends = np.concatenate([np.cumsum(lens), lens.sum() + np.arange(1, len(rows) + 1)])
    is_wanted = np.concatenate([stops == whole, np.ones(len(rows), bool)])
    return ForwardBatch.from_host(
        input_ids=np.concatenate([*texts, plan.row_token[rows]]),
        position_ids=np.concatenate([*spans, row_prompt + position]),
        slot_mapping=np.concatenate([*slots, plan.row_slot[rows]]),
        query_start_loc=np.concatenate([[0], ends]),
        prompt_lens=np.concatenate([stops, row_prompt]),
        response_lens=np.concatenate([np.zeros(len(lens), np.int32), position + 1]),
        response_block_start=np.concatenate(
            [-(-stops // BLOCK_SIZE), plan.prompt_blocks[of_request]]
        ),
        block_table=np.concatenate([tables, plan.row_tables[rows]]),
        logit_positions=ends[is_wanted] - 1,
        device=device,
    )


class DecodeRows:
    """One role's rows in the decode steps of a burst, while the same candidates live.

    Attributes:
        members: ascending indices of the plan's samples that the role forwards.
    """

    def __init__(
        self, plan: Any, requests: Sequence[LiveRequest], role: str, members: Int64s
    ) -> None:
        takes_part = np.array([role in request.step_roles for request in requests])
        self.members = members = members[takes_part[plan.sample_request[members]]]
        of_request = plan.sample_request[members]
        first_position = plan.sample_position[members]
        lens = prompt_lens(requests, role)[of_request]
        # The token drawn at step s - 1 is forwarded at step s, at response index first + s - 1.
        self._response_lens = torch.from_numpy(first_position)
        self._positions = torch.from_numpy((lens + first_position - 1).astype(np.int64))
        self._prompt_lens = torch.from_numpy(lens)
        self._block_start = torch.from_numpy(plan.prompt_blocks[of_request])
        self._block_table = torch.from_numpy(plan.sample_tables[members])
        self._query_start_loc = torch.arange(len(members) + 1, dtype=torch.int32)
        self._logit_positions = torch.arange(len(members))
        self._slots = np.ascontiguousarray(plan.sample_slots[:, members])

    def batch(self, step: int, tokens: Int32s) -> ForwardBatch:
        """The forward at `step` >= 1 of the tokens [B] that all samples drew at step - 1."""
        return ForwardBatch(
            input_ids=torch.from_numpy(tokens[self.members].astype(np.int64)).view(1, -1),
            position_ids=(self._positions + step).view(1, -1),
            slot_mapping=torch.from_numpy(self._slots[step - 1]),
            query_start_loc=self._query_start_loc,
            prompt_lens=self._prompt_lens,
            response_lens=self._response_lens + step,
            response_block_start=self._block_start,
            block_table=self._block_table,
            logit_positions=self._logit_positions,
        )


def extension_batch(
    plan: Any,
    requests: Sequence[LiveRequest],
    role: str,
    rows: Ints,
    starts: Ints,
    ends: Ints,
    tokens: Int32s,
    *,
    last_only: bool,
    device: torch.device | str = "cpu",
) -> ForwardBatch:
    """Response tokens [starts, ends) of rows of a score plan.

    Args:
        plan: of Scheduler.plan_scores().
        requests: those of plan.request_ids.
        role: whose forward it is.
        rows: indices of the plan's rows.
        starts, ends: response indices, one pair a row.
        tokens: the plan's row_tokens, or those and what may stand behind them.
        last_only: outputs are wanted of each row's last token only, else of every one.
        device: the role's.
    """
    of_request = plan.row_request[rows]
    counts = ends - starts
    stops = np.cumsum(counts)
    of_row = np.repeat(np.arange(len(rows)), counts)
    position = np.arange(int(stops[-1])) - np.repeat(stops - counts, counts) + starts[of_row]
    block_start = plan.prompt_blocks[of_request]
    tables = plan.row_tables[rows]
    blocks = tables[of_row, block_start[of_row] + position // BLOCK_SIZE]
    lens = prompt_lens(requests, role)[of_request]
    return ForwardBatch.from_host(
        input_ids=tokens[rows[of_row], position - plan.row_start[rows][of_row]],
        position_ids=lens[of_row] + position,
        slot_mapping=blocks * BLOCK_SIZE + position % BLOCK_SIZE,
        query_start_loc=np.concatenate([[0], stops]),
        prompt_lens=lens,
        response_lens=ends,
        response_block_start=block_start,
        block_table=tables,
        logit_positions=stops - 1 if last_only else np.arange(len(position)),
        device=device,
    )


def _slots(table: Int32s, positions: Int64s) -> Int32s:
    return table[positions // BLOCK_SIZE] * BLOCK_SIZE + (positions % BLOCK_SIZE).astype(np.int32)
