# SPDX-License-Identifier: Apache-2.0
"""What decode steps leave behind and find again on the device, so that no host need look between
them: the next input of each row, and what has been drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ivg_fast.ops._backend import choose_backend
from ivg_fast.ops._sample_args import GuidedSample
from ivg_fast.ops._triton import check_device
from ivg_fast.ops.guided_sample import guided_sample
from ivg_fast.ops.kv_cache import BLOCK_SIZE

# The planes of StepState.records, in order: the fields of GuidedSample.
RECORDS = GuidedSample._fields


@dataclass(frozen=True, slots=True)
class StepState:
    """Device buffers of B rows that a decode step advances in place, so that a graph can replay it.

    A row with slot_mapping[b] < 0 is a pad and stays as it is. Of another, whose token of response
    index t = positions[b] has just been drawn::

        records[:, t - first_positions[b], b] = what was drawn
        goes on, if the token is valid, none of stop_ids[b], and not the last of limits[b]:
            input_ids[b] = the token
            slot_mapping[b] = the slot of response index t
            positions[b] += 1; model_positions[:, b] += 1
        else slot_mapping[b] = -1

    Attributes:
        input_ids: int64[B], what the next forward reads.
        positions: int32[B], the response index of the token to be drawn next, which is also how
            many response keys there are by then.
        model_positions: int64[num_roles, B], the position of input_ids in each role.
        slot_mapping: int32[B], where the keys and values of input_ids go.
        block_table: int32[B, W].
        prompt_blocks: int32[B], the leading table entries that hold the prompt.
        first_positions: int32[B], the response index of the burst's first token.
        limits: int32[B], tokens that the burst draws at most.
        stop_ids: int64[B, M], tokens that end a row, -1 for none.
        records: int32[6, L, B], by step what was drawn, in the order of RECORDS; floats by their
            bits.
    """

    input_ids: Tensor
    positions: Tensor
    model_positions: Tensor
    slot_mapping: Tensor
    block_table: Tensor
    prompt_blocks: Tensor
    first_positions: Tensor
    limits: Tensor
    stop_ids: Tensor
    records: Tensor

    def rows(self, begin: int, end: int) -> StepState:
        """The same buffers, narrowed to rows [begin, end)."""
        return StepState(
            input_ids=self.input_ids[begin:end],
            positions=self.positions[begin:end],
            model_positions=self.model_positions[:, begin:end],
            slot_mapping=self.slot_mapping[begin:end],
            block_table=self.block_table[begin:end],
            prompt_blocks=self.prompt_blocks[begin:end],
            first_positions=self.first_positions[begin:end],
            limits=self.limits[begin:end],
            stop_ids=self.stop_ids[begin:end],
            records=self.records[:, :, begin:end],
        )

    def advance(self, drawn: GuidedSample) -> None:
        """Takes what was drawn for every row, in plain PyTorch; see the class."""
        is_row = self.slot_mapping >= 0
        step = self.positions - self.first_positions
        planes = [
            field.view(torch.int32) if field.is_floating_point() else field.int() for field in drawn
        ]
        at = step.clamp(0, self.records.shape[1] - 1).long().expand(len(planes), 1, -1)
        before = self.records.gather(1, at)
        self.records.scatter_(1, at, torch.where(is_row, torch.stack(planes)[:, None], before))

        is_stop = (drawn.token_ids[:, None] == self.stop_ids).any(1)
        goes_on = is_row & drawn.valid & ~is_stop & (step + 1 < self.limits)
        column = self.prompt_blocks + self.positions // BLOCK_SIZE
        column = column.clamp(max=self.block_table.shape[1] - 1).long()
        block = self.block_table.gather(1, column[:, None])[:, 0]
        slot = block * BLOCK_SIZE + self.positions % BLOCK_SIZE
        self.input_ids.copy_(torch.where(goes_on, drawn.token_ids, self.input_ids))
        self.slot_mapping.copy_(torch.where(goes_on, slot, -1))
        self.positions.add_(goes_on)
        self.model_positions.add_(goes_on)


def sample_step(
    base: Tensor,
    tuned: Tensor | None,
    untuned: Tensor | None,
    state: StepState,
    *,
    measure: Callable[[Tensor], Tensor] | None = None,
    backend: str = "auto",
    **arguments: Any,
) -> None:
    """guided_sample of the rows of `state`, and `state` advanced: on a GPU one and the same kernel.

    Args:
        base, tuned, untuned: logits, as of guided_sample.
        state: its `positions` are those of the draw.
        measure: from token ids int64[B] to float32[B], which takes the place of the tokens' `value`
            (and the kernel's place: PyTorch advances the state then).
        backend: as of guided_sample.
        arguments: the others of guided_sample but for `positions`: numbers, or tensors on the
            device that hold for every replay (float32; integers of any width, top_k int32).
    """
    if choose_backend(backend, base) == "triton" and measure is None:
        check_device("base", base)
        from ivg_fast.triton_kernels import guided_sample as kernels

        optional = dict.fromkeys(("logit_rows", "banned_ids", "banned_until"))
        kernels.guided_sample(
            *(base, tuned, untuned),
            **{**optional, **arguments},
            positions=state.positions,
            step_state=state,
        )
        return
    drawn = guided_sample(
        *(base, tuned, untuned),
        **arguments,
        positions=state.positions,
        backend=backend,  # type: ignore[arg-type]
    )
    if measure is not None:
        drawn = drawn._replace(value=measure(drawn.token_ids))
    state.advance(drawn)
