# SPDX-License-Identifier: Apache-2.0
"""A request inside the engine: its prompt in every role, its rules for ending, what it has
measured."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ivg_fast.errors import InvalidParameterError
from ivg_fast.models.values import ExplicitValue
from ivg_fast.outputs import CandidateOutput, FinishReason, RequestOutput, SearchStats
from ivg_fast.params import GUIDANCE_KINDS, Scorer, SearchParams

ROLES = ("base", "tuned", "untuned", "value")
ROLE_BIT = {role: 1 << index for index, role in enumerate(ROLES)}
GUIDES = {"none": (), "implicit": ("tuned", "untuned"), "explicit": ("value",)}

# Finish of csrc/scheduler/search.h.
FINISH_NONE, FINISH_STOP, FINISH_STOP_TEXT, FINISH_LENGTH, FINISH_ABORT, FINISH_DEADLINE = range(6)
_FINISH_REASONS: dict[int, FinishReason] = {
    FINISH_STOP: "stop",
    FINISH_STOP_TEXT: "stop",
    FINISH_LENGTH: "length",
    FINISH_ABORT: "abort",
    FINISH_DEADLINE: "deadline",
}


@dataclass(frozen=True, slots=True)
class RolePrompt:
    """What one role reads of a prompt: the text, None where token ids were given; int64 ids."""

    text: str | None
    token_ids: NDArray[np.int64]


@dataclass(slots=True)
class LiveRequest:
    """What the engine keeps of a request; the beams themselves live in the scheduler.

    Attributes:
        prompt_texts: the prompt as text of each role that reads it, None where token ids were
            given.
        prompt_ids: int64 prompt tokens of each role that takes part.
        stop_ids: token ids that end a candidate, `eos_ids` among them.
        eos_ids: ends of text, none if they are to be ignored.
        prompt_outputs: per role what its forward gave for the prompt's last token (logits [V], or
            the value model's hidden state [H]), from the prefill until the first tokens are drawn.
        kept_logits: the tuned model's logits [V] behind the last token of each candidate, by the
            token's slot, where scoring has forwarded it; until survivors' next tokens are drawn.
        first_scores: f64[W*K] by candidate id: the scorer's measure of the first token since the
            last selection, which only the forward that preceded the fork can give.
        last_values: f64[W*K] by candidate id: the score of the last token by a value model whose
            outputs sampling had in hand.
        value: the engine's explicit value.
        error: why the request failed; its result is then dropped.
        is_scored_late: its scorer runs on a thread of its own, and the others go on meanwhile.
        max_burst_steps: of the bursts that it takes part in; 0: as the engine's config says.
    """

    params: SearchParams
    prompt_texts: dict[str, str | None]
    prompt_ids: dict[str, NDArray[np.int64]]
    seed: int
    stop_ids: NDArray[np.int64]
    eos_ids: frozenset[int]
    first_scores: NDArray[np.float64]
    last_values: NDArray[np.float64]
    value: ExplicitValue
    request_id: int = -1
    deadline: float | None = None
    prompt_outputs: dict[str, Tensor] = field(default_factory=dict)
    kept_logits: dict[int, Tensor] = field(default_factory=dict)
    stats: SearchStats = field(default_factory=SearchStats)
    error: BaseException | None = None
    is_scored_late: bool = False
    max_burst_steps: int = 0

    @classmethod
    def create(
        cls,
        params: SearchParams,
        prompts: Mapping[str, RolePrompt],
        seed: int,
        eos_ids: Sequence[int],
        value: ExplicitValue,
    ) -> LiveRequest:
        """A request whose roles each read their own prompt; `prompts` has one for each that
        guides or scores, and for the base.

        Raises:
            InvalidParameterError: `tuned` and `value` are one trunk here, but read two prompts.
        """
        ends = frozenset() if params.ignore_eos else frozenset(eos_ids)
        taking_part = ("base", *guide_roles(params), *score_roles(params, value))
        if value.shares_trunk and {params.guidance, params.scorer} == {"implicit", "explicit"}:
            tuned, explicit = prompts["tuned"], prompts["value"]
            if not np.array_equal(tuned.token_ids, explicit.token_ids):
                raise InvalidParameterError(
                    "prompts",
                    explicit.text if explicit.text is not None else explicit.token_ids.tolist(),
                    "must be the same for value and tuned, which share their trunk (a value on a "
                    "trunk of its own may read another)",
                )
        request = cls(
            params=params,
            prompt_texts={role: prompt.text for role, prompt in prompts.items()},
            prompt_ids={role: prompts[role].token_ids for role in taking_part},
            seed=seed,
            stop_ids=np.array(sorted(ends.union(params.stop_token_ids)), dtype=np.int64),
            eos_ids=ends,
            first_scores=np.zeros(params.pool_size),
            last_values=np.zeros(params.pool_size),
            value=value,
        )
        if params.deadline_s is not None:
            request.deadline = time.monotonic() + params.deadline_s
        return request

    @property
    def prompt(self) -> str | None:
        """The base model's prompt as text."""
        return self.prompt_texts["base"]

    @property
    def step_roles(self) -> tuple[str, ...]:
        """Roles that forward every sampled token."""
        return ("base", *guide_roles(self.params))

    @property
    def settle_roles(self) -> tuple[str, ...]:
        """Roles that score a token before they have read it, so that they read it at the settle."""
        roles = score_roles(self.params, self.value)
        return () if roles == ("value",) and self.value.kind == "scalar" else roles

    @property
    def is_scored_by_pair(self) -> bool:
        """Whether scoring, not sampling, measures the implicit rewards."""
        return score_roles(self.params, self.value) == GUIDES["implicit"]

    @property
    def text_scorer(self) -> Scorer | None:
        """What scores the candidates as texts; None where roles do."""
        if callable(self.params.scorer):
            return self.params.scorer
        return self.value.function if self.params.scorer == "explicit" else None

    @property
    def is_scored_on_the_trunk(self) -> bool:
        """Whether the tuned model's forwards serve the explicit value too."""
        p = self.params
        return self.value.shares_trunk and (p.guidance, p.scorer) == ("implicit", "explicit")

    @property
    def has_value_in_hand(self) -> bool:
        """Whether sampling measures the explicit value of each token."""
        if self.params.scorer != "explicit" or self.value.kind != "vocabulary":
            return False
        return self.params.guidance == "explicit" or self.is_scored_on_the_trunk

    @property
    def has_value_on_trunk(self) -> bool:
        """Whether that value is measured from the tuned model's hidden states."""
        return self.has_value_in_hand and self.is_scored_on_the_trunk

    @property
    def reads_eos(self) -> bool:
        """Whether a scalar head may read an end of text behind a response."""
        p = self.params
        may_append = bool(p.stop) or p.score_eos_on_truncation
        return may_append and p.scorer == "explicit" and self.value.kind == "scalar"

    def reader(self, role: str) -> str:
        """Whose forwards serve the role: its own, but for a value on the tuned model's trunk."""
        return "tuned" if role == "value" and self.is_scored_on_the_trunk else role

    def num_positions(self, role: str) -> int:
        """The most tokens that the role can have to read."""
        reads_more = self.reads_eos and role == self.reader("value")
        return len(self.prompt_ids[role]) + self.params.max_tokens + reads_more

    def spec(self) -> dict[str, Any]:
        """The arguments of Scheduler.add_request."""
        p = self.params
        return {
            "prompt_lens": [len(self.prompt_ids.get(role, ())) for role in ROLES],
            "step_roles": sum(ROLE_BIT[role] for role in self.step_roles),
            "settle_roles": sum(ROLE_BIT[role] for role in self.settle_roles),
            "guidance": GUIDANCE_KINDS.index(p.guidance),
            "beam_width": p.beam_width,
            "num_candidates": p.num_candidates,
            "chunk_length": p.chunk_length or 0,
            "max_tokens": p.max_tokens,
            "num_outputs": p.n,
            "seed": self.seed,
            "has_scorer": p.scorer != "none",
            "dedup_finished": p.dedup_finished,
            "score_eos_on_truncation": p.score_eos_on_truncation,
            "reads_eos": self.reads_eos,
            "is_scored_late": self.is_scored_late,
            "max_burst_steps": self.max_burst_steps,
        }

    def output(self, result: dict[str, Any], tokenizer: Any) -> RequestOutput:
        """What the user gets of the scheduler's result."""
        for name in ("num_selections", "num_blocks_copied", "peak_blocks"):
            setattr(self.stats, name, result[name])
        return RequestOutput(
            prompt=self.prompt,
            prompt_token_ids=self.prompt_ids["base"].tolist(),
            seed=self.seed,
            outputs=[self._candidate(c, tokenizer) for c in result["candidates"]],
            stats=self.stats,
        )

    def _candidate(self, candidate: dict[str, Any], tokenizer: Any) -> CandidateOutput:
        tokens = candidate["token_ids"].tolist()
        stop_reason: str | int | None = None
        text = decode(tokenizer, tokens)
        if candidate["finish"] == FINISH_STOP:
            stop_reason = None if tokens[-1] in self.eos_ids else tokens[-1]
        elif candidate["finish"] == FINISH_STOP_TEXT:
            stop = self.params.stop[candidate["stop_index"]]
            text = before_stop(tokenizer, tokens, stop)
            stop_reason = stop
        wants_tokens = self.params.logprobs
        return CandidateOutput(
            text=text,
            token_ids=tokens,
            score=candidate["score"],
            implicit_reward=float(candidate["rewards"].sum(dtype=np.float64)),
            cumulative_logprob=float(candidate["logprobs"].sum(dtype=np.float64)),
            base_logprob=float(candidate["base_logprobs"].sum(dtype=np.float64)),
            finish_reason=_FINISH_REASONS[candidate["finish"]],
            stop_reason=stop_reason,
            candidate_id=candidate["candidate_id"],
            token_logprobs=candidate["logprobs"].tolist() if wants_tokens else None,
            token_rewards=candidate["rewards"].tolist() if wants_tokens else None,
        )


def guide_roles(params: SearchParams) -> tuple[str, ...]:
    """Roles that tilt the distribution."""
    return GUIDES[params.guidance]


def score_roles(params: SearchParams, value: ExplicitValue) -> tuple[str, ...]:
    """Roles that only score: a scorer whose models guide already needs no forward of its own."""
    if callable(params.scorer) or params.scorer == params.guidance:
        return ()
    if params.scorer == "explicit" and (
        not value.is_role or (value.shares_trunk and params.guidance == "implicit")
    ):
        return ()
    return GUIDES[params.scorer]


def decode(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """The text of response tokens; "" without a tokenizer."""
    if tokenizer is None:
        return ""
    return tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def before_stop(tokenizer: Any, token_ids: Sequence[int], stop: str) -> str:
    """The text before the stop string that the last token completes."""
    text = decode(tokenizer, token_ids)
    start = _settled_length(tokenizer, token_ids, len(token_ids) - 1) - len(stop) + 1
    return text[: text.index(stop, max(start, 0))]


def find_stop(
    tokenizer: Any, token_ids: Sequence[int], num_old: int, stops: Sequence[str], min_tokens: int
) -> tuple[int, int] | None:
    """Where a stop string first ends among the new tokens token_ids[num_old:].

    Returns:
        (number of tokens up to and with the one that completes it, index of the string), or None.
        An occurrence that is complete before `min_tokens` tokens does not count.
    """
    # A token is a byte at least, so this window holds every stop that can end in the new tokens;
    # the tokens before it keep a tokenizer's treatment of the first piece out of the way.
    window = max(len(stop.encode()) for stop in stops) + 8
    first = _character_start(tokenizer, token_ids, max(0, num_old - window))
    token_ids, num_before = token_ids[first:], num_old - first
    whole = decode(tokenizer, token_ids)
    # A character that is not whole yet may hide those before it: see _settled_length.
    if not whole.endswith(NOT_WHOLE) and not any(stop in whole for stop in stops):
        return None
    settled = _settled_length(tokenizer, token_ids, num_before)
    for end in range(num_before + 1, len(token_ids) + 1):
        text = decode(tokenizer, token_ids[:end])
        if first + end >= min_tokens:
            for index, stop in enumerate(stops):
                if text.find(stop, max(0, settled - len(stop) + 1)) >= 0:
                    return first + end, index
        settled = max(settled, len(text.rstrip(NOT_WHOLE)))
    return None


# What a decoder writes for bytes that are no character, or not one yet.
NOT_WHOLE = "\ufffd"


def _settled_length(tokenizer: Any, token_ids: Sequence[int], end: int) -> int:
    """Characters of token_ids[:end] that further tokens will not change.

    The bytes of the last character may be missing, three of them at most, and a byte-fallback
    decoder then writes NOT_WHOLE for each byte of the run that they stand in, whole characters
    before them included.
    """
    texts = (decode(tokenizer, token_ids[:n]) for n in range(max(end - 3, 0), end + 1))
    return max(len(text.rstrip(NOT_WHOLE)) for text in texts)


def _character_start(tokenizer: Any, token_ids: Sequence[int], first: int) -> int:
    """`first`, or up to three tokens before it, so that no character is cut in two there."""
    for start in range(first, max(first - 4, -1), -1):
        starts = (decode(tokenizer, token_ids[start : start + n]) for n in range(1, 5))
        if any(NOT_WHOLE not in text for text in starts):
            return start
    return first
