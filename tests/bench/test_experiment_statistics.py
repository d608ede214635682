# SPDX-License-Identifier: Apache-2.0
"""Statistics of the experiments: against exact distributions, enumerated, and closed forms."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from tiny_models import tiny_model

from bench.experiments.measures import response_logprobs
from bench.experiments.statistics import (
    best_of_n_bound,
    bootstrap,
    distinct_n,
    perplexity,
    selection_bound,
)
from ivg_fast import Engine, EngineConfig, SearchParams


def test_distinct_n() -> None:
    texts = ["a b a b a", "x y z", "lonely"]
    # pairs: {ab, ba} of 4, {xy, yz} of 2, none; words: 2 of 5, 3 of 3, 1 of 1
    assert distinct_n(texts, 2) == pytest.approx((2 / 4 + 1) / 2)
    assert distinct_n(texts, 1) == pytest.approx((2 / 5 + 1 + 1) / 3)
    assert distinct_n(texts, 3) == pytest.approx((2 / 3 + 1) / 2)
    assert math.isnan(distinct_n(["one", ""], 2))


def _normal_interval(values: np.ndarray) -> tuple[float, float]:
    half = 1.96 * values.std(ddof=1) / math.sqrt(len(values))
    return values.mean() - half, values.mean() + half


def _near(found: list[float], wanted: tuple[float, float]) -> bool:
    return bool(np.abs(np.subtract(found, wanted)).max() < 0.05 * (wanted[1] - wanted[0]))


def test_bootstrap_is_the_normal_interval_of_many_prompts() -> None:
    rng = np.random.default_rng(3)
    prompts = 4 * rng.normal(size=500)  # what two methods share on a prompt
    first, second = (prompts + rng.exponential(size=500) + shift for shift in (1.0, 0.0))
    paired = _normal_interval(first - second)
    assert _near(bootstrap(first - second), paired)
    # Controls: without the pairing the interval is wider, and one of 90% is narrower.
    assert not _near(bootstrap(first - rng.permutation(second)), paired)
    rng = np.random.default_rng(0)
    index = rng.integers(0, 500, (10_000, 500))
    narrow = np.quantile((first - second)[index].mean(-1), [0.05, 0.95]).tolist()
    assert not _near(narrow, paired)


def test_perplexity_is_a_mean_over_tokens() -> None:
    # Four tokens of probability 1/2, one of 1/8: not the mean of the two texts' perplexities.
    logprobs, counts = [4 * math.log(0.5), math.log(0.125)], [4, 1]
    assert perplexity(logprobs, counts) == pytest.approx(2 ** (7 / 5))


# --- KL of a search, enumerated ------------------------------------------------------------------


def _search_distribution(
    q: np.ndarray, params: SearchParams, score: dict[tuple[int, ...], float]
) -> dict[tuple[int, ...], float]:
    """What CBS over tokens of probabilities `q` returns, over all draws that it can make."""
    width, children = params.beam_width, params.num_candidates
    pool = width * children
    beams: dict[tuple[tuple[int, ...], ...], float] = {((),) * width: 1.0}
    for begin in range(0, params.max_tokens, params.chunk_length or params.max_tokens):
        end = min(begin + (params.chunk_length or params.max_tokens), params.max_tokens)
        chunks = list(itertools.product(range(len(q)), repeat=end - begin))
        after: dict[tuple[tuple[int, ...], ...], float] = defaultdict(float)
        keep = 1 if end == params.max_tokens else width
        for survivors, mass in beams.items():
            for drawn in itertools.product(chunks, repeat=pool):
                candidates = [survivors[i // children] + chunk for i, chunk in enumerate(drawn)]
                best = sorted(range(pool), key=lambda i: -score[candidates[i]])[:keep]
                probability = mass * math.prod(q[t] for chunk in drawn for t in chunk)
                after[tuple(candidates[i] for i in best)] += probability
        beams = dict(after)
    return {survivors[0]: mass for survivors, mass in beams.items()}


def _kl(found: dict[tuple[int, ...], float], q: np.ndarray) -> float:
    return sum(p * math.log(p / math.prod(q[t] for t in y)) for y, p in found.items() if p)


_SEARCHES = [
    SearchParams.best_of_n(3, max_tokens=2),
    SearchParams.cbs(max_tokens=3, beam_width=1, num_candidates=3, chunk_length=1),
    SearchParams.cbs(max_tokens=2, beam_width=2, num_candidates=2, chunk_length=1),
    SearchParams.cbs(max_tokens=3, beam_width=2, num_candidates=2, chunk_length=2),
    SearchParams.cbs(max_tokens=3, beam_width=3, num_candidates=1, chunk_length=1),
]


@pytest.mark.parametrize("params", _SEARCHES)
def test_a_search_stays_below_its_bound(params: SearchParams) -> None:
    rng = np.random.default_rng(11)
    largest = 0.0
    for _ in range(6):
        q = rng.dirichlet([0.7, 0.7] if params.pool_size > 3 else [0.7, 0.7, 0.7])
        texts = (
            y
            for n in range(1, params.max_tokens + 1)
            for y in itertools.product(range(len(q)), repeat=n)
        )
        found = _search_distribution(q, params, {y: rng.normal() for y in texts})
        assert sum(found.values()) == pytest.approx(1)
        kl = _kl(found, q)
        largest = max(largest, kl)
        assert kl <= selection_bound(params) + 1e-9
    assert largest > 0.1 * selection_bound(params)  # not a bound by being huge


def test_a_bound_a_chunk_is_none_for_wide_beams() -> None:
    """Control: best-of-K a chunk, right for W = 1, is exceeded where W survivors compete."""
    params = SearchParams.cbs(max_tokens=1, beam_width=3, num_candidates=1, chunk_length=1)
    q = np.array([0.2, 0.8])
    kl = _kl(_search_distribution(q, params, {(0,): 1.0, (1,): 0.0}), q)
    assert kl > best_of_n_bound(math.log(params.num_candidates))
    assert kl <= selection_bound(params)


def test_best_of_n_comes_near_its_bound() -> None:
    """P(rank r of V equal ones) = ((r+1)^N - r^N) / V^N."""
    size, n = 4000, 16
    r = np.arange(size, dtype=np.float64)
    p = ((r + 1) / size) ** n - (r / size) ** n
    kl = float((p[p > 0] * np.log(p[p > 0] * size)).sum())
    bound = selection_bound(SearchParams.best_of_n(n, max_tokens=5))
    assert bound == pytest.approx(math.log(16) - 15 / 16)
    assert bound - 0.01 < kl <= bound


def test_nothing_to_select_costs_nothing() -> None:
    assert selection_bound(SearchParams.eft(max_tokens=50)) == 0
    assert selection_bound(SearchParams(max_tokens=50, num_candidates=8)) == 0
    wide = SearchParams.ivg(max_tokens=50)
    n = 4 * 4**10
    assert selection_bound(wide) == pytest.approx(math.log(n) - (n - 1) / n)


# --- log-probabilities, and KL of token-wise guidance --------------------------------------------


def test_response_logprobs_of_padded_batches() -> None:
    model = tiny_model("gpt2", seed=5)
    rng = np.random.default_rng(0)
    pairs = [
        (rng.integers(0, 97, n).tolist(), rng.integers(0, 97, m).tolist())
        for n, m in zip(rng.integers(1, 9, 37), rng.integers(0, 12, 37), strict=True)
    ]
    found = np.array(response_logprobs(model, pairs, (0.7, 1.0)))
    wanted = []
    for prompt, response in pairs:
        logits = model(torch.tensor([prompt + response])).logits[0].double()
        for temperature in (0.7, 1.0):
            table = torch.log_softmax(logits / temperature, -1)
            places = range(len(prompt) - 1, len(prompt) + len(response) - 1)
            wanted.append(sum(float(table[i, response[k]]) for k, i in enumerate(places)))
    np.testing.assert_allclose(found, np.array(wanted).reshape(-1, 2), atol=2e-4)
    moved = [(p, r[1:] + r[:1]) for p, r in pairs]  # control: the right tokens in wrong places
    assert np.abs(np.array(response_logprobs(model, moved, (0.7, 1.0))) - found).max() > 1


def test_log_ratio_is_the_kl_of_token_wise_guidance() -> None:
    """Two tokens of 97 under EFT: the mean log-ratio against the KL over all 97^2 responses."""
    names = {"base": 1, "tuned": 2, "untuned": 3}
    models = {name: tiny_model("gpt2", seed=seed) for name, seed in names.items()}
    prompt, temperature, weight, count = [5, 17, 40], 0.7, 0.3, 1500

    def tables(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        base, tuned, untuned = (m(ids).logits[:, -1].double() for m in models.values())
        guided = (base + weight * (tuned - untuned)) / temperature
        return guided.log_softmax(-1), (base / temperature).log_softmax(-1)

    guided, base = tables(torch.tensor([prompt]))
    after = torch.tensor([[*prompt, y] for y in range(97)])
    guided_2, base_2 = tables(after)
    p = guided[0].exp()
    exact = float((p * (guided - base)[0]).sum())
    exact += float((p * (guided_2.exp() * (guided_2 - base_2)).sum(-1)).sum())

    params = SearchParams.eft(
        max_tokens=2, guidance_weight=weight, temperature=temperature, ignore_eos=True, seed=8
    )
    with Engine(
        models["base"],
        tuned=models["tuned"],
        untuned=models["untuned"],
        config=EngineConfig(num_blocks=600),
    ) as engine:
        outputs = [o.outputs[0] for o in engine.generate([prompt] * count, params)]
    pairs = [(prompt, output.token_ids) for output in outputs]
    drawn = np.array([output.cumulative_logprob for output in outputs])
    rows = np.array(response_logprobs(models["base"], pairs, (temperature, 1.0)))
    ratio = drawn - rows[:, 0]
    error = ratio.std() / math.sqrt(count)
    assert abs(ratio.mean() - exact) < 4 * error
    # Control: against the base at temperature 1 it is another number.
    assert abs((drawn - rows[:, 1]).mean() - exact) > 4 * error
