# SPDX-License-Identifier: Apache-2.0
"""Chunk-level beam search as it is written down: full token lists, one candidate at a time.

No blocks, no batch, no bursts. The "language model" is a hash: what a candidate draws depends on
the request's seed, the candidate's id, the response index and everything that it can read.
"""

from __future__ import annotations

import dataclasses

EOS = 0
VOCAB_SIZE = 9
STOP_TEXT = (1, 2)  # these two tokens in a row complete the stop string
STOP_INDEX = 3
NONE, STOP, STOP_TEXT_FOUND, LENGTH, ABORT, DEADLINE = range(6)

# Roles and what a scorer needs of them.
BASE, TUNED, UNTUNED, VALUE = range(4)
NUM_ROLES = 4


@dataclasses.dataclass
class Request:
    prompt_lens: list[int]
    beam_width: int
    num_candidates: int
    chunk_length: int
    max_tokens: int
    num_outputs: int
    seed: int
    scorer: str  # "none" | "in_hand" | "measured" | "vocab_head" | "scalar_head"
    eos_rate: int  # of 100
    dedup_finished: bool = False
    score_eos_on_truncation: bool = False
    guidance: int = 0

    @property
    def step_roles(self) -> int:
        pair = (1 << TUNED) | (1 << UNTUNED)
        return 1 << BASE | (pair if self.scorer == "in_hand" else 0)

    @property
    def settle_roles(self) -> int:
        pair = (1 << TUNED) | (1 << UNTUNED)
        return {"vocab_head": 1 << VALUE, "measured": pair}.get(self.scorer, 0)

    @property
    def score_roles(self) -> list[int]:
        """Roles that read the new tokens only when they score them."""
        heads = {"measured": [TUNED, UNTUNED], "vocab_head": [VALUE], "scalar_head": [VALUE]}
        return heads.get(self.scorer, [])

    def kwargs(self) -> dict:
        """The arguments of Scheduler.add_request."""
        values = dataclasses.asdict(self)
        del values["eos_rate"]
        values["has_scorer"] = values.pop("scorer") != "none"
        return {
            **values,
            "step_roles": self.step_roles,
            "settle_roles": self.settle_roles,
            "reads_eos": self.scorer == "scalar_head",
        }


def draw_token(request: Request, candidate_id: int, history: tuple[int, ...]) -> int:
    """The next token: a function of the address of the uniform and of what was read."""
    mixed = hash((request.seed, candidate_id, len(history), *history)) & 0x7FFFFFFF
    if mixed % 100 < request.eos_rate:
        return EOS
    return 1 + (mixed // 100) % (VOCAB_SIZE - 1)


def reward_of(request: Request, history: tuple[int, ...]) -> float:
    """Implicit reward of the last token: few bits, so that sums are exact in any order."""
    if request.scorer not in ("in_hand", "measured"):
        return 0.0
    return ((hash((17, *history)) & 0xFFFF) % 9 - 4) / 4


def score_of(request: Request, tokens: tuple[int, ...], reward: float, adds_eos: bool) -> float:
    """Few distinct values, so that there are ties."""
    if request.scorer == "none":
        return 0.0
    if request.scorer in ("in_hand", "measured"):
        return reward + (0.5 if adds_eos else 0.0)
    return float((hash((request.seed, adds_eos, *tokens)) & 0xFFFF) % 5)


def completes_stop_text(tokens: tuple[int, ...]) -> bool:
    return tokens[-2:] == STOP_TEXT


@dataclasses.dataclass
class Candidate:
    id: int
    tokens: tuple[int, ...] = ()
    rewards: tuple[float, ...] = ()
    finish: int = NONE
    score: float = 0.0
    is_scored: bool = False
    origin: int = -1  # of clones: which finished hypothesis this is


@dataclasses.dataclass
class Result:
    candidates: list[Candidate]
    num_selections: int
    histories: set[tuple[int, ...]]  # of every candidate at every boundary


def search(request: Request) -> Result:
    """CBS(W, K, L) of one request, alone."""
    W, K = request.beam_width, request.num_candidates
    L = request.chunk_length or request.max_tokens
    if W * K == 1:
        L = request.max_tokens  # one candidate: nothing to select
    pool = [Candidate(i) for i in range(W * K)]
    histories: set[tuple[int, ...]] = set()
    num_selections = 0
    length = 0
    while True:
        length = min(length + L, request.max_tokens)
        for candidate in pool:
            while candidate.finish == NONE and len(candidate.tokens) < length:
                token = draw_token(request, candidate.id, candidate.tokens)
                candidate.tokens += (token,)
                candidate.rewards += (reward_of(request, candidate.tokens),)
                if token == EOS:
                    candidate.finish = STOP
                elif completes_stop_text(candidate.tokens):
                    candidate.finish = STOP_TEXT_FOUND
                elif len(candidate.tokens) == request.max_tokens:
                    candidate.finish = LENGTH
            histories.add(candidate.tokens)
        for candidate in pool:
            if not candidate.is_scored:
                adds_eos = candidate.finish == STOP_TEXT_FOUND or (
                    candidate.finish == LENGTH and request.score_eos_on_truncation
                )
                candidate.score = score_of(
                    request, candidate.tokens, sum(candidate.rewards), adds_eos
                )
        ranked = sorted(pool, key=lambda c: (-c.score, c.id))
        num_selections += 1
        if length == request.max_tokens or all(c.finish for c in ranked[:W]):
            return Result(n_best(ranked, request.num_outputs), num_selections, histories)
        for rank, survivor in enumerate(ranked[:W]):
            if survivor.finish and not survivor.is_scored:
                survivor.origin = num_selections * W + rank
                survivor.is_scored = True
        pool = [
            dataclasses.replace(survivor, id=c * W + rank)
            for c in range(K)
            for rank, survivor in enumerate(ranked[:W])
            if c == 0 or not (request.dedup_finished and survivor.finish)
        ]


def n_best(ranked: list[Candidate], n: int) -> list[Candidate]:
    best: list[Candidate] = []
    for candidate in ranked:
        is_clone = candidate.origin >= 0 and any(b.origin == candidate.origin for b in best)
        if not is_clone:
            finish = candidate.finish or ABORT  # the search ended before it did
            best.append(dataclasses.replace(candidate, finish=finish))
    return best[:n]
