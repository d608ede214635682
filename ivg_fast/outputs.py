# SPDX-License-Identifier: Apache-2.0
"""What a request returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "deadline"]


@dataclass(frozen=True, slots=True)
class CandidateOutput:
    """One response.

    Attributes:
        text: the response, special tokens left out and cut before a stop string.
        token_ids: all sampled tokens: the end of text, or those that complete a stop string,
            included.
        score: by the scorer, of the whole response; of what stood at the last selection where an
            abort or a deadline came between two; 0.0 with scorer "none" or before the first one.
        implicit_reward: sum of log tuned - log untuned over `token_ids`; 0.0 where the request does
            not use the pair, and for tokens that a scorer which does not guide has not seen.
        cumulative_logprob: log-probability of `token_ids` under the distribution they were drawn
            from.
        base_logprob: the same under the base model at temperature 1.
        finish_reason: "stop", "length", "abort" or "deadline". "abort" is also what an unfinished
            candidate has that ranked below the winners when these ended the search.
        stop_reason: the stop string, or which of `stop_token_ids`, ended it; None otherwise, an end
            of text included.
        candidate_id: of the last pool.
        token_logprobs: per token, as in cumulative_logprob; None unless asked for.
        token_rewards: per token, as in implicit_reward; None unless asked for.
    """

    text: str
    token_ids: list[int]
    score: float
    implicit_reward: float
    cumulative_logprob: float
    base_logprob: float
    finish_reason: FinishReason
    stop_reason: str | int | None
    candidate_id: int
    token_logprobs: list[float] | None = None
    token_rewards: list[float] | None = None


@dataclass(slots=True)
class SearchStats:
    """Exact counters of one request, the same on every run with the same burst length.

    Attributes:
        prefill_tokens: prompt tokens forwarded, by role.
        decode_tokens: sampled tokens forwarded by the roles that tilt the distribution (base
            included).
        score_tokens: sampled tokens forwarded by the roles that only score.
        num_selections: boundaries at which candidates were ranked.
        num_blocks_copied: KV blocks copied by forks.
        peak_blocks: KV blocks held at once, at most.
        num_host_syncs: times that the host waited for a GPU inside the request's bursts, that is
            between their first launch and the reading of what they drew; 0 on the CPU.
    """

    prefill_tokens: dict[str, int] = field(default_factory=dict)
    decode_tokens: dict[str, int] = field(default_factory=dict)
    score_tokens: dict[str, int] = field(default_factory=dict)
    num_selections: int = 0
    num_blocks_copied: int = 0
    peak_blocks: int = 0
    num_host_syncs: int = 0


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A prompt's responses, best first, `n` at most (fewer where the last pool held fewer distinct
    ones).

    Attributes:
        prompt: the prompt's text; None where token ids were given.
        prompt_token_ids: the base model's.
        seed: the one that was used.
        outputs: best first.
        stats: what it took.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    seed: int
    outputs: list[CandidateOutput]
    stats: SearchStats
