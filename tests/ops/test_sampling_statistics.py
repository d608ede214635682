# SPDX-License-Identifier: Apache-2.0
"""guided_sample as a random number generator: distribution, support, independence."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from ivg_fast.ops.guided_sample import guided_sample
from ivg_fast.ops.philox import uniform

NUM_DRAWS = 200_000


def draws(logits: list[Tensor], num_draws: int = NUM_DRAWS, seed: int = 1, **arguments) -> Tensor:
    """Many samples of one row."""
    return guided_sample(
        *logits,
        **arguments,
        seeds=seed,
        candidate_ids=np.arange(num_draws),
        positions=5,
        logit_rows=np.zeros(num_draws, dtype=np.int64),
    ).token_ids


def expected(
    logits: list[Tensor], *, weight=1.0, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0
) -> np.ndarray:
    """The distribution, in numpy, token by token in descending order."""
    base, tuned, untuned = (x[0].double().numpy() for x in logits)
    z = (base + weight * (tuned - untuned)) / temperature
    order = np.argsort(-z)
    p = np.exp(z - z.max())[order]
    if top_k:
        p[top_k:] = 0
    p /= p.sum()
    if top_p < 1:
        p[np.searchsorted(np.cumsum(p), top_p) + 1 :] = 0
    p[p < min_p * p[0]] = 0
    result = np.zeros_like(p)
    result[order] = p / p.sum()
    return result


def deviation(tokens: Tensor, p: np.ndarray) -> float:
    """The chi-square statistic of the draws in standard deviations (Wilson and Hilferty)."""
    counts = np.bincount(tokens.numpy(), minlength=len(p)).astype(float)
    if counts[p == 0].any():
        return math.inf
    mean = p * len(tokens)
    rare = (mean < 10) & (p > 0)
    mean_bins = np.append(mean[mean >= 10], mean[rare].sum() if rare.any() else [])
    count_bins = np.append(counts[mean >= 10], counts[rare].sum() if rare.any() else [])
    freedom = max(len(mean_bins) - 1, 1)
    chi2 = float(((count_bins - mean_bins) ** 2 / np.maximum(mean_bins, 1e-9)).sum())
    spread = 2 / (9 * freedom)
    return ((chi2 / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


@pytest.fixture
def logits() -> list[Tensor]:
    torch.manual_seed(11)
    return [torch.randn(1, 300) for _ in range(3)]


SETTINGS = [
    {},
    {"temperature": 0.7},
    {"weight": -0.5},
    {"top_k": 40},
    {"top_p": 0.8},
    {"min_p": 0.05},
    {"temperature": 1.3, "weight": 0.6, "top_k": 120, "top_p": 0.9, "min_p": 0.02},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: "-".join(s) or "plain")
def test_chi_square(logits, setting):
    assert abs(deviation(draws(logits, **setting), expected(logits, **setting))) < 5


def one_token_more(logits: list[Tensor], top_p: float) -> float:
    """A top_p that keeps one token more than the given one."""
    kept = int((expected(logits, top_p=top_p) > 0).sum())
    mass = np.cumsum(np.sort(expected(logits))[::-1])
    return float((mass[kept - 1] + mass[kept]) / 2)


BUGS: list[tuple[str, dict, Callable[[list[Tensor]], dict]]] = [
    ("temperature off by 5%", {"temperature": 0.7}, lambda _: {"temperature": 0.7 * 1.05}),
    ("weight ignored", {"weight": 0.2}, lambda _: {"weight": 0.0}),
    ("top-k off by one", {"top_k": 40}, lambda _: {"top_k": 41}),
    ("top-p one token more", {"top_p": 0.8}, lambda x: {"top_p": one_token_more(x, 0.8)}),
    ("top-p one token less", {"top_p": 0.8}, lambda _: {"top_p": 0.797}),
    ("top-p before top-k", {"top_k": 30, "top_p": 0.8}, lambda _: {"top_k": 30}),
    ("min-p ignored", {"min_p": 0.05}, lambda _: {}),
]


@pytest.mark.parametrize(("name", "setting", "bug"), BUGS, ids=[bug[0] for bug in BUGS])
def test_chi_square_catches(logits, name, setting, bug):
    assert deviation(draws(logits, **bug(logits)), expected(logits, **setting)) > 8


def test_excluded_tokens_are_never_drawn():
    torch.manual_seed(12)
    base, tuned, untuned = (torch.randn(1, 1100) * 2 for _ in range(3))
    base[0, 0] = base[0, 300:500] = base[0, -1] = -torch.inf
    tuned[0, 1020:1030] = -torch.inf
    untuned[0, 7] = -torch.inf
    z = base + tuned - untuned
    banned = [3, 1098]
    allowed = torch.isfinite(z[0]) & (untuned[0] > -torch.inf)
    allowed[banned] = False
    bans = {"banned_ids": np.tile(banned, (250_000, 1)), "banned_until": 6}
    for seed in range(4):
        tokens = draws([base, tuned, untuned], 250_000, seed, **bans)
        assert bool(allowed[tokens].all())
    top = z[0].masked_fill(~allowed, -torch.inf)
    kept = top >= top.topk(60).values[-1]
    tokens = draws([base, tuned, untuned], 250_000, 9, top_k=60, **bans)
    assert bool(kept[tokens].all())
    # Without the bans a banned token does come up: the draws are enough to see it.
    base[0, banned] = 6.0
    assert bool(torch.isin(draws([base, tuned, untuned], 5000), torch.tensor(banned)).any())


def test_extreme_uniforms_stay_inside_the_support():
    ids = torch.arange(1_000_000)
    u = uniform(77, ids, 5)
    extremes = torch.cat([ids[u < 8e-6], ids[u > 1 - 8e-6]])
    assert len(extremes) >= 4
    base = torch.zeros(1, 3000)
    base[0, :1500] = base[0, 2500:] = -torch.inf
    for setting in ({}, {"min_p": 0.5}, {"top_p": 0.999}, {"top_k": 1000}, {"top_k": 2999}):
        tokens = guided_sample(
            base,
            **setting,
            seeds=77,
            candidate_ids=extremes,
            positions=5,
            logit_rows=torch.zeros_like(extremes),
        ).token_ids
        assert bool(((tokens >= 1500) & (tokens < 2500)).all())


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_sample_does_not_depend_on_the_others(num_threads):
    torch.manual_seed(13)
    num_samples, vocab_size = 12, 40_000
    logits = [torch.randn(num_samples, vocab_size) * 3 for _ in range(3)]
    logits[0][5, 7] = torch.nan
    each = {
        "weight": torch.linspace(-1, 2, num_samples),
        "temperature": torch.tensor([0.0, 0.7, 1.0, 2.0] * 3),
        "top_k": torch.tensor([0, 50, 3] * 4),
        "top_p": torch.tensor([1.0, 0.9] * 6),
        "min_p": torch.tensor([0.0, 0.0, 0.0, 0.1] * 3),
        "seeds": torch.arange(num_samples) + 2**40,
        "candidate_ids": torch.arange(num_samples) * 3,
        "positions": torch.arange(num_samples) * 5,
    }
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        together = guided_sample(*logits, **each)
        order = torch.randperm(num_samples)
        shuffled = guided_sample(
            *(x[order] for x in logits), **{name: values[order] for name, values in each.items()}
        )
        rows = guided_sample(
            *logits, **{n: v[order] for n, v in each.items()}, logit_rows=order.to(torch.int32)
        )
        for field, permuted, by_row in zip(together, shuffled, rows, strict=True):
            assert torch.equal(field[order].nan_to_num(-7), permuted.nan_to_num(-7))
            assert torch.equal(permuted.nan_to_num(-7), by_row.nan_to_num(-7))
        for i in range(num_samples):
            alone = guided_sample(
                *(x[i : i + 1] for x in logits),
                **{name: values[i : i + 1] for name, values in each.items()},
            )
            for field, single in zip(together, alone, strict=True):
                assert torch.equal(field[i : i + 1].nan_to_num(-7), single.nan_to_num(-7))
        assert together.valid.tolist() == [i != 5 for i in range(num_samples)]
        # Control: addresses made of the place in the batch do depend on it.
        placed = {**each, "candidate_ids": torch.arange(num_samples), "temperature": 1.0}
        placed |= {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
        moved = {n: v[order] if isinstance(v, Tensor) else v for n, v in placed.items()}
        moved["candidate_ids"] = placed["candidate_ids"]
        a = guided_sample(*logits, **placed).token_ids[order]
        assert not torch.equal(a, guided_sample(*(x[order] for x in logits), **moved).token_ids)
    finally:
        torch.set_num_threads(before)


def test_equal_inputs_give_equal_ids_always():
    torch.manual_seed(14)
    base = torch.randn(3, 60_000)
    index = {"seeds": 5, "candidate_ids": [1, 2, 3], "positions": 4}
    first = guided_sample(base, top_p=0.9, **index).token_ids
    for _ in range(20):
        assert torch.equal(guided_sample(base, top_p=0.9, **index).token_ids, first)
