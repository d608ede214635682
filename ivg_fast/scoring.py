# SPDX-License-Identifier: Apache-2.0
"""Scores the candidates of requests at their boundary: a forward of the chunk's new tokens through
the roles that only score, the sums in hand of roles that guide, or a callable."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ivg_fast.batches import Ints, extension_batch
from ivg_fast.burst import History
from ivg_fast.errors import ScorerError
from ivg_fast.models.runner import ModelRunner
from ivg_fast.models.values import TokenScorer, call_scorer
from ivg_fast.params import ScoreInput, Scorer
from ivg_fast.request import FINISH_NONE, GUIDES, LiveRequest, decode

Floats = NDArray[np.float64]
# Scores f64 [S] of the plan's rows, and the implicit reward of each new token, f32 [S,
# max_new_tokens], where scoring is what measures it.
Scores = tuple[Floats, NDArray[np.float32] | None]


class ChunkScorer:
    """Executes Scheduler.plan_scores(): everything between it and commit_scores().

    Args:
        runners: the models by role.
        token_scorer: measures tokens from the models' outputs.
        eos_id: the token that is scored behind a response which ended without one; None if there is
            none.
        tokenizer: for callables.
        call: calls them, as `call_scorer` does.
    """

    def __init__(
        self,
        runners: Mapping[str, ModelRunner],
        token_scorer: TokenScorer,
        eos_id: int | None,
        tokenizer: Any,
        call: Callable[[Scorer, list[ScoreInput]], Floats] = call_scorer,
    ) -> None:
        self._runners = runners
        self._call = call
        self._measure = token_scorer.scores
        self._eos_id = eos_id
        self._tokenizer = tokenizer

    def run(self, plan: Any, requests: Sequence[LiveRequest], history: History) -> Scores:
        """Scores every row of the plan.

        Args:
            plan: of Scheduler.plan_scores().
            requests: those of plan.request_ids, in order.
            history: tokens of a candidate.

        Returns:
            See Scores. A request whose scores cannot be had has its `error` set.
        """
        scores = np.zeros(len(plan.row_request))
        rewards: NDArray[np.float32] | None = None
        for kind in ("implicit", "explicit"):
            is_in_hand = [r.params.scorer == kind == r.params.guidance for r in requests]
            is_to_measure = [r.params.scorer == kind != r.params.guidance for r in requests]
            rows = np.flatnonzero(np.array(is_in_hand)[plan.row_request])
            if len(rows):
                scores[rows] = self._in_hand(plan, requests, kind, rows)
            rows = np.flatnonzero(np.array(is_to_measure)[plan.row_request])
            if len(rows) and kind == "explicit":
                scores[rows] = self._by_value(plan, requests, rows)
            elif len(rows):
                rewards = np.zeros((len(scores), plan.max_new_tokens), np.float32)
                scores[rows] = self._by_pair(plan, requests, rows, rewards)
        scores = scores[plan.row_twin]  # equal tokens score equally, whatever their row rounded to
        ends = np.cumsum(plan.num_rows).tolist()
        slices = [slice(*pair) for pair in pairwise([0, *ends])]
        # All texts are taken before any scorer runs: a scorer may abort requests.
        inputs = [
            self._inputs(plan, request, mine, history) if callable(request.params.scorer) else []
            for request, mine in zip(requests, slices, strict=True)
        ]
        for request, mine, texts in zip(requests, slices, inputs, strict=True):
            try:
                if callable(request.params.scorer):
                    scores[mine] = self._call(request.params.scorer, texts)
                elif not np.isfinite(scores[mine]).all():
                    raise ScorerError(
                        f"scorer {request.params.scorer!r} must give finite scores, got "
                        f"{scores[mine].tolist()}"
                    )
            except ScorerError as error:
                request.error = error
        return scores, rewards

    def _in_hand(self, plan: Any, requests: Sequence[LiveRequest], kind: str, rows: Ints) -> Floats:
        """Sampling has measured every token, but for an end of text that was not sampled."""
        if kind == "implicit":
            scores = plan.row_reward[rows]
        else:
            scores = self._of_candidates(plan, requests, rows, "last_values")
        adds = plan.row_adds_eos[rows] != 0
        if adds.any():
            ended = rows[adds]
            last = plan.row_length[ended] - 1
            outputs = self._extend(plan, requests, kind, ended, last, last + 1, "decode_tokens")
            added = self._measure(
                kind, outputs, np.arange(len(ended)), np.full(len(ended), self._end_of_text())
            )
            scores[adds] = added if kind == "explicit" else scores[adds] + added
        return scores

    def _by_value(self, plan: Any, requests: Sequence[LiveRequest], rows: Ints) -> Floats:
        """V(x, y<=t) = w_{y_t} . h_{t-1}: the last token's value, which stands for the prefix."""
        adds = plan.row_adds_eos[rows] != 0
        starts, lengths = plan.row_start[rows], plan.row_length[rows]
        ends = np.where(adds, lengths, lengths - 1)
        # A chunk of a single token follows the position that the settle has forwarded already.
        scores = self._of_candidates(plan, requests, rows, "first_scores")
        grown = np.flatnonzero(ends > starts)
        if len(grown):
            some, a, b = rows[grown], starts[grown], ends[grown]
            outputs = self._extend(
                plan, requests, "explicit", some, a, b, "score_tokens", last_only=True
            )
            tokens = plan.row_tokens[some, lengths[grown] - 1 - a].astype(np.int64)
            if adds.any():
                tokens[adds[grown]] = self._end_of_text()
            scores[grown] = self._measure("explicit", outputs, np.arange(len(grown)), tokens)
        return scores

    def _by_pair(
        self,
        plan: Any,
        requests: Sequence[LiveRequest],
        rows: Ints,
        rewards: NDArray[np.float32],
    ) -> Floats:
        """Sum of log tuned - log untuned: the ancestors' sum in hand plus this chunk's tokens."""
        adds = plan.row_adds_eos[rows] != 0
        starts, lengths = plan.row_start[rows], plan.row_length[rows]
        counts = np.where(adds, lengths, lengths - 1) - starts
        first = self._of_candidates(plan, requests, rows, "first_scores")
        rewards[rows, 0] = first
        scores = plan.row_reward[rows] + first
        if not counts.any():
            return scores
        outputs = self._extend(
            plan, requests, "implicit", rows, starts, starts + counts, "score_tokens"
        )
        # The output behind the chunk's token j measures token j + 1, and the end of text at last.
        of_row = np.repeat(np.arange(len(rows)), counts)
        index = np.arange(len(of_row)) - np.repeat(np.cumsum(counts) - counts, counts) + 1
        is_eos = index == (lengths - starts)[of_row]
        column = np.minimum(index, plan.max_new_tokens - 1)
        tokens = plan.row_tokens[rows[of_row], column].astype(np.int64)
        if is_eos.any():
            tokens[is_eos] = self._end_of_text()
        measured = self._measure("implicit", outputs, np.arange(len(tokens)), tokens)
        rewards[rows[of_row[~is_eos]], index[~is_eos]] = measured[~is_eos]
        return scores + np.bincount(of_row, measured, len(rows))

    def _inputs(
        self, plan: Any, request: LiveRequest, rows: slice, history: History
    ) -> list[ScoreInput]:
        """What a callable sees of the rows."""
        prompt = request.prompt
        if prompt is None:
            prompt = decode(self._tokenizer, request.prompt_ids["base"].tolist())
        inputs = []
        candidates, finish = plan.row_candidate[rows].tolist(), plan.row_finish[rows].tolist()
        for candidate, reason in zip(candidates, finish, strict=True):
            tokens = history(request.request_id, candidate).tolist()
            text = decode(self._tokenizer, tokens)
            inputs.append(ScoreInput(prompt, text, tuple(tokens), reason != FINISH_NONE))
        return inputs

    def _extend(
        self,
        plan: Any,
        requests: Sequence[LiveRequest],
        kind: str,
        rows: Ints,
        starts: Ints,
        ends: Ints,
        counter: str,
        *,
        last_only: bool = False,
    ) -> list[torch.Tensor]:
        """Forwards the response tokens [starts, ends) of the rows through the scorer's roles.

        Returns:
            The outputs of every forwarded token, or of each row's last one, a tensor a role.
        """
        numbers = np.bincount(plan.row_request[rows], ends - starts, len(requests))
        outputs = []
        for role in GUIDES[kind]:
            batch = extension_batch(plan, requests, role, rows, starts, ends, last_only=last_only)
            runner = self._runners[role]
            outputs.append(runner.hidden(batch) if role == "value" else runner.forward(batch))
            for request, number in zip(requests, numbers.astype(int).tolist(), strict=True):
                if number:
                    counts = getattr(request.stats, counter)
                    counts[role] = counts.get(role, 0) + number
        return outputs

    def _end_of_text(self) -> int:
        if self._eos_id is None:
            raise ScorerError("scoring an end of text needs a tokenizer or model that has one")
        return self._eos_id

    @staticmethod
    def _of_candidates(plan: Any, requests: Sequence[LiveRequest], rows: Ints, name: str) -> Floats:
        pairs = zip(plan.row_request[rows].tolist(), plan.row_candidate[rows].tolist(), strict=True)
        return np.array([getattr(requests[q], name)[candidate] for q, candidate in pairs])
