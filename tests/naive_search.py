# SPDX-License-Identifier: Apache-2.0
"""The naive search: chunk-level beam search as it is defined, with nothing clever in it.

One candidate at a time, every next-token distribution by a forward of the untouched model over the
whole text (remembered by its token ids, so that a text is not forwarded twice), no cache, no batch.
Models run at their own precision; everything behind their logits is float64. The addressed uniform
and the filters are written anew here, so that they share no line with what they judge.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from ivg_fast.params import ScoreInput, SearchParams


@dataclass(slots=True)
class NaiveModels:
    """Stock models by role.

    `value` has a `backbone` and a `score_head`, a Linear to the vocabulary or to one number; or it
    is a classification model of transformers; or it is a callable that scores texts.
    """

    base: Any
    tokenizer: Any
    tuned: Any = None
    untuned: Any = None
    value: Any = None
    memory: dict[tuple[str, tuple[int, ...]], np.ndarray] = field(default_factory=dict)

    def logits(self, role: str, ids: tuple[int, ...]) -> np.ndarray:
        """float64[V]: what `role` says of the token after `ids`; for "value" the token values."""
        if (role, ids) not in self.memory:
            model = getattr(self, role)
            tokens = torch.tensor([ids])
            with torch.inference_mode():
                if role == "value" and hasattr(model, "backbone"):
                    hidden = model.backbone(tokens, use_cache=False).last_hidden_state[0, -1]
                    row = model.score_head(hidden)
                elif role == "value":
                    row = model(tokens, use_cache=False).logits.reshape(-1)[-1:]
                else:
                    row = model(tokens, use_cache=False).logits[0, -1]
            self.memory[role, ids] = row.double().numpy()
        return self.memory[role, ids]

    def value_of(self, ids: tuple[int, ...]) -> float:
        """V of a whole sequence: w_y . h at the token before its last, y; or the head's number."""
        before = self.logits("value", ids[:-1])
        if len(before) > 1:
            return float(before[ids[-1]])
        return float(self.logits("value", ids)[0])


@dataclass(slots=True)
class NaiveCandidate:
    """A hypothesis. `lineage` is shared by a finished candidate and its clones alone."""

    candidate_id: int
    lineage: int
    token_ids: tuple[int, ...] = ()
    token_logprobs: tuple[float, ...] = ()
    base_logprobs: tuple[float, ...] = ()
    token_rewards: tuple[float, ...] = ()
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    needs_eos: bool = False
    text: str = ""
    score: float = 0.0


@dataclass(slots=True)
class NaiveOutput:
    """As CandidateOutput."""

    text: str
    token_ids: list[int]
    score: float
    implicit_reward: float
    cumulative_logprob: float
    base_logprob: float
    finish_reason: str
    stop_reason: str | int | None
    candidate_id: int
    token_logprobs: list[float]
    token_rewards: list[float]


@dataclass(slots=True)
class Selection:
    """A boundary after `num_tokens` tokens: ids and scores of the pool, best first."""

    num_tokens: int
    candidate_ids: list[int]
    scores: list[float]


@dataclass(slots=True)
class NaiveResult:
    """What the search found, and what it took.

    Attributes:
        outputs: the n best of the last pool, clones once.
        selections: every ranking, the last one included.
        min_gap: the smallest distance at which another arithmetic could decide otherwise: of
            neighbouring scores of different texts in a ranking, of u to an edge of its token's
            interval, of an entry to the border of a filter.
            where equal texts have equal scores, which a batch does not promise to the last bit.
        num_sampled: tokens drawn.
        num_decode_rows: forwards of one token that a cache and a branch leave to do: one a live
            candidate and token inside a chunk, one an unfinished survivor at its end. A role that
            only scores reads the same tokens, and those appended.
        num_appended: ends of text scored behind candidates (stop strings, truncation).
    """

    outputs: list[NaiveOutput]
    selections: list[Selection]
    min_gap: float
    num_sampled: int
    num_decode_rows: int
    num_appended: int


def log_softmax(row: np.ndarray) -> np.ndarray:
    shifted = row - row.max()
    return shifted - math.log(np.exp(shifted).sum())


def philox_uniform(seed: int, candidate_id: int, position: int) -> float:
    """(x0 + 0.5) * 2^-32 of Philox4x32-10 (Salmon et al. 2011), in Python integers."""
    low = 0xFFFFFFFF
    x0, x1, x2, x3 = candidate_id, position, 0, 0
    k0, k1 = seed & low, seed >> 32
    for _ in range(10):
        a, b = 0xD2511F53 * x0, 0xCD9E8D57 * x2
        x0, x1, x2, x3 = (b >> 32) ^ x1 ^ k0, b & low, (a >> 32) ^ x3 ^ k1, a & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return (x0 + 0.5) * 2.0**-32


def filtered(z: np.ndarray, params: SearchParams) -> tuple[np.ndarray, float]:
    """Probabilities after temperature and filters, unnormalised, and the nearest filter border."""
    p = np.exp(log_softmax(z / params.temperature))
    gap = math.inf
    if 0 < params.top_k < len(p):
        ordered = np.sort(p)[::-1]
        smallest = ordered[params.top_k - 1]
        rest = ordered[ordered < smallest]
        if len(rest) and rest[0] > 0:
            gap = min(gap, math.log(smallest / rest[0]))
        p = np.where(p >= smallest, p, 0.0)
    if params.top_p < 1:
        ordered = np.sort(p / p.sum())[::-1]
        mass = np.cumsum(ordered)
        count = next((i + 1 for i, m in enumerate(mass) if m >= params.top_p), len(p))
        gap = min(gap, float(np.abs(mass - params.top_p).min()))
        p = np.where(p / p.sum() >= ordered[count - 1], p, 0.0)
    if params.min_p > 0:
        floor = params.min_p * p.max()
        others = p[(p > 0) & (p < p.max())]  # the largest always stays
        gap = min(gap, float(np.abs(np.log(others / floor)).min(initial=math.inf)))
        p = np.where(p >= floor, p, 0.0)
    return p, gap


def draw(z: np.ndarray, params: SearchParams, u: float) -> tuple[int, float, float]:
    """A token of combined logits float64[V] by the uniform u: (token, log-probability, gap)."""
    if params.temperature == 0:
        token = int(np.argmax(z))  # the first of equals
        second = np.sort(z)[-2] if len(z) > 1 else -math.inf
        return token, float(log_softmax(z)[token]), float(z[token] - second)
    p, gap = filtered(z, params)
    edges = np.cumsum(p)
    total = edges[-1]
    token = int(np.searchsorted(edges, u * total, side="right"))
    below = edges[token - 1] / total if token else -math.inf
    above = edges[token] / total if edges[token] < total else math.inf
    return token, math.log(p[token] / total), min(gap, u - below, above - u)


def completed_stop(
    tokenizer: Any, ids: Sequence[int], stops: Sequence[str]
) -> tuple[int, str] | None:
    """(start, stop string) of the first stop string that the last token of `ids` completes."""
    known = len(tokenizer.decode(list(ids[:-1]), skip_special_tokens=True))
    text = tokenizer.decode(list(ids), skip_special_tokens=True)
    hits = ((text.find(stop, max(0, known - len(stop) + 1)), stop) for stop in stops)
    return min((hit for hit in hits if hit[0] >= 0), default=None, key=lambda hit: hit[0])


# A prompt for all roles, or one by role; a role that has none reads the base's.
PromptIds = Sequence[int] | Mapping[str, Sequence[int]]


def prompts_by_role(prompt_ids: PromptIds) -> dict[str, tuple[int, ...]]:
    given = prompt_ids if isinstance(prompt_ids, Mapping) else {"base": prompt_ids}
    roles = ("base", "tuned", "untuned", "value")
    return {role: tuple(given.get(role, given["base"])) for role in roles}


class NaiveSearch:
    """One request; `run` is the algorithm of chunk-level beam search, top to bottom."""

    def __init__(
        self, models: NaiveModels, prompt_ids: PromptIds, params: SearchParams, seed: int
    ) -> None:
        self.models, self.params, self.seed = models, params, seed
        self.prompts = prompts_by_role(prompt_ids)
        self.eos = models.tokenizer.eos_token_id
        self.gap = math.inf
        self.num_sampled = self.num_decode_rows = 0
        self.appended: set[int] = set()
        self.num_lineages = 0

    # The rules that a planted bug replaces.
    def context(self, role: str, token_ids: tuple[int, ...]) -> tuple[int, ...]:
        return self.prompts[role] + token_ids

    def child_id(self, child: int, rank: int) -> int:
        return child * self.params.beam_width + rank

    def uniform(self, candidate_id: int, position: int) -> float:
        return philox_uniform(self.seed, candidate_id, position)

    def logits(self, role: str, token_ids: tuple[int, ...]) -> np.ndarray:
        """What `role` says of the token after its own prompt and these response tokens."""
        return self.models.logits(role, self.context(role, token_ids))

    def log_ratio(self, token_ids: tuple[int, ...], token: int) -> float:
        """log pi_tuned - log pi_untuned of `token` after these response tokens."""
        tuned, untuned = self.logits("tuned", token_ids), self.logits("untuned", token_ids)
        return float(log_softmax(tuned)[token] - log_softmax(untuned)[token])

    def run(self) -> NaiveResult:
        params = self.params
        chunk_length = params.max_tokens
        if params.chunk_length is not None and params.pool_size > 1:
            chunk_length = params.chunk_length
        pool = [self.newborn(i) for i in range(params.pool_size)]
        selections = []
        num_tokens = 0
        while True:
            goal = min(num_tokens + chunk_length, params.max_tokens)
            for candidate in pool:
                self.extend(candidate, goal, num_tokens)
            num_tokens = goal
            self.score(pool)
            ranking = sorted(pool, key=lambda c: (-c.score, c.candidate_id))
            selections.append(
                Selection(goal, [c.candidate_id for c in ranking], [c.score for c in ranking])
            )
            survivors = ranking[: params.beam_width]
            if goal == params.max_tokens or all(c.finish_reason for c in survivors):
                self.look_for_ties(ranking)
                return NaiveResult(
                    outputs=self.best(ranking),
                    selections=selections,
                    min_gap=self.gap,
                    num_sampled=self.num_sampled,
                    num_decode_rows=self.num_decode_rows,
                    num_appended=len(self.appended),
                )
            self.look_for_ties(ranking[: params.beam_width + 1])
            pool = [child for rank, c in enumerate(survivors) for child in self.children(c, rank)]

    def newborn(self, candidate_id: int) -> NaiveCandidate:
        self.num_lineages += 1
        return NaiveCandidate(candidate_id, self.num_lineages)

    def children(self, parent: NaiveCandidate, rank: int) -> list[NaiveCandidate]:
        family = [
            replace(parent, candidate_id=self.child_id(child, rank))
            for child in range(self.params.num_candidates)
        ]
        if parent.finish_reason:
            return family[:1] if self.params.dedup_finished else family
        self.num_decode_rows += 1
        for child in family:
            self.num_lineages += 1
            child.lineage = self.num_lineages
        return family

    def extend(self, candidate: NaiveCandidate, goal: int, start: int) -> None:
        while not candidate.finish_reason and len(candidate.token_ids) < goal:
            if len(candidate.token_ids) > start:
                self.num_decode_rows += 1
            self.sample(candidate)

    def sample(self, candidate: NaiveCandidate) -> None:
        """Draws the next token and looks whether it ends the candidate."""
        models, params = self.models, self.params
        position = len(candidate.token_ids)
        before = candidate.token_ids
        base = self.logits("base", before)
        z = base
        if params.guidance == "implicit":
            difference = self.logits("tuned", before) - self.logits("untuned", before)
            z = base + params.guidance_weight * difference
        elif params.guidance == "explicit":
            z = base + params.guidance_weight * self.logits("value", before)
        ends = set(params.stop_token_ids)
        if not params.ignore_eos and self.eos is not None:
            ends.add(self.eos)
        if position < params.min_tokens:
            z = z.copy()
            z[list(ends)] = -math.inf
        token, logprob, gap = draw(z, params, self.uniform(candidate.candidate_id, position))
        self.gap = min(self.gap, gap)
        self.num_sampled += 1
        candidate.token_ids += (token,)
        candidate.token_logprobs += (logprob,)
        candidate.base_logprobs += (float(log_softmax(base)[token]),)
        if "implicit" in (params.guidance, params.scorer):
            candidate.token_rewards += (self.log_ratio(before, token),)
        else:
            candidate.token_rewards += (0.0,)
        candidate.text = models.tokenizer.decode(
            list(candidate.token_ids), skip_special_tokens=True
        )
        hit = completed_stop(models.tokenizer, candidate.token_ids, params.stop)
        if token in ends:
            candidate.finish_reason = "stop"
            is_eos = token == self.eos and not params.ignore_eos
            candidate.stop_reason = None if is_eos else token
        elif hit and position + 1 >= params.min_tokens:
            candidate.finish_reason, candidate.stop_reason = "stop", hit[1]
            candidate.text = candidate.text[: hit[0]]
            candidate.needs_eos = True
        elif position + 1 == params.max_tokens:
            candidate.finish_reason = "length"
            candidate.needs_eos = params.score_eos_on_truncation

    def score(self, pool: list[NaiveCandidate]) -> None:
        models, scorer = self.models, self.params.scorer
        for candidate in pool:
            said = candidate.token_ids
            add_eos = candidate.needs_eos and self.eos is not None
            if add_eos and scorer in ("implicit", "explicit"):
                self.appended.add(candidate.lineage)
            if scorer == "implicit":
                candidate.score = math.fsum(candidate.token_rewards)
                if add_eos:
                    candidate.score += self.log_ratio(said, self.eos)
            elif scorer == "explicit" and isinstance(models.value, torch.nn.Module):
                scored = (*said, self.eos) if add_eos else said
                candidate.score = self.value_of(self.context("value", scored))
        if scorer == "explicit" and not isinstance(models.value, torch.nn.Module):
            scorer = models.value
        if callable(scorer):
            for candidate, value in zip(pool, scorer([self.seen(c) for c in pool]), strict=True):
                candidate.score = float(value)

    # A rule that a planted bug replaces.
    def value_of(self, ids: tuple[int, ...]) -> float:
        return self.models.value_of(ids)

    def seen(self, candidate: NaiveCandidate) -> ScoreInput:
        decode = self.models.tokenizer.decode
        reader = "value" if self.params.scorer == "explicit" else "base"
        return ScoreInput(
            prompt=decode(list(self.prompts[reader]), skip_special_tokens=True),
            response=decode(list(candidate.token_ids), skip_special_tokens=True),
            token_ids=candidate.token_ids,
            is_finished=candidate.finish_reason is not None,
            ends_text=candidate.finish_reason == "stop" or candidate.needs_eos,
        )

    def look_for_ties(self, ranking: list[NaiveCandidate]) -> None:
        scorer = self.params.scorer
        for better, worse in itertools.pairwise(ranking):
            gap = better.score - worse.score
            # Equal tokens tie in any arithmetic, and so do equal returns of a callable.
            if (
                scorer == "none"
                or better.token_ids == worse.token_ids
                or (callable(scorer) and not gap)
            ):
                continue
            self.gap = min(self.gap, gap)

    def best(self, ranking: list[NaiveCandidate]) -> list[NaiveOutput]:
        seen: set[int] = set()
        outputs = []
        for c in ranking:
            if c.lineage in seen:
                continue
            seen.add(c.lineage)
            outputs.append(
                NaiveOutput(
                    text=c.text,
                    token_ids=list(c.token_ids),
                    score=c.score,
                    implicit_reward=math.fsum(c.token_rewards),
                    cumulative_logprob=math.fsum(c.token_logprobs),
                    base_logprob=math.fsum(c.base_logprobs),
                    finish_reason=c.finish_reason or "abort",  # the survivors were all finished
                    stop_reason=c.stop_reason,
                    candidate_id=c.candidate_id,
                    token_logprobs=list(c.token_logprobs),
                    token_rewards=list(c.token_rewards),
                )
            )
        return outputs[: self.params.n]


def naive_search(
    models: NaiveModels, prompt_ids: PromptIds, params: SearchParams, seed: int
) -> NaiveResult:
    """Runs one request."""
    return NaiveSearch(models, prompt_ids, params, seed).run()
