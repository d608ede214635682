# SPDX-License-Identifier: Apache-2.0
"""Runs one burst: the first, mixed forward, the fork's copies, then the decode steps until the next
look of the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ivg_fast.batches import DecodeRows, Int32s, Int64s
from ivg_fast.draws import BurstResult, padded, sampling_arguments
from ivg_fast.errors import NonFiniteLogitsError
from ivg_fast.first_forward import FirstForward, RoleRows, forward_trunk
from ivg_fast.models.runner import ModelRunner
from ivg_fast.models.values import TokenScorer
from ivg_fast.ops.guided_sample import GuidedSample, guided_sample
from ivg_fast.params import GUIDANCE_KINDS
from ivg_fast.request import (
    FINISH_NONE,
    FINISH_STOP,
    FINISH_STOP_TEXT,
    GUIDES,
    ROLE_BIT,
    LiveRequest,
    find_stop,
)

# Tokens that a candidate has committed, by request id and candidate id.
History = Callable[[int, int], Int32s]
# From the runner, a plan, its requests and those that it prefills.
MakeBurst = Callable[["BurstRunner", Any, Sequence[LiveRequest], Sequence[LiveRequest]], "Burst"]


class BurstRunner:
    """The device side of Scheduler.plan(): everything between plan() and commit_tokens().

    Args:
        runners: the models by role.
        vocab_size: ids that all models share; wider logits are cut to it.
        copy_blocks: copies (src, dst) block pairs, int32 [N, 2], in every pool of every role.
        token_scorer: measures the first tokens for scorers that do not guide.
        tokenizer: for stop strings; None where there are none.
        make: makes a burst of a plan; None: Burst.
    """

    def __init__(
        self,
        runners: Mapping[str, ModelRunner],
        vocab_size: int,
        copy_blocks: Callable[[Int32s], None],
        token_scorer: TokenScorer,
        tokenizer: Any,
        make: MakeBurst | None = None,
    ) -> None:
        self.runners = runners
        self.vocab_size = vocab_size
        self.copy_blocks = copy_blocks
        self.token_scorer = token_scorer
        self.tokenizer = tokenizer
        self._make = Burst if make is None else make

    def run(
        self,
        plan: Any,
        requests: Sequence[LiveRequest],
        prefill: Sequence[LiveRequest],
        history: History,
    ) -> BurstResult:
        """Executes the plan.

        Args:
            plan: of Scheduler.plan().
            requests: those of plan.request_ids, in order.
            prefill: those of plan.prefill_request_ids, in order.
            history: tokens of a candidate before this burst.

        Returns:
            The samples. A request whose logits no token can be drawn from has its `error` set.
        """
        burst = self._make(self, plan, requests, prefill)
        if len(plan.copies):
            self.copy_blocks(plan.copies)
        burst.draw_first()
        burst.decode()
        for request in requests:
            request.prompt_outputs.clear()
            request.kept_logits.clear()
        for request in prefill:  # one that does not start yet keeps its own rows, not the batch
            request.prompt_outputs = {r: row.clone() for r, row in request.prompt_outputs.items()}
        burst.find_stop_strings(history)
        burst.keep_values()
        burst.count()
        return burst.result


@dataclass(frozen=True, slots=True)
class Group:
    """Samples that one call draws: `members` of a plan, of requests [first, last).

    `is_from_prompt`: their logit rows are the prompts' last ones, else rows of the first forward.
    """

    guidance: str
    is_from_prompt: bool
    first: int
    last: int
    members: Int64s


class Burst:
    """One run: the plan's arrays and what has been drawn so far. The host looks at each step."""

    def __init__(
        self,
        owner: BurstRunner,
        plan: Any,
        requests: Sequence[LiveRequest],
        prefill: Sequence[LiveRequest],
    ) -> None:
        self.owner = owner
        self.runners = owner.runners
        self.plan = plan
        self.requests = requests
        # Each access of a plan's array makes a view: take those of the loop once.
        self.request_of: Int32s = plan.sample_request
        self.sample_row: Int32s = plan.sample_row
        self.row_request: Int32s = plan.row_request
        self.candidates: Int32s = plan.sample_candidate
        self.first_position: Int32s = plan.sample_position
        self.seeds: Int64s = plan.sample_seed
        self.limits: Int32s = plan.sample_steps
        self.num_samples = len(self.request_of)
        self.result = BurstResult.empty(plan.num_steps, self.num_samples)
        self.is_alive = np.ones(self.num_samples, bool)
        self.num_forwards = np.zeros(self.num_samples, np.int64)
        self.stop_ids = padded([r.stop_ids for r in requests])[self.request_of]
        self.rows = self._forward_first(prefill)
        # Whose explicit value is measured from the tuned model's hidden states, its trunk's.
        self.is_on_trunk = np.array([r.has_value_on_trunk for r in requests], bool)

    # --- the first step ----------------------------------------------------------------------

    def _forward_first(self, prefill: Sequence[LiveRequest]) -> RoleRows:
        return FirstForward(self.runners, self.plan, self.requests, prefill).run()

    def draw_first(self) -> None:
        groups = list(self._groups())
        for group in groups:
            logits = {}
            for role in ("base", *GUIDES[group.guidance]):
                outputs = self._outputs(group, role)
                if role == "value":
                    outputs = self.runners[role].score_head(outputs)
                logits[role] = outputs[:, : self.owner.vocab_size]
            self._draw_group(group, logits)
        for group in groups:
            for kind in ("implicit", "explicit"):
                self._measure_first(group, kind)
            members = group.members[self.is_on_trunk[self.request_of[group.members]]]
            if len(members):
                (states,), rows = self._drawn_from(group, members, ("trunk",))
                self._measure_on_trunk(0, members, states, rows)

    def _draw_group(self, group: Group, logits: dict[str, torch.Tensor]) -> None:
        arguments = self._sampling(group.members)
        arguments["logit_rows"] = self._logit_rows(group)
        self._draw(0, group.members, group.guidance, logits, arguments)

    def _groups(self) -> Iterator[Group]:
        """Requests of equal guidance stand together, those that start from a prompt last."""
        first = begin = end = 0
        key: tuple[str, bool] | None = None
        for index, request in enumerate(self.requests):
            this = (request.params.guidance, bool(self.sample_row[end] < 0))
            if key is not None and this != key:
                yield Group(*key, first, index, np.arange(begin, end))
                first, begin = index, end
            key = this
            end += int(self.plan.num_samples[index])
        if key is not None:
            yield Group(*key, first, len(self.requests), np.arange(begin, end))

    def _outputs(self, group: Group, role: str) -> torch.Tensor:
        """The role's outputs that `_logit_rows` point into."""
        if group.is_from_prompt:
            members = self.requests[group.first : group.last]
            return torch.stack([request.prompt_outputs[role] for request in members])
        rows, outputs = self.rows[role]
        a, b = np.searchsorted(rows, np.searchsorted(self.row_request, [group.first, group.last]))
        return outputs[a:b]

    def _logit_rows(self, group: Group) -> Int32s:
        if group.is_from_prompt:
            return self.request_of[group.members] - group.first
        first_row = np.searchsorted(self.row_request, group.first)
        return self.sample_row[group.members] - np.int32(first_row)

    def _measure_first(self, group: Group, kind: str) -> None:
        """Measures the first tokens of a chunk for a scorer that does not guide: only the outputs
        before the fork can tell."""
        roles = GUIDES[kind]
        wanted = np.array([r.settle_roles == roles for r in self.requests])
        members = group.members[wanted[self.request_of[group.members]]]
        if not group.is_from_prompt:  # rows in the middle of a chunk have no first token
            row_roles = self.plan.row_roles[self.sample_row[members]]
            members = members[(row_roles & ROLE_BIT[roles[0]]) != 0]
        if not len(members):
            return
        self._keep_first(kind, members, *self._drawn_from(group, members, roles))

    def _keep_first(
        self, kind: str, members: Int64s, outputs: list[torch.Tensor], rows: Int64s
    ) -> None:
        """Measures what these members drew first; `rows` of the outputs they drew from."""
        scores = self.owner.token_scorer.scores(kind, outputs, rows, self.result.tokens[0, members])
        self.set_first(members, scores)

    def set_first(self, members: Int64s, scores: NDArray[np.float64]) -> None:
        for sample, score in zip(members.tolist(), scores.tolist(), strict=True):
            request = self.requests[self.request_of[sample]]
            request.first_scores[self.candidates[sample]] = score

    def _drawn_from(
        self, group: Group, members: Int64s, roles: Sequence[str]
    ) -> tuple[list[torch.Tensor], Int64s]:
        """Outputs of roles in the first forward, and the row of them that each member drew from."""
        if group.is_from_prompt:
            of_request, rows = np.unique(self.request_of[members], return_inverse=True)
            starting = [self.requests[i] for i in of_request.tolist()]
            stacks = [torch.stack([r.prompt_outputs[role] for r in starting]) for role in roles]
            return stacks, rows
        rows = np.searchsorted(self.rows[roles[0]][0], self.sample_row[members])
        return [self.rows[role][1] for role in roles], rows

    def _measure_on_trunk(
        self, step: int, members: Int64s, states: torch.Tensor, rows: Int64s
    ) -> None:
        """The explicit value of what these members drew, from the states right before it."""
        drawn = self.result.tokens[step, members]
        self.result.values[step, members] = self.owner.token_scorer.scores(
            "explicit", [states], rows, drawn
        )

    # --- the decode steps --------------------------------------------------------------------

    def decode(self) -> None:
        rows: dict[str, DecodeRows] = {}
        kinds: list[tuple[str, Int64s, dict[str, Any]]] = []
        members = on_trunk = np.empty(0, np.int64)
        for step in range(1, len(self.result.tokens)):
            alive = np.flatnonzero(self.is_alive)
            if not len(alive):
                return
            if len(alive) != len(members):  # the living only become fewer
                members = alive
                rows = {
                    role: DecodeRows(self.plan, self.requests, role, members)
                    for role in self.runners
                }
                kinds = self._kinds(members)
                on_trunk = members[self.is_on_trunk[self.request_of[members]]]
            drawn = self.result.tokens[step - 1]
            logits = {}
            for role, of_role in rows.items():
                if not len(of_role.members):
                    continue
                batch = of_role.batch(step, drawn)
                if role == "tuned" and len(on_trunk):
                    logits.update(forward_trunk(self.runners, batch))
                else:
                    logits[role] = self.runners[role].forward(batch)
            self.num_forwards[members] += 1
            for guidance, mine, arguments in kinds:
                parts = {
                    role: logits[role][_span(rows[role].members, mine), : self.owner.vocab_size]
                    for role in ("base", *GUIDES[guidance])
                }
                self._draw(step, mine, guidance, parts, arguments)
            if len(on_trunk):
                at = np.searchsorted(rows["tuned"].members, on_trunk)
                self._measure_on_trunk(step, on_trunk, logits["trunk"], at)

    def _kinds(self, members: Int64s) -> list[tuple[str, Int64s, dict[str, Any]]]:
        """The living by guidance, with their arguments of guided_sample."""
        kind_of = np.array([GUIDANCE_KINDS.index(r.params.guidance) for r in self.requests])
        of_sample = kind_of[self.request_of[members]]
        kinds = []
        for kind in np.unique(of_sample).tolist():
            mine = members[of_sample == kind]
            kinds.append((GUIDANCE_KINDS[kind], mine, self._sampling(mine)))
        return kinds

    # --- drawing -----------------------------------------------------------------------------

    def _sampling(self, members: Int64s) -> dict[str, Any]:
        """guided_sample's arguments of these samples, but for logits and positions."""
        return {
            "seeds": self.seeds[members],
            "candidate_ids": self.candidates[members],
            **sampling_arguments(self.requests, self.request_of[members], self.stop_ids[members]),
        }

    def _draw(
        self,
        step: int,
        members: Int64s,
        guidance: str,
        logits: dict[str, torch.Tensor],
        arguments: dict[str, Any],
    ) -> None:
        guides = [logits[role] for role in GUIDES[guidance]]
        positions = self.first_position[members] + step
        drawn = guided_sample(logits["base"], *guides, positions=positions, **arguments)
        self.record(step, members, drawn)

    def record(self, step: int, members: Int64s, drawn: GuidedSample) -> None:
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
            position = int(self.first_position[sample]) + step
            error = NonFiniteLogitsError(
                f"no token can be drawn for response token {position} of candidate "
                f"{int(self.candidates[sample])}: the logits hold NaN or +inf, or nothing finite"
            )
            self._end(index, error)

    def _end(self, index: int, error: Exception) -> None:
        """A request fails, and what it has drawn in this burst is lost."""
        request = self.requests[index]
        request.error = request.error or error
        mine = self.request_of == index
        self.is_alive[mine] = False
        self.result.finish[mine] = FINISH_NONE
        self.result.num_tokens[mine] = 0

    # --- afterwards --------------------------------------------------------------------------

    def find_stop_strings(self, history: History) -> None:
        with_stops = np.array(
            [bool(r.params.stop) and r.error is None for r in self.requests], bool
        )
        if not with_stops.any():
            return
        result = self.result
        for sample in np.flatnonzero(with_stops[self.request_of]).tolist():
            index = int(self.request_of[sample])
            request = self.requests[index]
            if request.error is not None:
                continue
            old = history(request.request_id, int(self.candidates[sample])).tolist()
            new = result.tokens[: result.num_tokens[sample], sample].tolist()
            p = request.params
            try:
                found = find_stop(self.owner.tokenizer, old + new, len(old), p.stop, p.min_tokens)
            except Exception as error:  # a tokenizer that fails on one text fails no other
                self._end(index, error)
                continue
            if found is None:
                continue
            num_tokens, stop_index = found
            if result.finish[sample] == FINISH_STOP and num_tokens == len(old) + len(new):
                continue  # the stop token came no later
            result.num_tokens[sample] = num_tokens - len(old)
            result.finish[sample] = FINISH_STOP_TEXT
            result.stop_index[sample] = stop_index

    def keep_values(self) -> None:
        """The value in hand of a candidate's last token is its chunk score."""
        wanted = [r.has_value_in_hand for r in self.requests]
        result = self.result
        for sample in np.flatnonzero(np.array(wanted, bool)[self.request_of]).tolist():
            request = self.requests[self.request_of[sample]]
            last = max(int(result.num_tokens[sample]) - 1, 0)
            request.last_values[self.candidates[sample]] = result.values[last, sample]

    def count(self) -> None:
        """Adds what the decode steps forwarded to each request's counters."""
        decoded = np.bincount(self.request_of, self.num_forwards, len(self.requests))
        for request, number in zip(self.requests, decoded.astype(int).tolist(), strict=True):
            counts = request.stats.decode_tokens
            for role in request.step_roles:
                counts[role] = counts.get(role, 0) + number


def _span(members: Int64s, some: Int64s) -> slice:
    """Where `some`, a contiguous run of the ascending `members`, stands in them."""
    begin = int(np.searchsorted(members, some[0]))
    return slice(begin, begin + len(some))
