# SPDX-License-Identifier: Apache-2.0
"""Runs one burst: the first, mixed forward (prompts, settled survivors, rows that go on), the
fork's copies, then the decode steps until the next look of the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ivg_fast.errors import NonFiniteLogitsError
from ivg_fast.models.batch import BLOCK_SIZE, ForwardBatch
from ivg_fast.models.runner import ModelRunner
from ivg_fast.ops.guided_sample import GuidedSample, guided_sample
from ivg_fast.ops.token_logprobs import pair_token_logprobs
from ivg_fast.params import GUIDANCE_KINDS
from ivg_fast.request import (
    FINISH_NONE,
    FINISH_STOP,
    FINISH_STOP_TEXT,
    GUIDES,
    ROLE_BIT,
    LiveRequest,
    find_stop,
    score_roles,
)

Int32s = NDArray[np.int32]
Int64s = NDArray[np.int64]


@dataclass(slots=True)
class _Group:
    """Samples [begin, end) whose logits stand in one matrix a role: requests [first, last) of a
    plan.

    `is_from_prompt`: the rows are the prompts' last logits, else rows of this burst's first
    forward.
    """

    guidance: str
    is_from_prompt: bool
    first: int
    last: int
    begin: int
    end: int


@dataclass(slots=True)
class BurstResult:
    """What was drawn, [num_steps, B] each; a candidate's columns count up to num_tokens."""

    tokens: Int32s
    logprobs: NDArray[np.float32]
    base_logprobs: NDArray[np.float32]
    rewards: NDArray[np.float32]
    values: NDArray[np.float32]
    num_tokens: Int32s
    finish: NDArray[np.uint8]
    stop_index: Int32s

    @classmethod
    def empty(cls, num_steps: int, num_samples: int) -> BurstResult:
        shape = (num_steps, num_samples)
        floats = [np.zeros(shape, np.float32) for _ in range(4)]
        return cls(
            np.zeros(shape, np.int32),
            *floats,
            num_tokens=np.zeros(num_samples, np.int32),
            finish=np.zeros(num_samples, np.uint8),
            stop_index=np.full(num_samples, -1, np.int32),
        )


class BurstRunner:
    """The device side of Scheduler.plan(): everything between plan() and commit_tokens().

    Args:
        runners: the models by role.
        vocab_size: ids that all models share; wider logits are cut to it.
        copy_blocks: copies (src, dst) block pairs, int32 [N, 2], in every pool of every role.
        tokenizer: for stop strings; None where there are none.
    """

    def __init__(
        self,
        runners: Mapping[str, ModelRunner],
        vocab_size: int,
        copy_blocks: Callable[[Int32s], None],
        tokenizer: Any,
    ) -> None:
        self._runners = runners
        self._vocab_size = vocab_size
        self._copy_blocks = copy_blocks
        self._tokenizer = tokenizer

    def run(
        self,
        plan: Any,
        requests: Sequence[LiveRequest],
        prefill: Sequence[LiveRequest],
        history: Callable[[int, int], Int32s],
    ) -> BurstResult:
        """Executes the plan.

        Args:
            plan: of Scheduler.plan().
            requests: those of plan.request_ids, in order.
            prefill: those of plan.prefill_request_ids, in order.
            history: tokens of a candidate before this burst, by request id and candidate id.

        Returns:
            The samples. A request whose logits no token can be drawn from has its `error` set.
        """
        return _Burst(self, plan, requests).run(prefill, history)


class _Burst:
    """One run; holds the plan's arrays and what has been drawn so far."""

    def __init__(self, owner: BurstRunner, plan: Any, requests: Sequence[LiveRequest]) -> None:
        self.runners = owner._runners
        self.vocab_size = owner._vocab_size
        self.copy_blocks = owner._copy_blocks
        self.tokenizer = owner._tokenizer
        self.plan = plan
        self.requests = requests
        self.num_steps = plan.num_steps
        self.request_of: Int32s = plan.sample_request
        self.row_request: Int32s = plan.row_request
        self.sample_row: Int32s = plan.sample_row
        self.candidates: Int32s = plan.sample_candidate
        self.first_position: Int32s = plan.sample_position
        self.seeds: Int64s = plan.sample_seed
        self.limits: Int32s = plan.sample_steps
        self.prompt_blocks: Int32s = plan.prompt_blocks
        self.num_samples = len(self.request_of)
        self.result = BurstResult.empty(self.num_steps, self.num_samples)
        self.is_alive = np.ones(self.num_samples, bool)
        self.num_forwards = np.zeros(self.num_samples, np.int64)
        self.prompt_lens = {
            role: np.array([len(r.prompt_ids.get(role, ())) for r in requests], np.int32)
            for role in self.runners
        }
        self.stop_ids = _padded([r.stop_ids for r in requests])[self.request_of]
        # Rows of the first forward by role, and its outputs for them.
        self.rows: dict[str, tuple[Int64s, torch.Tensor]] = {}

    def run(
        self, prefill: Sequence[LiveRequest], history: Callable[[int, int], Int32s]
    ) -> BurstResult:
        self._forward_first(prefill)
        if len(self.plan.copies):
            self._copy_of_fork()
        groups = list(self._groups())
        for group in groups:
            self._sample_first(group)
        for group in groups:
            self._measure_first(group)
        self._decode()
        for request in self.requests:
            request.prompt_outputs.clear()
        self._hold_prompts(prefill)
        self._find_stop_strings(history)
        self._keep_values()
        self._count()
        return self.result

    def _copy_of_fork(self) -> None:
        self.copy_blocks(self.plan.copies)

    # --- the first forward -----------------------------------------------------------------------

    def _forward_first(self, prefill: Sequence[LiveRequest]) -> None:
        for role, runner in self.runners.items():
            fresh = [i for i, request in enumerate(prefill) if role in request.prompt_ids]
            rows = np.flatnonzero(self.plan.row_roles & ROLE_BIT[role])
            if not fresh and not len(rows):
                continue
            batch = self._first_batch(
                role, [prefill[i].prompt_ids[role] for i in fresh], fresh, rows
            )
            outputs = runner.hidden(batch) if role == "value" else runner.forward(batch)
            for i, output in zip(fresh, outputs, strict=False):
                prefill[i].prompt_outputs[role] = output
                prefill[i].stats.prefill_tokens[role] = len(prefill[i].prompt_ids[role])
            self.rows[role] = (rows, outputs[len(fresh) :])

    def _first_batch(
        self, role: str, prompts: list[Int64s], fresh: list[int], rows: Int64s
    ) -> ForwardBatch:
        """Whole prompts, then one token of each row."""
        plan = self.plan
        lens = np.array([len(prompt) for prompt in prompts], np.int32)
        tables = plan.prefill_tables[fresh]
        slots = [_slots(table, np.arange(n)) for table, n in zip(tables, lens, strict=True)]
        of_request = self.row_request[rows]
        position = plan.row_position[rows]
        row_prompt = self.prompt_lens[role][of_request]
        ends = np.concatenate([np.cumsum(lens), lens.sum() + np.arange(1, len(rows) + 1)])
        zeros = np.zeros(len(fresh), np.int32)
        return ForwardBatch.from_host(
            input_ids=np.concatenate([*prompts, plan.row_token[rows]]),
            position_ids=np.concatenate([*(np.arange(n) for n in lens), row_prompt + position]),
            slot_mapping=np.concatenate([*slots, plan.row_slot[rows]]),
            query_start_loc=np.concatenate([[0], ends]),
            prompt_lens=np.concatenate([lens, row_prompt]),
            response_lens=np.concatenate([zeros, position + 1]),
            response_block_start=np.concatenate(
                [-(-lens // BLOCK_SIZE), self.prompt_blocks[of_request]]
            ),
            block_table=np.concatenate([tables, plan.row_tables[rows]]),
            logit_positions=ends - 1,
            num_fresh_prompts=len(fresh),
        )

    def _hold_prompts(self, prefill: Sequence[LiveRequest]) -> None:
        """Prompts that wait for their cohort keep their last outputs, not the batch's."""
        for request in prefill:
            for role, output in request.prompt_outputs.items():
                request.prompt_outputs[role] = output.clone()

    # --- the first tokens ------------------------------------------------------------------------

    def _groups(self) -> Iterator[_Group]:
        """Requests of equal guidance stand together, those that start from a prompt last."""
        first = begin = end = 0
        key = None
        for index, request in enumerate(self.requests):
            this = (request.params.guidance, bool(self.sample_row[end] < 0))
            if key is not None and this != key:
                yield _Group(*key, first, index, begin, end)
                first, begin = index, end
            key = this
            end += int(self.plan.num_samples[index])
        if key is not None:
            yield _Group(*key, first, len(self.requests), begin, end)

    def _first_outputs(self, group: _Group, role: str) -> torch.Tensor:
        """The role's outputs that the group's samples draw from, one row each of `_logit_rows`."""
        if group.is_from_prompt:
            members = self.requests[group.first : group.last]
            return torch.stack([request.prompt_outputs[role] for request in members])
        rows, outputs = self.rows[role]
        a, b = np.searchsorted(rows, self._row_range(group))
        return outputs[a:b]

    def _row_range(self, group: _Group) -> NDArray[np.intp]:
        return np.searchsorted(self.row_request, [group.first, group.last])

    def _logit_rows(self, group: _Group) -> Int32s:
        if group.is_from_prompt:
            return self.request_of[group.begin : group.end] - group.first
        first_row = int(self._row_range(group)[0])
        return self.sample_row[group.begin : group.end] - first_row

    def _sample_first(self, group: _Group) -> None:
        members = np.arange(group.begin, group.end)
        outputs = {
            role: self._as_logits(role, self._first_outputs(group, role))
            for role in ("base", *GUIDES[group.guidance])
        }
        arguments = self._sampling(members)
        arguments["logit_rows"] = self._logit_rows(group)
        self._draw(0, members, group.guidance, outputs, arguments)

    def _measure_first(self, group: _Group) -> None:
        """What a scorer that does not guide thinks of the first tokens: only these outputs tell."""
        logit_rows = self._logit_rows(group)
        tokens = torch.from_numpy(self.result.tokens[0, group.begin : group.end].astype(np.int64))
        for guidance in ("implicit", "explicit"):
            roles = GUIDES[guidance]
            wanted = np.array(
                [score_roles(r.params) == roles for r in self.requests[group.first : group.last]]
            )
            settle = 0 if group.is_from_prompt else ROLE_BIT[roles[0]]
            mine = wanted[self.request_of[group.begin : group.end] - group.first]
            if settle:  # rows in the middle of a chunk have no first token to measure
                rows = self.sample_row[group.begin : group.end]
                mine &= (self.plan.row_roles[rows] & settle) != 0
            if not mine.any():
                continue
            which = np.flatnonzero(mine)
            if group.is_from_prompt:
                members = [
                    r
                    for r, w in zip(self.requests[group.first : group.last], wanted, strict=True)
                    if w
                ]
                outputs = [torch.stack([r.prompt_outputs[role] for r in members]) for role in roles]
                picked = np.cumsum(wanted)[logit_rows[which]] - 1
            else:
                own_rows, _ = self.rows[roles[0]]
                outputs = [self.rows[role][1] for role in roles]
                picked = np.searchsorted(own_rows, self.sample_row[group.begin + which])
            scores = self.token_scores(guidance, outputs, picked, tokens[which]).numpy()
            for sample, score in zip((which + group.begin).tolist(), scores.tolist(), strict=True):
                request = self.requests[self.request_of[sample]]
                request.first_scores[self.candidates[sample]] = score

    def token_scores(
        self,
        guidance: str,
        outputs: list[torch.Tensor],
        rows: NDArray[np.integer],
        tokens: torch.Tensor,
    ) -> torch.Tensor:
        return token_scores(
            self.runners,
            self.vocab_size,
            guidance,
            outputs,
            torch.from_numpy(rows.astype(np.int64)),
            tokens,
        )

    def _as_logits(self, role: str, outputs: torch.Tensor) -> torch.Tensor:
        if role == "value":
            outputs = self.runners[role].model.score_head(outputs)
        return outputs[:, : self.vocab_size]

    # --- drawing ---------------------------------------------------------------------------------

    def _sampling(self, members: Int64s) -> dict[str, Any]:
        """guided_sample's arguments of these samples but the logits and positions."""
        of_request = self.request_of[members]
        requests = [self.requests[i] for i in np.unique(of_request).tolist()]
        arguments: dict[str, Any] = {
            "seeds": self.seeds[members],
            "candidate_ids": self.candidates[members],
        }
        for argument, name in _SAMPLING_FIELDS:
            values = {getattr(request.params, name) for request in requests}
            if len(values) == 1:
                arguments[argument] = values.pop()
            else:
                each = np.array([getattr(r.params, name) for r in self.requests])
                arguments[argument] = each[of_request]
        if any(request.params.min_tokens for request in requests):
            arguments["banned_ids"] = self.stop_ids[members]
            until = np.array([r.params.min_tokens for r in self.requests], np.int64)
            arguments["banned_until"] = until[of_request]
        return arguments

    def _draw(
        self,
        step: int,
        members: Int64s,
        guidance: str,
        outputs: dict[str, torch.Tensor],
        arguments: dict[str, Any],
    ) -> None:
        guides = [outputs[role] for role in GUIDES[guidance]]
        drawn = guided_sample(
            outputs["base"], *guides, positions=self.first_position[members] + step, **arguments
        )
        self._record(step, members, drawn)

    def _record(self, step: int, members: Int64s, drawn: GuidedSample) -> None:
        result = self.result
        tokens = drawn.token_ids.numpy()
        result.tokens[step, members] = tokens
        result.logprobs[step, members] = drawn.logprob.numpy()
        result.base_logprobs[step, members] = drawn.base_logprob.numpy()
        result.rewards[step, members] = drawn.implicit_reward.numpy()
        result.values[step, members] = drawn.value.numpy()
        result.num_tokens[members] = step + 1
        is_stop = (tokens[:, None] == self.stop_ids[members]).any(1)
        result.finish[members[is_stop]] = FINISH_STOP
        self.is_alive[members] = ~is_stop & (self.limits[members] > step + 1)
        valid = drawn.valid.numpy()
        if not valid.all():
            self._fail(step, members[~valid])

    def _fail(self, step: int, samples: Int64s) -> None:
        for sample in samples.tolist():
            index = int(self.request_of[sample])
            request = self.requests[index]
            position = int(self.first_position[sample]) + step
            request.error = request.error or NonFiniteLogitsError(
                f"no token can be drawn for response token {position} of candidate "
                f"{int(self.candidates[sample])}: the logits hold NaN or +inf, or nothing finite"
            )
            mine = self.request_of == index
            self.is_alive[mine] = False
            self.result.finish[mine] = FINISH_NONE
            self.result.num_tokens[mine] = 0

    # --- the decode steps ------------------------------------------------------------------------

    def _decode(self) -> None:
        rows: dict[str, _DecodeRows] = {}
        members = np.empty(0, np.int64)
        for step in range(1, self.num_steps):
            alive = np.flatnonzero(self.is_alive)
            if not len(alive):
                return
            if len(alive) != len(members):  # the living only become fewer
                members = alive
                rows = {role: _DecodeRows(self, role, members) for role in self.runners}
                kinds = self._kinds(members)
            outputs = {
                role: self._as_output(role, of_role.batch(self, step))
                for role, of_role in rows.items()
                if len(of_role.members)
            }
            self.num_forwards[members] += 1
            for guidance, mine, arguments in kinds:
                logits = {"base": outputs["base"][_span(members, mine)]}
                for role in GUIDES[guidance]:
                    logits[role] = outputs[role][_span(rows[role].members, mine)]
                self._draw(step, mine, guidance, logits, arguments)

    def _as_output(self, role: str, batch: ForwardBatch) -> torch.Tensor:
        return self.runners[role].forward(batch)[:, : self.vocab_size]

    def _kinds(self, members: Int64s) -> list[tuple[str, Int64s, dict[str, Any]]]:
        kind_of = np.array([GUIDANCE_KINDS.index(r.params.guidance) for r in self.requests])
        of_sample = kind_of[self.request_of[members]]
        kinds = []
        for kind in np.unique(of_sample).tolist():
            mine = members[of_sample == kind]
            kinds.append((GUIDANCE_KINDS[kind], mine, self._sampling(mine)))
        return kinds

    # --- afterwards ------------------------------------------------------------------------------

    def _find_stop_strings(self, history: Callable[[int, int], Int32s]) -> None:
        with_stops = [bool(request.params.stop) for request in self.requests]
        if not any(with_stops):
            return
        result = self.result
        for sample in np.flatnonzero(np.array(with_stops)[self.request_of]).tolist():
            request = self.requests[self.request_of[sample]]
            if request.error is not None:
                continue
            old = history(request.request_id, int(self.candidates[sample])).tolist()
            new = result.tokens[: result.num_tokens[sample], sample].tolist()
            p = request.params
            found = find_stop(self.tokenizer, old + new, len(old), p.stop, p.min_tokens)
            if found is None or (
                result.finish[sample] == FINISH_STOP and found[0] == len(old) + len(new)
            ):
                continue  # the stop token itself came no later than the string
            result.num_tokens[sample] = found[0] - len(old)
            result.finish[sample] = FINISH_STOP_TEXT
            result.stop_index[sample] = found[1]

    def _count(self) -> None:
        """Adds what was forwarded to each request's counters."""
        num_requests = len(self.requests)
        decoded = np.bincount(self.request_of, self.num_forwards, num_requests).astype(int).tolist()
        for role, (rows, _) in self.rows.items():
            first = np.bincount(self.row_request[rows], minlength=num_requests).tolist()
            for request, number in zip(self.requests, first, strict=True):
                counts = request.stats.score_tokens
                if role in request.step_roles:
                    counts = request.stats.decode_tokens
                if role in request.prompt_ids:
                    counts[role] = counts.get(role, 0) + number
        for request, number in zip(self.requests, decoded, strict=True):
            counts = request.stats.decode_tokens
            for role in request.step_roles:
                counts[role] = counts.get(role, 0) + number

    def _keep_values(self) -> None:
        """The guiding value model's score of each candidate's last token is its chunk score."""
        wanted = [r.params.guidance == r.params.scorer == "explicit" for r in self.requests]
        result = self.result
        for sample in np.flatnonzero(np.array(wanted)[self.request_of]).tolist():
            request = self.requests[self.request_of[sample]]
            last = max(int(result.num_tokens[sample]) - 1, 0)
            request.last_values[self.candidates[sample]] = result.values[last, sample]


class _DecodeRows:
    """One role's rows while the living stay the same: what does not change from step to step."""

    def __init__(self, burst: _Burst, role: str, members: Int64s) -> None:
        takes_part = np.array([role in request.step_roles for request in burst.requests])
        self.members = members = members[takes_part[burst.request_of[members]]]
        of_request = burst.request_of[members]
        prompt_lens = burst.prompt_lens[role][of_request]
        # The token drawn at step s - 1 is forwarded at step s: response index first_position + s -
        # 1.
        self.response_lens = torch.from_numpy(burst.first_position[members])
        self.positions = torch.from_numpy(
            (prompt_lens + burst.first_position[members] - 1).astype(np.int64)
        )
        self.prompt_lens = torch.from_numpy(prompt_lens)
        self.block_start = torch.from_numpy(burst.prompt_blocks[of_request])
        self.block_table = torch.from_numpy(burst.plan.sample_tables[members])
        self.query_start_loc = torch.arange(len(members) + 1, dtype=torch.int32)
        self.logit_positions = torch.arange(len(members))
        self.slots = np.ascontiguousarray(burst.plan.sample_slots[:, members])

    def batch(self, burst: _Burst, step: int) -> ForwardBatch:
        """The forward of the tokens drawn at step - 1."""
        tokens = burst.result.tokens[step - 1, self.members].astype(np.int64)
        return ForwardBatch(
            input_ids=torch.from_numpy(tokens).view(1, -1),
            position_ids=(self.positions + step).view(1, -1),
            slot_mapping=torch.from_numpy(self.slots[step - 1]),
            query_start_loc=self.query_start_loc,
            prompt_lens=self.prompt_lens,
            response_lens=self.response_lens + step,
            response_block_start=self.block_start,
            block_table=self.block_table,
            logit_positions=self.logit_positions,
        )


_SAMPLING_FIELDS = (
    ("weight", "guidance_weight"),
    ("temperature", "temperature"),
    ("top_k", "top_k"),
    ("top_p", "top_p"),
    ("min_p", "min_p"),
)


def _slots(table: Int32s, positions: Int64s) -> Int32s:
    return table[positions // BLOCK_SIZE] * BLOCK_SIZE + (positions % BLOCK_SIZE).astype(np.int32)


def _padded(rows: Sequence[Int64s]) -> Int64s:
    """Ragged rows as one matrix, -1 for none."""
    width = max((len(row) for row in rows), default=0)
    matrix = np.full((len(rows), width), -1, np.int64)
    for i, row in enumerate(rows):
        matrix[i, : len(row)] = row
    return matrix


def _span(members: Int64s, some: Int64s) -> slice:
    """Where `some`, a contiguous run of the ascending `members`, stands in them."""
    begin = int(np.searchsorted(members, some[0]))
    return slice(begin, begin + len(some))


def token_scores(
    runners: Mapping[str, ModelRunner],
    vocab_size: int,
    guidance: str,
    outputs: list[torch.Tensor],
    rows: torch.Tensor,
    tokens: torch.Tensor,
) -> torch.Tensor:
    """What a scorer gives tokens [N], from the model outputs of the positions before them.

    Args:
        guidance: "implicit": outputs are logits [R, V] of tuned and untuned, the score is
            log tuned - log untuned; "explicit": hidden states [R, H] of the value model, w_y . h.
        rows: int64 [N], the row of `outputs` that each token follows.

    Returns:
        float64 [N].
    """
    if guidance == "implicit":
        tuned, untuned = (output[:, :vocab_size] for output in outputs)
        return pair_token_logprobs(tuned, untuned, tokens, rows).double()
    weight = runners["value"].model.score_head.weight
    return (outputs[0][rows].float() * weight[tokens].float()).sum(1).double()
