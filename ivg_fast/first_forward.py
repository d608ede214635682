# SPDX-License-Identifier: Apache-2.0
"""The first, mixed forward of a burst: pieces of prompts, settled survivors, rows that go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ivg_fast.batches import Int64s, first_batch
from ivg_fast.models.batch import ForwardBatch, StepBatch
from ivg_fast.models.runner import ModelRunner
from ivg_fast.ops.packed import upload
from ivg_fast.request import ROLE_BIT, LiveRequest
from ivg_fast.static_forward import StaticForwards

# By role, which rows of the plan there are outputs for, ascending, and the outputs: logits, of the
# value role hidden states. "trunk" stands for those of `tuned` where a vocabulary head reads them.
RoleRows = dict[str, tuple[Int64s, torch.Tensor]]


def forward_trunk(
    runners: Mapping[str, ModelRunner], batch: ForwardBatch | StepBatch
) -> dict[str, torch.Tensor]:
    """The tuned model's logits and what the value's head reads on the trunk that they share."""
    trunk = runners["value"].network
    logits, states = runners["tuned"].forward_with_states(batch, trunk)
    return {"tuned": logits, "trunk": states}


def _forward_role(
    runners: Mapping[str, ModelRunner], role: str, is_trunk: bool, batch: ForwardBatch | StepBatch
) -> dict[str, torch.Tensor]:
    """What the role gives for the batch, by name."""
    if role == "value":
        return {role: runners[role].hidden(batch)}
    return forward_trunk(runners, batch) if is_trunk else {role: runners[role].forward(batch)}


class FirstForward:
    """Runs that forward for each role in turn.

    Args:
        runners: the models by role.
        plan: of Scheduler.plan().
        requests: those of plan.request_ids, in order.
        prefill: those of plan.prefill_request_ids; their `prompt_outputs` are set where a prompt
            has been read to its end.
        forwards: runs those without prompts; None: as any other.
    """

    def __init__(
        self,
        runners: Mapping[str, ModelRunner],
        plan: Any,
        requests: Sequence[LiveRequest],
        prefill: Sequence[LiveRequest],
        forwards: StaticForwards | None = None,
    ) -> None:
        self._runners = runners
        self._forwards = forwards
        self._plan = plan
        self._requests = requests
        self._prefill = prefill
        self._row_request: NDArray[np.int32] = plan.row_request
        self._rows: RoleRows = {}

    def run(self) -> RoleRows:
        """The forwards, a role at a time."""
        for role in self._runners:
            wanted = np.flatnonzero(self._plan.row_roles & ROLE_BIT[role])
            is_kept = self._is_kept(role, wanted)
            self._forward(role, wanted[~is_kept])
            if is_kept.any():
                self._rows[role] = (wanted, self._with_kept(role, wanted, is_kept))
        return self._rows

    def _forward(self, role: str, rows: Int64s) -> None:
        plan, prefill = self._plan, self._prefill
        begins, ends = plan.prefill_begin.tolist(), plan.prefill_end.tolist()
        prompts = {
            i: request.prompt_ids[role]
            for i, request in enumerate(prefill)
            if len(request.prompt_ids.get(role, ())) > begins[i]
        }
        if not prompts and not len(rows):
            return
        is_trunk = role == "tuned" and any(
            r.has_value_on_trunk for r in (*self._requests, *prefill)
        )

        forward = partial(_forward_role, self._runners, role, is_trunk)
        if self._forwards is not None and not prompts:
            outputs = self._forwards.run(
                role, forward, plan, self._requests, rows, is_trunk=is_trunk
            )
        else:
            device = self._runners[role].device
            outputs = forward(first_batch(plan, self._requests, role, prompts, rows, device))
        read = [i for i, prompt in prompts.items() if len(prompt) <= ends[i]]
        for name, output in outputs.items():
            for i, row in zip(read, output, strict=False):
                prefill[i].prompt_outputs[name] = row
            self._rows[name] = (rows, output[len(read) :])
        for i, prompt in prompts.items():
            counts = prefill[i].stats.prefill_tokens
            counts[role] = counts.get(role, 0) + min(len(prompt), ends[i]) - begins[i]
        numbers = np.bincount(self._row_request[rows], minlength=len(self._requests))
        for request, number in zip(self._requests, numbers.tolist(), strict=True):
            guides = role in request.step_roles
            counts = request.stats.decode_tokens if guides else request.stats.score_tokens
            if role in request.prompt_ids:
                counts[role] = counts.get(role, 0) + number

    def _is_kept(self, role: str, rows: Int64s) -> NDArray[np.bool_]:
        """Which of the role's rows end in a token that it has read already, to score it."""
        has_kept = [role == "tuned" and bool(r.kept_logits) for r in self._requests]
        return np.array(has_kept, bool)[self._row_request[rows]]

    def _with_kept(self, role: str, rows: Int64s, is_kept: NDArray[np.bool_]) -> torch.Tensor:
        """The logits of all rows: those that scoring kept, and those of this forward."""
        owners, slots = self._row_request[rows[is_kept]], self._plan.row_slot[rows[is_kept]]
        logits = torch.stack(
            [
                self._requests[i].kept_logits[slot]
                for i, slot in zip(owners.tolist(), slots.tolist(), strict=True)
            ]
        )
        if role in self._rows:
            logits = torch.cat([logits, self._rows[role][1]])
        # Where each row stands in that: the kept ones come first.
        return logits[upload(np.argsort(np.argsort(~is_kept, kind="stable")), logits.device)]
