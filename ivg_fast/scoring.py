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

from ivg_fast.batches import Int32s, Ints, extension_batch
from ivg_fast.burst import History
from ivg_fast.errors import ScorerError
from ivg_fast.models.batch import BLOCK_SIZE
from ivg_fast.models.runner import ModelRunner
from ivg_fast.models.values import TokenScorer
from ivg_fast.params import ScoreInput, Scorer
from ivg_fast.request import FINISH_NONE, FINISH_STOP, GUIDES, LiveRequest, decode

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
        call: calls them for a request; None where the scores come later.
    """

    def __init__(
        self,
        runners: Mapping[str, ModelRunner],
        token_scorer: TokenScorer,
        eos_id: int | None,
        tokenizer: Any,
        call: Callable[[LiveRequest, Scorer, list[ScoreInput]], Floats | None],
    ) -> None:
        self._runners = runners
        self._call = call
        self._measure = token_scorer.scores
        self._scalars = token_scorer.scalars
        self._eos_id = eos_id
        self._tokenizer = tokenizer

    def run(self, plan: Any, requests: Sequence[LiveRequest], history: History) -> Scores:
        """Scores every row of the plan.

        Args:
            plan: of Scheduler.plan_scores().
            requests: those of plan.request_ids, in order.
            history: tokens of a candidate.

        Returns:
            See Scores; those that come later are 0 here. A request whose scores cannot be had has
            its `error` set.
        """
        scores = np.zeros(len(plan.row_request))
        rewards: NDArray[np.float32] | None = None
        for way in sorted({_way(request) for request in requests}):
            is_this = np.array([_way(request) == way for request in requests])
            rows = np.flatnonzero(is_this[plan.row_request])
            if way == "pair":
                rewards = np.zeros((len(scores), plan.max_new_tokens), np.float32)
                scores[rows] = self._by_pair(plan, requests, rows, rewards)
            elif way == "vocabulary":
                scores[rows] = self._by_vocabulary_head(plan, requests, rows)
            elif way in ("scalar", "trunk"):
                scores[rows] = self._by_scalar_head(plan, requests, rows, way)
            elif way != "text":
                scores[rows] = self._in_hand(plan, requests, way, rows)
        scores = scores[plan.row_twin]  # equal tokens score equally, whatever their row rounded to
        ends = np.cumsum(plan.num_rows).tolist()
        slices = [slice(*pair) for pair in pairwise([0, *ends])]
        # All texts are taken before any scorer runs: a scorer may abort requests.
        inputs: list[list[ScoreInput]] = []
        for request, mine in zip(requests, slices, strict=True):
            texts: list[ScoreInput] = []
            if request.text_scorer is not None:
                try:
                    texts = self._inputs(plan, request, mine, history)
                except Exception as error:  # a tokenizer that fails on one text fails no other
                    request.error = error
            inputs.append(texts)
        for request, mine, texts in zip(requests, slices, inputs, strict=True):
            if request.error is not None:
                continue
            try:
                if request.text_scorer is not None:
                    given = self._call(request, request.text_scorer, texts)
                    if given is not None:
                        scores[mine] = given
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
            outputs = self._extend(plan, requests, kind, ended, last, last + 1)
            added = self._measure(
                kind, outputs, np.arange(len(ended)), np.full(len(ended), self._end_of_text())
            )
            scores[adds] = added if kind == "explicit" else scores[adds] + added
        return scores

    def _by_vocabulary_head(self, plan: Any, requests: Sequence[LiveRequest], rows: Ints) -> Floats:
        """V(x, y<=t) = w_{y_t} . h_{t-1}: the last token's value, which stands for the prefix."""
        adds = plan.row_adds_eos[rows] != 0
        starts, lengths = plan.row_start[rows], plan.row_length[rows]
        ends = np.where(adds, lengths, lengths - 1)
        # A chunk of a single token follows the position that the settle has forwarded already.
        scores = self._of_candidates(plan, requests, rows, "first_scores")
        grown = np.flatnonzero(ends > starts)
        if len(grown):
            some, a, b = rows[grown], starts[grown], ends[grown]
            outputs = self._extend(plan, requests, "explicit", some, a, b, last_only=True)
            tokens = plan.row_tokens[some, lengths[grown] - 1 - a].astype(np.int64)
            if adds.any():
                tokens[adds[grown]] = self._end_of_text()
            scores[grown] = self._measure("explicit", outputs, np.arange(len(grown)), tokens)
        return scores

    def _by_scalar_head(
        self, plan: Any, requests: Sequence[LiveRequest], rows: Ints, way: str
    ) -> Floats:
        """V(x, y<=t) = head(h_t): the hidden state at the last token, or at the end of text."""
        adds = plan.row_adds_eos[rows] != 0
        starts, lengths = plan.row_start[rows], plan.row_length[rows]
        tokens = plan.row_tokens
        if adds.any():
            tokens = np.pad(tokens, ((0, 0), (0, 1)), constant_values=-1)
            tokens[rows[adds], (lengths - starts)[adds]] = self._end_of_text()
        if way == "trunk":  # guiding has read all but the last token
            starts = lengths - 1
        states, *logits = self._extend(
            plan,
            requests,
            "explicit",
            rows,
            starts,
            lengths + adds,
            tokens,
            last_only=True,
            on_trunk=way == "trunk",
        )
        for of_rows in logits:
            self._keep(plan, requests, rows, of_rows)
        return self._scalars(states)

    @staticmethod
    def _keep(plan: Any, requests: Sequence[LiveRequest], rows: Ints, logits: torch.Tensor) -> None:
        """Keeps the tuned model's logits [S, V] behind tokens that candidates may go on from."""
        of_request, last = plan.row_request[rows], plan.row_length[rows] - 1
        blocks = plan.row_tables[rows, plan.prompt_blocks[of_request] + last // BLOCK_SIZE]
        slots = blocks * BLOCK_SIZE + last % BLOCK_SIZE
        goes_on = plan.row_finish[rows] == FINISH_NONE
        for i in np.flatnonzero(goes_on).tolist():
            requests[of_request[i]].kept_logits[int(slots[i])] = logits[i]

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
        outputs = self._extend(plan, requests, "implicit", rows, starts, starts + counts)
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
        """What a text scorer sees: the engine's value its own prompt, others the base's."""
        prompt = request.prompt_texts["base" if callable(request.params.scorer) else "value"]
        if prompt is None:
            prompt = decode(self._tokenizer, request.prompt_ids["base"].tolist())
        inputs = []
        columns = (plan.row_candidate, plan.row_finish, plan.row_adds_eos)
        for candidate, finish, adds in zip(*(c[rows].tolist() for c in columns), strict=True):
            tokens = history(request.request_id, candidate).tolist()
            text = decode(self._tokenizer, tokens)
            ends_text = finish == FINISH_STOP or bool(adds)
            inputs.append(ScoreInput(prompt, text, tuple(tokens), finish != FINISH_NONE, ends_text))
        return inputs

    def _extend(
        self,
        plan: Any,
        requests: Sequence[LiveRequest],
        kind: str,
        rows: Ints,
        starts: Ints,
        ends: Ints,
        tokens: Int32s | None = None,
        *,
        last_only: bool = False,
        on_trunk: bool = False,
    ) -> list[torch.Tensor]:
        """Forwards the response tokens [starts, ends) of the rows through the scorer's roles;
        `tokens` as of extension_batch.

        Returns:
            The outputs of every forwarded token, or of each row's last one, a tensor a role. With
            `on_trunk` the value's, and the logits of the tuned model that it is read from.
        """
        numbers = np.bincount(plan.row_request[rows], ends - starts, len(requests))
        outputs: list[torch.Tensor] = []
        for role in GUIDES[kind]:
            runner = self._runners[role]
            batch = extension_batch(
                plan,
                requests,
                role,
                rows,
                starts,
                ends,
                plan.row_tokens if tokens is None else tokens,
                last_only=last_only,
                device=runner.device,
            )
            if on_trunk:
                tuned = self._runners["tuned"]
                outputs += reversed(tuned.forward_with_states(batch, runner.network))
            else:
                outputs.append(runner.hidden(batch) if role == "value" else runner.forward(batch))
            for request, number in zip(requests, numbers.astype(int).tolist(), strict=True):
                if number:
                    reader, stats = request.reader(role), request.stats
                    guides = reader in request.step_roles
                    counts = stats.decode_tokens if guides else stats.score_tokens
                    counts[reader] = counts.get(reader, 0) + number
        return outputs

    def _end_of_text(self) -> int:
        if self._eos_id is None:
            raise ScorerError("scoring an end of text needs a tokenizer or model that has one")
        return self._eos_id

    @staticmethod
    def _of_candidates(plan: Any, requests: Sequence[LiveRequest], rows: Ints, name: str) -> Floats:
        pairs = zip(plan.row_request[rows].tolist(), plan.row_candidate[rows].tolist(), strict=True)
        return np.array([getattr(requests[q], name)[candidate] for q, candidate in pairs])


def _way(request: LiveRequest) -> str:
    """How a request is scored: by "text", by what is in hand of "implicit" or "explicit", by the
    "pair", by the "vocabulary" or "scalar" head, or by one that reads the tuned model's "trunk"."""
    scorer = request.params.scorer
    if request.text_scorer is not None:
        return "text"
    if scorer == "implicit":
        return "pair" if request.is_scored_by_pair else "implicit"
    if request.has_value_in_hand:
        return "explicit"
    return "trunk" if request.is_scored_on_the_trunk else request.value.kind
