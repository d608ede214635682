# SPDX-License-Identifier: Apache-2.0
"""The rows of a burst in device buffers that keep their addresses, and one decode step over them.

Rows stand in segments, one a kind of guidance, each filled up with pads to a bucket, so that few
shapes serve every batch and each is captured once. A role forwards one run of neighbouring rows:
the base all of them, a guide those that it guides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ivg_fast.batches import Int64s, prompt_lens
from ivg_fast.draws import padded
from ivg_fast.models.batch import StepBatch
from ivg_fast.models.runner import ModelRunner
from ivg_fast.models.values import TokenScorer
from ivg_fast.ops._backend import choose_backend
from ivg_fast.ops.packed import PackedArrays
from ivg_fast.ops.paged_plan import PagedPlan, WorkListOptions
from ivg_fast.ops.step_state import RECORDS, StepState, sample_step
from ivg_fast.request import GUIDES, LiveRequest
from ivg_fast.static_key import RowsKey, SegmentKey

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Segment:
    """A SegmentKey's rows [begin, end) and their arguments of sample_step."""

    key: SegmentKey
    begin: int
    end: int
    arguments: dict[str, Any]

    def arguments_of(self, begin: int, end: int) -> dict[str, Any]:
        """The same of the rows [begin, end), which are some of these."""
        rows = slice(begin - self.begin, end - self.begin)
        return {k: v[rows] if isinstance(v, Tensor) else v for k, v in self.arguments.items()}


class StaticRows:
    """Buffers for the bursts of one key, and their decode step.

    Args:
        key: what the buffers are for.
        runners: the models by role, on one device, with their pools.
        token_scorer: measures values on a trunk that `tuned` shares.
        vocab_size: ids that all models share.
        max_steps: L, the most tokens of a row in a burst.
        streams: by role, where its forward runs beside the others; empty: one after another.
        backend: of the ops.

    Attributes:
        state: what the steps advance.
        segments: in order.
        first_scores: float32 [rows] on the device, what scorers that do not guide make of the first
            tokens.
    """

    def __init__(
        self,
        key: RowsKey,
        runners: Mapping[str, ModelRunner],
        token_scorer: TokenScorer,
        vocab_size: int,
        *,
        max_steps: int,
        streams: Mapping[str, torch.cuda.Stream],
        backend: str,
    ) -> None:
        self.key, self.backend = key, backend
        self._runners, self._scorer, self._vocab_size = runners, token_scorer, vocab_size
        self._streams = streams
        device = runners["base"].device
        n, width, stops = key.num_rows, key.table_width, key.num_stops
        i32, i64, f32 = torch.int32, torch.int64, torch.float32
        self._spans = _spans(key)
        specs: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            **dict.fromkeys(("input_ids", "seeds", "candidate_ids", "banned_until"), ((n,), i64)),
            "model_positions": ((len(self._spans), n), i64),
            "stop_ids": ((n, stops), i64),
            **dict.fromkeys(("positions", "slot_mapping", "prompt_blocks"), ((n,), i32)),
            **dict.fromkeys(("first_positions", "limits", "top_k"), ((n,), i32)),
            "block_table": ((n, width), i32),
            **dict.fromkeys(("weight", "temperature", "top_p", "min_p"), ((n,), f32)),
        }
        self._packed = PackedArrays(device, specs)
        views = self._packed.views
        # One tensor, and so one copy to the host: the records, and the first scores in a row.
        self._results = torch.zeros(len(RECORDS) + 1, max_steps, n, dtype=i32, device=device)
        self.first_scores = self._results[-1, 0].view(f32)
        names = [name for name in StepState.__slots__ if name != "records"]
        self.state = StepState(
            **{name: views[name] for name in names}, records=self._results[: len(RECORDS)]
        )
        self.segments = [
            Segment(segment, begin, begin + segment.num_rows, self._arguments(segment, begin))
            for segment, begin in zip(key.segments, _begins(key), strict=True)
        ]
        self._batches = {role: self._batch(role) for role in self._spans}
        self.fill(None, ())

    def _arguments(self, segment: SegmentKey, begin: int) -> dict[str, Any]:
        views, rows = self._packed.views, slice(begin, begin + segment.num_rows)
        arguments: dict[str, Any] = {
            name: views[name][rows] for name in ("seeds", "candidate_ids", "weight", "temperature")
        }
        filters = {
            "top_k": (segment.has_top_k, 0),
            "top_p": (segment.has_top_p, 1.0),
            "min_p": (segment.has_min_p, 0.0),
        }
        for name, (is_used, off) in filters.items():
            arguments[name] = views[name][rows] if is_used else off
        if segment.has_bans:
            arguments["banned_ids"] = views["stop_ids"][rows]
            arguments["banned_until"] = views["banned_until"][rows]
        return arguments

    def _batch(self, role: str) -> StepBatch:
        begin, end = self._spans[role]
        state, runner = self.state.rows(begin, end), self._runners[role]
        options = WorkListOptions()
        is_triton = choose_backend(self.backend, state.slot_mapping) == "triton"
        can_share = is_triton and end - begin >= options.min_shared_rows
        plan = PagedPlan(
            runner.device,
            num_rows=end - begin,
            num_tokens=end - begin,
            table_width=self.key.table_width,
            tile_tokens=runner.tile_tokens if can_share else 1,
            options=options,
            response_lens=state.positions,
        )
        position_ids = state.model_positions[list(self._spans).index(role)]
        return StepBatch(
            input_ids=state.input_ids.view(1, -1),
            position_ids=position_ids.view(1, -1),
            slot_mapping=state.slot_mapping,
            plan=plan,
            backend=self.backend,
        )

    # --- a burst's rows ----------------------------------------------------------------------

    def fill(self, plan: Any, requests: Sequence[LiveRequest]) -> Int64s:
        """Puts a burst's samples in, ready for their first draw; None: nothing but pads.

        Does not wait for the device.

        Returns:
            The row of each sample.
        """
        n = self.key.num_rows
        arrays: Arrays = {
            "slot_mapping": np.full(n, -1, np.int32),
            "stop_ids": np.full((n, self.key.num_stops), -1, np.int64),
            "temperature": np.ones(n, np.float32),
            "top_p": np.ones(n, np.float32),
            "positions": np.zeros(n, np.int32),
            "prompt_blocks": np.zeros(n, np.int32),
            "block_table": np.zeros((n, self.key.table_width), np.int32),
        }
        # A pad has a key, slot 0 of block 0, as attention wants one; nobody reads what it gives.
        lens = {role: np.ones(n, np.int32) for role in self._spans}
        longest = np.zeros(n, np.int32)
        rows = np.empty(0, np.int64)
        if plan is not None:
            rows = self._rows_of(plan, requests)
            self._fill_samples(arrays, plan, requests, rows)
            longest[rows] = plan.sample_position + np.maximum(plan.sample_steps - 1, 0)
            for role, of_role in lens.items():
                of_request = prompt_lens(requests, role)
                of_role[rows] = np.maximum(of_request[plan.sample_request], 1)
            arrays["model_positions"] = np.zeros((len(lens), n), np.int64)
            for index, of_role in enumerate(lens.values()):
                # Of the token before the first one to be drawn: the draw moves it on.
                positions = of_role[rows] + plan.sample_position - 1
                arrays["model_positions"][index, rows] = positions
        self._packed.fill(arrays)
        for role, (begin, end) in self._spans.items():
            some = slice(begin, end)
            self._batches[role].plan.update(
                block_table=arrays["block_table"][some],
                query_start_loc=np.arange(end - begin + 1, dtype=np.int32),
                prompt_lens=lens[role][some],
                response_lens=arrays["positions"][some],
                response_block_start=np.maximum(arrays["prompt_blocks"][some], 1),
                longest_response_lens=longest[some],
            )
        return rows

    def _rows_of(self, plan: Any, requests: Sequence[LiveRequest]) -> Int64s:
        guidance = np.array([request.params.guidance for request in requests])
        of_sample = guidance[plan.sample_request]
        rows = np.empty(len(of_sample), np.int64)
        for segment in self.segments:
            mine = of_sample == segment.key.guidance
            rows[mine] = segment.begin + np.arange(mine.sum())
        return rows

    def _fill_samples(
        self, arrays: Arrays, plan: Any, requests: Sequence[LiveRequest], rows: Int64s
    ) -> None:
        of = plan.sample_request
        params = [request.params for request in requests]

        def put(name: str, values: NDArray[Any]) -> None:
            if name not in arrays:
                arrays[name] = np.zeros(self.key.num_rows, values.dtype)
            arrays[name][rows] = values

        def each(field: str) -> NDArray[Any]:
            return np.array([getattr(p, field) for p in params])[of]

        put("slot_mapping", np.zeros(len(of), np.int32))  # no pads; the first draw says where to
        put("positions", plan.sample_position)
        put("first_positions", plan.sample_position)
        put("limits", plan.sample_steps)
        put("prompt_blocks", plan.prompt_blocks[of])
        put("seeds", plan.sample_seed)
        put("candidate_ids", plan.sample_candidate)
        put("weight", each("guidance_weight"))
        for name in ("temperature", "top_p", "min_p"):
            put(name, each(name))
        put("top_k", np.array([min(p.top_k, self._vocab_size) for p in params])[of])
        put("banned_until", np.array([min(p.min_tokens, 2**31) for p in params])[of])
        stops = padded([request.stop_ids for request in requests])
        arrays["stop_ids"][rows, : stops.shape[1]] = stops[of]
        arrays["block_table"][rows, : plan.table_width] = plan.sample_tables

    # --- steps -------------------------------------------------------------------------------

    def step(self) -> None:
        """One decode step of every row: forwards, draws, the state moved on. Nothing is read by the
        host where the ops run on a GPU."""
        outputs = self._forward()
        for segment in self.segments:
            begin, end = segment.begin, segment.end
            logits = []
            for role in ("base", *GUIDES[segment.key.guidance]):
                first = self._spans[role][0]
                logits.append(outputs[role][begin - first : end - first])
            self.draw(segment, begin, end, logits, states=outputs.get("trunk"))

    def draw(
        self,
        segment: Segment,
        begin: int,
        end: int,
        logits: Sequence[Tensor],
        *,
        states: Tensor | None = None,
        logit_rows: Tensor | None = None,
    ) -> None:
        """Draws for the rows [begin, end) of the segment from the logits of base and guides."""
        arguments = segment.arguments_of(begin, end)
        if logit_rows is not None:
            arguments["logit_rows"] = logit_rows
        measure = None
        if segment.key.has_value_on_trunk and states is not None:

            def measure(tokens: Tensor) -> Tensor:
                return self._scorer.measure("explicit", [states], None, tokens.clamp(min=0))

        base, *guides = (of_role[:, : self._vocab_size] for of_role in logits)
        tuned, untuned = (*guides, None, None)[:2]
        state = self.state.rows(begin, end)
        sample_step(base, tuned, untuned, state, measure=measure, backend=self.backend, **arguments)

    def _forward(self) -> dict[str, Tensor]:
        """Each role's logits of its rows; under "trunk" what the value's head reads of them."""
        outputs: dict[str, Tensor] = {}
        streams = {role: s for role, s in self._streams.items() if role in self._batches}
        main: Any = torch.cuda.current_stream() if streams else None
        for stream in streams.values():
            stream.wait_stream(main)
        for role, batch in self._batches.items():
            with torch.cuda.stream(streams.get(role)):  # None: where we are
                self._forward_role(role, batch, outputs)
        for stream in streams.values():
            main.wait_stream(stream)
        return outputs

    def _forward_role(self, role: str, batch: StepBatch, outputs: dict[str, Tensor]) -> None:
        runner = self._runners[role]
        if role == "tuned" and any(s.has_value_on_trunk for s in self.key.segments):
            trunk = self._runners["value"].network
            outputs["tuned"], outputs["trunk"] = runner.forward_with_states(batch, trunk)
        else:
            outputs[role] = runner.forward(batch)

    # --- afterwards --------------------------------------------------------------------------

    def read(self) -> tuple[Tensor, Tensor]:
        """Waits for the device: the records, int32 [6, L, rows], and first_scores, on the host."""
        host = self._results.cpu()
        return host[: len(RECORDS)], host[-1, 0].view(torch.float32)

    @property
    def buffers(self) -> list[Tensor]:
        """Everything that a captured step reads or writes and that lives on between its replays."""
        plans = [batch.plan for batch in self._batches.values()]
        return [
            *(getattr(self.state, name) for name in StepState.__slots__),
            *(tensor for batch in self._batches.values() for tensor in _tensors(batch)),
            *(tensor for plan in plans for tensor in _tensors(plan)),
        ]


def _tensors(holder: Any) -> list[Tensor]:
    names = getattr(holder, "__slots__", None) or vars(holder)
    values = [getattr(holder, name) for name in names]
    return [value for value in values if isinstance(value, Tensor)]


def _begins(key: RowsKey) -> list[int]:
    ends = np.cumsum([segment.num_rows for segment in key.segments]).tolist()
    return [0, *ends[:-1]]


def _spans(key: RowsKey) -> dict[str, tuple[int, int]]:
    """The rows [begin, end) that each role forwards."""
    spans = {"base": (0, key.num_rows)}
    for segment, begin in zip(key.segments, _begins(key), strict=True):
        for role in GUIDES[segment.guidance]:
            spans[role] = (begin, begin + segment.num_rows)
    return spans
