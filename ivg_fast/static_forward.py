# SPDX-License-Identifier: Apache-2.0
"""The first forward of a burst without prompts, one token a row, over buffers that stay where they
are: a graph a role, as the decode steps have."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ivg_fast.batches import Int64s, prompt_lens
from ivg_fast.graphs import Step
from ivg_fast.models.batch import StepBatch
from ivg_fast.models.runner import ModelRunner
from ivg_fast.ops._backend import choose_backend
from ivg_fast.ops.packed import PackedArrays
from ivg_fast.ops.paged_plan import PagedPlan, WorkListOptions
from ivg_fast.request import LiveRequest
from ivg_fast.static_key import bucket, power_of_two

# Shapes whose buffers and graphs are kept, over all roles.
MAX_KEPT = 128

Forward = Callable[[StepBatch], dict[str, Tensor]]


class StaticForward:
    """Up to `num_rows` rows of a role, and what its forward gives for them.

    Args:
        forward: what a step runs.
        runner: whose pools it uses.
        num_rows, table_width: room for rows and their blocks.
        backend: of the ops.

    Attributes:
        outputs: by name, made by the first step; the rows of the last one.
    """

    def __init__(
        self, forward: Forward, runner: ModelRunner, num_rows: int, table_width: int, backend: str
    ) -> None:
        self._forward, self._num_rows, self._width = forward, num_rows, table_width
        one = (num_rows,)
        self._packed = PackedArrays(
            runner.device,
            {
                "input_ids": (one, torch.int64),
                "position_ids": (one, torch.int64),
                "slot_mapping": (one, torch.int32),
            },
        )
        options = WorkListOptions()
        views = self._packed.views
        is_triton = choose_backend(backend, views["slot_mapping"]) == "triton"
        can_share = is_triton and num_rows >= options.min_shared_rows
        plan = PagedPlan(
            runner.device,
            num_rows=num_rows,
            num_tokens=num_rows,
            table_width=table_width,
            tile_tokens=runner.tile_tokens if can_share else 1,
            options=options,
        )
        self.batch = StepBatch(
            input_ids=views["input_ids"].view(1, -1),
            position_ids=views["position_ids"].view(1, -1),
            slot_mapping=views["slot_mapping"],
            plan=plan,
            backend=backend,
        )
        self.outputs: dict[str, Tensor] = {}
        none = np.empty(0, np.int32)
        self.fill(none, none, none, none, none, none, np.zeros((0, table_width), np.int32))

    def fill(
        self,
        tokens: np.ndarray,
        prompts: np.ndarray,
        positions: np.ndarray,
        slots: np.ndarray,
        block_start: np.ndarray,
        response_lens: np.ndarray,
        tables: np.ndarray,
    ) -> None:
        """Puts rows in, without waiting for the device; the rest are pads. `positions` of the
        tokens in the role's sequence, the others as of ForwardBatch."""
        n, missing = self._num_rows, self._num_rows - len(tokens)

        def padded(values: np.ndarray, pad: int) -> np.ndarray:
            return np.pad(values, (0, missing), constant_values=pad).astype(np.int32)

        self._packed.fill(
            {
                "input_ids": tokens,
                "position_ids": positions,
                "slot_mapping": padded(slots, -1),
            }
        )
        table = np.zeros((n, self._width), np.int32)
        table[: len(tokens), : tables.shape[1]] = tables
        # A pad has a key, slot 0 of block 0, as attention wants one; nobody reads what it gives.
        self.batch.plan.update(
            block_table=table,
            query_start_loc=np.arange(n + 1, dtype=np.int32),
            prompt_lens=padded(prompts, 1),
            response_lens=padded(response_lens, 0),
            response_block_start=padded(block_start, 1),
        )

    def step(self) -> None:
        """The forward. Its outputs go to buffers of their own: what a graph makes in the memory
        that graphs share lasts until another one runs."""
        for name, output in self._forward(self.batch).items():
            if name not in self.outputs:
                self.outputs[name] = torch.empty_like(output)
            self.outputs[name].copy_(output)


class StaticForwards:
    """The static forwards of an engine, by role and shape.

    Args:
        runners: the models by role.
        make_step: makes what is replayed.
        backend: of the ops.
    """

    def __init__(
        self,
        runners: Mapping[str, ModelRunner],
        make_step: Callable[[Any], Step],
        backend: str,
    ) -> None:
        self._runners, self._make_step, self._backend = runners, make_step, backend
        self._kept: OrderedDict[tuple[str, bool, int, int], tuple[StaticForward, Step]] = (
            OrderedDict()
        )

    def run(
        self,
        role: str,
        forward: Forward,
        plan: Any,
        requests: Sequence[LiveRequest],
        rows: Int64s,
        *,
        is_trunk: bool,
    ) -> dict[str, Tensor]:
        """What `forward` gives for these rows of the plan, until the next call for the role.

        Args:
            role: whose forward it is; with `is_trunk` one that gives the trunk's states too.
            forward: the same for equal (role, is_trunk).
            plan: of Scheduler.plan().
            requests: those of plan.request_ids.
            rows: indices of the plan's rows.
        """
        key = role, is_trunk, bucket(len(rows)), power_of_two(plan.table_width)
        entry = self._kept.pop(key, None)
        if entry is None:
            static = StaticForward(forward, self._runners[role], *key[2:], self._backend)
            entry = static, self._make_step(static)
        self._kept[key] = entry
        if len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)
        static, step = entry
        of_request, position = plan.row_request[rows], plan.row_position[rows]
        prompts = prompt_lens(requests, role)[of_request]
        static.fill(
            plan.row_token[rows],
            prompts,
            prompts + position,
            plan.row_slot[rows],
            plan.prompt_blocks[of_request],
            position + 1,
            plan.row_tables[rows],
        )
        step.replay()
        return {name: output[: len(rows)] for name, output in static.outputs.items()}
