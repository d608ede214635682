# SPDX-License-Identifier: Apache-2.0
"""A burst that the host starts and whose result it reads: what is between runs on the device, over
buffers that stay where they are."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ivg_fast.batches import Int64s
from ivg_fast.burst import Burst, BurstRunner, Group
from ivg_fast.first_forward import FirstForward, RoleRows
from ivg_fast.graphs import EagerStep, Step, StepMaker
from ivg_fast.models.runner import ModelRunner
from ivg_fast.models.values import TokenScorer
from ivg_fast.ops._sample_args import GuidedSample
from ivg_fast.ops.packed import upload
from ivg_fast.ops.step_state import RECORDS
from ivg_fast.params import EngineConfig
from ivg_fast.request import LiveRequest
from ivg_fast.static_forward import StaticForwards
from ivg_fast.static_key import RowsKey
from ivg_fast.static_rows import StaticRows

# Kinds of bursts whose buffers and graphs are kept; what was used longest ago gives way.
MAX_KEPT = 64
_VALUE = RECORDS.index("value")


class StaticBursts:
    """Makes the bursts of an engine: a BurstRunner's `make`.

    Args:
        runners: the models by role, on one device, with their pools.
        vocab_size: ids that all models share.
        token_scorer: measures first tokens, and values on a shared trunk.
        max_steps: of a burst.
        make_step: makes what is replayed of the `step` of something; None: on a GPU graphs,
            elsewhere eager steps.
        can_capture: False: no graphs.
        backend: of the ops.
    """

    def __init__(
        self,
        runners: Mapping[str, ModelRunner],
        vocab_size: int,
        token_scorer: TokenScorer,
        *,
        max_steps: int,
        make_step: Callable[[Any], Step] | None = None,
        can_capture: bool = True,
        backend: str = "auto",
    ) -> None:
        self._runners, self._vocab_size, self._scorer = runners, vocab_size, token_scorer
        self._max_steps, self._backend = max_steps, backend
        self._streams: Mapping[str, torch.cuda.Stream] = {}
        device = runners["base"].device
        if make_step is None and device.type == "cuda":
            maker = StepMaker(device, list(runners), can_capture=can_capture)
            self._streams = maker.streams

            def make_step(static: Any) -> Step:
                return maker(static.step)

        self._make_step = make_step or (lambda static: EagerStep(static.step))
        self._forwards = StaticForwards(runners, self._make_step, backend)
        self._kept: OrderedDict[RowsKey, tuple[StaticRows, Step | None]] = OrderedDict()
        for runner in runners.values():
            for pool in runner.pools:
                pool[:1].zero_()  # what pads read: finite, whatever was in that memory

    @classmethod
    def of_engine(
        cls,
        runners: Mapping[str, ModelRunner],
        vocab_size: int,
        token_scorer: TokenScorer,
        config: EngineConfig,
    ) -> StaticBursts | None:
        """Those of an engine on a GPU; None on the CPU, where the host looks at every step."""
        if runners["base"].device.type == "cpu":
            return None
        max_steps = config.max_burst_steps
        return cls(
            runners, vocab_size, token_scorer, max_steps=max_steps, can_capture=config.cuda_graphs
        )

    def __call__(
        self,
        owner: BurstRunner,
        plan: Any,
        requests: Sequence[LiveRequest],
        prefill: Sequence[LiveRequest],
    ) -> Burst:
        if not requests:
            return Burst(owner, plan, requests, prefill)  # prompts alone
        key = RowsKey.of_plan(plan, requests)
        rows, step = self._kept.pop(key, (None, None))
        if rows is None:
            rows = StaticRows(
                key,
                self._runners,
                self._scorer,
                self._vocab_size,
                max_steps=self._max_steps,
                streams=self._streams,
                backend=self._backend,
            )
        if step is None and plan.num_steps > 1:
            rows.fill(None, ())
            step = self._make_step(rows)
        self._kept[key] = rows, step
        if len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)
        return StaticBurst(owner, plan, requests, prefill, rows, step, self._forwards)


class StaticBurst(Burst):
    """One run over static rows. Nothing waits for the device until `decode` ends, which then goes
    through what was drawn as if it came step by step."""

    def __init__(
        self,
        owner: BurstRunner,
        plan: Any,
        requests: Sequence[LiveRequest],
        prefill: Sequence[LiveRequest],
        rows: StaticRows,
        step: Step | None,
        forwards: StaticForwards,
    ) -> None:
        self._forwards = forwards
        super().__init__(owner, plan, requests, prefill)
        self._rows, self._step = rows, step
        self._device = self.runners["base"].device
        self._row_of = rows.fill(plan, requests)
        self._measured: list[Int64s] = []  # samples with a first score on the device

    def _forward_first(self, prefill: Sequence[LiveRequest]) -> RoleRows:
        args = self.runners, self.plan, self.requests, prefill
        return FirstForward(*args, self._forwards).run()

    def _draw_group(self, group: Group, logits: dict[str, torch.Tensor]) -> None:
        begin = int(self._row_of[group.members[0]])
        segment = next(s for s in self._rows.segments if s.begin <= begin < s.end)
        logit_rows = upload(self._logit_rows(group), self._device)
        end = begin + len(group.members)
        self._rows.draw(segment, begin, end, list(logits.values()), logit_rows=logit_rows)

    def _keep_first(
        self, kind: str, members: Int64s, outputs: list[torch.Tensor], rows: Int64s
    ) -> None:
        measured, index = self._measure(kind, members, outputs, rows)
        self._rows.first_scores.index_copy_(0, index, measured)
        self._measured.append(members)

    def _measure_on_trunk(
        self, step: int, members: Int64s, states: torch.Tensor, rows: Int64s
    ) -> None:
        measured, index = self._measure("explicit", members, [states], rows)
        values = self._rows.state.records[_VALUE, step].view(torch.float32)
        values.index_copy_(0, index, measured)

    def _measure(
        self, kind: str, members: Int64s, outputs: list[torch.Tensor], rows: Int64s
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the first tokens of these members are worth, and their rows."""
        index = upload(self._row_of[members], self._device)
        tokens = self._rows.state.records[0, 0][index].long().clamp(min=0)
        of_output = upload(rows.astype(np.int64), self._device)
        return self.owner.token_scorer.measure(kind, outputs, of_output, tokens), index

    def decode(self) -> None:
        num_steps = len(self.result.tokens)
        for _ in range(1, num_steps):
            assert self._step is not None
            self._step.replay()
        records, first_scores = self._rows.read()
        for members in self._measured:
            self.set_first(members, first_scores.numpy()[self._row_of[members]].astype(np.float64))
        for step in range(num_steps):
            alive = np.flatnonzero(self.is_alive)
            if not len(alive):
                break
            if step:
                self.num_forwards[alive] += 1
            self.record(step, alive, _drawn(records[:, step, self._row_of[alive]]))

    def count(self) -> None:
        super().count()
        num_syncs = 0
        if self._step is not None:
            num_forwards = len(self.result.tokens) - 1 + bool(self.rows)  # the first one, too
            num_syncs = self._step.num_syncs * num_forwards
        for request in self.requests:
            request.stats.num_host_syncs += num_syncs


def _drawn(records: torch.Tensor) -> GuidedSample:
    """int32 [6, B] as it was drawn."""
    token_ids, *floats, valid = records
    logprob, base_logprob, reward, value = (plane.view(torch.float32) for plane in floats)
    return GuidedSample(token_ids, logprob, base_logprob, reward, value, valid.bool())
