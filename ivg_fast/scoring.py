# SPDX-License-Identifier: Apache-2.0
"""Scores the candidates of requests at their boundary: a forward of the chunk's new tokens through
the roles that only score, the sums in hand of roles that guide, or a callable."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ivg_fast.burst import token_scores
from ivg_fast.errors import ScorerError
from ivg_fast.models.batch import BLOCK_SIZE, ForwardBatch
from ivg_fast.models.runner import ModelRunner
from ivg_fast.models.values import call_text_value
from ivg_fast.params import ScoreInput
from ivg_fast.request import FINISH_NONE, GUIDES, LiveRequest, decode

Ints = NDArray[np.integer]
# Scores f64 [S] of the plan's rows, and per new token the implicit reward, f32 [S, max_new_tokens],
# where scoring is what measures it.
Scores = tuple[NDArray[np.float64], NDArray[np.float32] | None]


class ChunkScorer:
    """Executes Scheduler.plan_scores(): everything between it and commit_scores().

    Args:
        runners: the models by role.
        vocab_size: ids that all models share.
        eos_id: the token that is scored behind a response which ended without one; None if there is
            none.
        tokenizer: for callables.
    """

    def __init__(
        self,
        runners: Mapping[str, ModelRunner],
        vocab_size: int,
        eos_id: int | None,
        tokenizer: Any,
    ) -> None:
        self._runners = runners
        self._vocab_size = vocab_size
        self._eos_id = eos_id
        self._tokenizer = tokenizer

    def run(
        self,
        plan: Any,
        requests: Sequence[LiveRequest],
        history: Callable[[int, int], Ints],
    ) -> Scores:
        """Scores every row of the plan.

        Args:
            plan: of Scheduler.plan_scores().
            requests: those of plan.request_ids, in order.
            history: tokens of a candidate, by request id and candidate id.

        Returns:
            See Scores. A request whose scores cannot be had has its `error` set; its rows hold 0.
        """
        scores = np.zeros(len(plan.row_request))
        rewards: NDArray[np.float32] | None = None
        for guidance in ("implicit", "explicit"):
            by_model = np.array([r.params.scorer == guidance for r in requests])
            if not by_model.any():
                continue
            is_in_hand = np.array([r.params.guidance == guidance for r in requests])
            rows = np.flatnonzero((by_model & is_in_hand)[plan.row_request])
            if len(rows):
                scores[rows] = self._in_hand(plan, requests, guidance, rows)
            rows = np.flatnonzero((by_model & ~is_in_hand)[plan.row_request])
            if not len(rows):
                continue
            if guidance == "explicit":
                scores[rows] = self._by_value(plan, requests, rows)
            else:
                if rewards is None:
                    rewards = np.zeros((len(scores), plan.max_new_tokens), np.float32)
                scores[rows] = self._by_pair(plan, requests, rows, rewards)
        begin = 0
        for request, num_rows in zip(requests, plan.num_rows.tolist(), strict=True):
            mine = slice(begin, begin + num_rows)
            begin += num_rows
            try:
                if callable(request.params.scorer):
                    scores[mine] = self._by_callable(plan, request, mine, history)
                elif not np.isfinite(scores[mine]).all():
                    raise ScorerError(
                        f"scorer {request.params.scorer!r} gave {scores[mine].tolist()}, which "
                        "are not all finite"
                    )
            except Exception as error:
                request.error = error
                scores[mine] = 0.0
        return scores, rewards

    def _in_hand(
        self, plan: Any, requests: Sequence[LiveRequest], guidance: str, rows: Ints
    ) -> NDArray[np.float64]:
        """Sampling has measured every token, but for an end of text that was not sampled."""
        if guidance == "implicit":
            scores = plan.row_reward[rows]
        else:
            scores = self._of_candidates(plan, requests, rows, "last_values")
        adds = plan.row_adds_eos[rows] != 0
        if adds.any():
            ended = rows[adds]
            starts = plan.row_length[ended] - 1
            outputs = self._extend(
                plan, requests, guidance, ended, starts, starts + 1, "decode_tokens"
            )
            eos = torch.full((len(ended),), self._end_of_text())
            added = self._token_scores(guidance, outputs, torch.arange(len(ended)), eos)
            scores[adds] = added if guidance == "explicit" else scores[adds] + added
        return scores

    def _by_value(
        self, plan: Any, requests: Sequence[LiveRequest], rows: Ints
    ) -> NDArray[np.float64]:
        """V(x, y<=t) = w_{y_t} . h_{t-1}: the last token's value, which stands for the prefix."""
        adds = plan.row_adds_eos[rows] != 0
        starts, lengths = plan.row_start[rows], plan.row_length[rows]
        ends = np.where(adds, lengths, lengths - 1)
        # A chunk of a single token follows the position that the settle has forwarded already.
        scores = self._of_candidates(plan, requests, rows, "first_scores")
        grown = np.flatnonzero(ends > starts)
        if len(grown):
            some = rows[grown]
            outputs = self._extend(
                plan,
                requests,
                "explicit",
                some,
                starts[grown],
                ends[grown],
                "score_tokens",
                last_only=True,
            )
            tokens = plan.row_tokens[some, (lengths - 1 - starts)[grown]].astype(np.int64)
            if adds.any():
                tokens[adds[grown]] = self._end_of_text()
            scores[grown] = self._token_scores(
                "explicit", outputs, torch.arange(len(grown)), torch.from_numpy(tokens)
            )
        return scores

    def _by_pair(
        self,
        plan: Any,
        requests: Sequence[LiveRequest],
        rows: Ints,
        rewards: NDArray[np.float32],
    ) -> NDArray[np.float64]:
        """Sum of log tuned - log untuned: the ancestors' sum in hand plus this chunk's tokens."""
        adds = plan.row_adds_eos[rows] != 0
        starts, lengths = plan.row_start[rows], plan.row_length[rows]
        ends = np.where(adds, lengths, lengths - 1)
        num_new = lengths - starts
        first = self._of_candidates(plan, requests, rows, "first_scores")
        rewards[rows, 0] = first
        scores = plan.row_reward[rows] + first
        counts = ends - starts
        if counts.sum() == 0:
            return scores
        outputs = self._extend(plan, requests, "implicit", rows, starts, ends, "score_tokens")
        # The output after the chunk's token j measures token j + 1; after the last one, the end of
        # text.
        of_row = np.repeat(np.arange(len(rows)), counts)
        index = np.arange(len(of_row)) - np.repeat(np.cumsum(counts) - counts, counts) + 1
        is_eos = index == num_new[of_row]
        columns = np.minimum(index, plan.max_new_tokens - 1)
        tokens = plan.row_tokens[rows[of_row], columns].astype(np.int64)
        if is_eos.any():
            tokens[is_eos] = self._end_of_text()
        measured = self._token_scores(
            "implicit", outputs, torch.arange(len(tokens)), torch.from_numpy(tokens)
        )
        rewards[rows[of_row[~is_eos]], index[~is_eos]] = measured[~is_eos]
        return scores + np.bincount(of_row, measured, len(rows))

    def _by_callable(
        self,
        plan: Any,
        request: LiveRequest,
        rows: slice,
        history: Callable[[int, int], Ints],
    ) -> NDArray[np.float64]:
        inputs = []
        prompt = request.prompt
        if prompt is None:
            prompt = decode(self._tokenizer, request.prompt_ids["base"].tolist())
        for candidate, finish in zip(
            plan.row_candidate[rows].tolist(), plan.row_finish[rows].tolist(), strict=True
        ):
            tokens = history(request.request_id, candidate).tolist()
            inputs.append(
                ScoreInput(
                    prompt=prompt,
                    response=decode(self._tokenizer, tokens),
                    token_ids=tuple(tokens),
                    is_finished=finish != FINISH_NONE,
                )
            )
        scorer: Any = request.params.scorer
        return np.array(call_text_value(scorer, inputs))

    # --- model forwards --------------------------------------------------------------------------

    def _extend(
        self,
        plan: Any,
        requests: Sequence[LiveRequest],
        guidance: str,
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
        of_request = plan.row_request[rows]
        counts = ends - starts
        stops = np.cumsum(counts)
        of_row = np.repeat(np.arange(len(rows)), counts)
        position = np.arange(int(stops[-1])) - np.repeat(stops - counts, counts) + starts[of_row]
        tokens = plan.row_tokens[rows[of_row], position - plan.row_start[rows][of_row]]
        block_start = plan.prompt_blocks[of_request]
        tables = plan.row_tables[rows]
        blocks = tables[of_row, block_start[of_row] + position // BLOCK_SIZE]
        outputs = []
        for role in GUIDES[guidance]:
            prompt_lens = np.array([len(r.prompt_ids.get(role, ())) for r in requests])[of_request]
            batch = ForwardBatch.from_host(
                input_ids=tokens,
                position_ids=prompt_lens[of_row] + position,
                slot_mapping=blocks * BLOCK_SIZE + position % BLOCK_SIZE,
                query_start_loc=np.concatenate([[0], stops]),
                prompt_lens=prompt_lens,
                response_lens=ends,
                response_block_start=block_start,
                block_table=tables,
                logit_positions=stops - 1 if last_only else np.arange(len(tokens)),
            )
            runner = self._runners[role]
            outputs.append(runner.hidden(batch) if role == "value" else runner.forward(batch))
            for index, number in enumerate(np.bincount(of_request, counts).astype(int).tolist()):
                if number:
                    counters = getattr(requests[index].stats, counter)
                    counters[role] = counters.get(role, 0) + number
        return outputs

    def _token_scores(
        self, guidance: str, outputs: list[torch.Tensor], rows: torch.Tensor, tokens: torch.Tensor
    ) -> NDArray[np.float64]:
        return token_scores(
            self._runners, self._vocab_size, guidance, outputs, rows, tokens
        ).numpy()

    def _end_of_text(self) -> int:
        if self._eos_id is None:
            raise ScorerError("scoring an end of text needs a tokenizer or model that has one")
        return self._eos_id

    @staticmethod
    def _of_candidates(
        plan: Any, requests: Sequence[LiveRequest], rows: Ints, name: str
    ) -> NDArray[np.float64]:
        of_request, candidates = plan.row_request[rows], plan.row_candidate[rows]
        return np.array(
            [
                getattr(requests[q], name)[c]
                for q, c in zip(of_request.tolist(), candidates.tolist(), strict=True)
            ]
        )
