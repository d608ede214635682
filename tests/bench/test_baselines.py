# SPDX-License-Identifier: Apache-2.0
"""Both baselines against naive recomputation, exact laws on a tiny vocabulary, and each other."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.baselines import (
    ReferenceStyleIVG,
    TunedPyTorchIVG,
    ValueModel,
    common,
    inverse_cdf,
    tree_search,
)
from ivg_fast.params import SearchParams

PROVIDERS = {"reference_style": ReferenceStyleIVG, "tuned_pytorch": TunedPyTorchIVG}
PROMPTS = [[1, 2, 3, 4, 5], [4], [5, 2, 3]]
GRID = list(itertools.product(("none", "implicit", "explicit"), ("implicit", "explicit")))


class Family:
    """Random tiny models and naive float64 measures of whole responses."""

    def __init__(self, vocab_size: int, name: str = "gpt2") -> None:
        roles = ("base", "tuned", "untuned", "value")
        self.models = {
            role: tiny_model(name, vocab_size=vocab_size, seed=seed)
            for seed, role in enumerate(roles, 1)
        }
        generator = torch.Generator().manual_seed(9)
        self.head = torch.randn(vocab_size, 32, generator=generator) / 5
        self.eos = vocab_size - 1
        self.exact = {
            role: tiny_model(name, vocab_size=vocab_size, seed=seed, dtype=torch.float64)
            for seed, role in enumerate(roles, 1)
        }

    def provider(self, name: str, eos: bool = True) -> ReferenceStyleIVG | TunedPyTorchIVG:
        value = ValueModel(self.models["value"].base_model, self.head)
        pair = self.models["tuned"], self.models["untuned"]
        eos_ids = [self.eos] if eos else []
        return PROVIDERS[name](self.models["base"], *pair, value, eos_token_ids=eos_ids)

    def logits(self, role: str, ids: Tensor) -> Tensor:
        """[B, S, V] of whole texts [B, S], from scratch."""
        if role == "value":
            hidden = self.exact[role].base_model(ids).last_hidden_state
            return hidden @ self.head.double().T
        return self.exact[role](ids).logits

    def combined(self, guidance: str, weight: float, ids: Tensor) -> Tensor:
        """[B, V] guided logits behind the texts."""
        z = self.logits("base", ids)[:, -1]
        if guidance == "implicit":
            pair = self.logits("tuned", ids)[:, -1] - self.logits("untuned", ids)[:, -1]
            return z + weight * pair
        return z + weight * self.logits("value", ids)[:, -1] if guidance == "explicit" else z

    def score(self, scorer: str, prompt_length: int, ids: Tensor) -> Tensor:
        """[B] scores of whole texts."""
        if scorer == "explicit":
            return self.logits("value", ids)[:, -2].gather(1, ids[:, -1:])[:, 0]
        targets = ids[:, 1:, None]
        tuned, untuned = (
            torch.log_softmax(self.logits(role, ids)[:, :-1], -1).gather(2, targets)[..., 0]
            for role in ("tuned", "untuned")
        )
        return (tuned - untuned)[:, prompt_length - 1 :].sum(1)


@pytest.fixture(scope="module")
def family() -> Family:
    return Family(37)


@pytest.fixture(scope="module")
def tiny_family() -> Family:
    return Family(6)


@pytest.mark.parametrize("name", PROVIDERS)
@pytest.mark.parametrize("guidance", ["none", "implicit", "explicit"])
def test_greedy_is_the_naive_argmax(family: Family, name: str, guidance: str) -> None:
    params = SearchParams(max_tokens=12, guidance=guidance, guidance_weight=0.7, temperature=0)
    results = family.provider(name).generate(PROMPTS, params)
    for prompt, result in zip(PROMPTS, results, strict=True):
        ids = list(prompt)
        while len(ids) < len(prompt) + 12 and ids[len(prompt) :][-1:] != [family.eos]:
            ids.append(int(family.combined(guidance, 0.7, torch.tensor([ids])).argmax()))
        assert result.token_ids == ids[len(prompt) :]
        assert result.score == 0.0


@pytest.mark.parametrize("name", ["llama", "qwen3", "opt"])
def test_other_decoders_agree_when_greedy(name: str) -> None:
    family = Family(37, name)
    params = SearchParams(max_tokens=8, guidance="implicit", scorer="explicit", temperature=0)
    ours, theirs = (family.provider(p).generate(PROMPTS, params) for p in PROVIDERS)
    assert [r.token_ids for r in ours] == [r.token_ids for r in theirs]
    assert [r.score for r in ours] == pytest.approx([r.score for r in theirs], abs=1e-4)


@pytest.mark.parametrize("name", PROVIDERS)
@pytest.mark.parametrize(("guidance", "scorer"), GRID)
@pytest.mark.parametrize("ignore_eos", [True, False])
def test_scores_equal_a_recompute(
    family: Family, name: str, guidance: str, scorer: str, ignore_eos: bool
) -> None:
    provider = family.provider(name)
    shapes = [(4, 4, 5), (2, 3, 1), (1, 4, None)]
    if name == "tuned_pytorch":
        shapes += [(3, 12, 7), (2, 40, 5), (1, 1, 3)]
    for width, fanout, length in shapes:
        params = SearchParams(
            max_tokens=13,
            guidance=guidance,
            scorer=scorer,
            beam_width=width,
            num_candidates=fanout,
            chunk_length=length,
            temperature=0.7,
            ignore_eos=ignore_eos,
        )
        results = provider.generate(PROMPTS, params, seed=3)
        assert results == provider.generate(PROMPTS, params, seed=3)
        for prompt, result in zip(PROMPTS, results, strict=True):
            ids = torch.tensor([prompt + result.token_ids])
            expected = float(family.score(scorer, len(prompt), ids))
            assert result.score == pytest.approx(expected, abs=1e-4)
            is_stopped = not ignore_eos and result.token_ids[-1] == family.eos
            assert len(result.token_ids) == 13 or is_stopped
            assert ignore_eos or family.eos not in result.token_ids[:-1]


def test_a_batch_draws_what_its_prompts_draw_alone(family: Family) -> None:
    provider = family.provider("tuned_pytorch")
    params = SearchParams.ivg(max_tokens=12, temperature=0.7)
    together = provider.generate(PROMPTS, params, seed=5)
    alone = [provider.generate([p], params, seed=5 + i)[0] for i, p in enumerate(PROMPTS)]
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]
    assert together != provider.generate(PROMPTS, params, seed=6)


def test_siblings_in_one_row_draw_what_they_draw_in_rows_of_their_own(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider = family.provider("tuned_pytorch")
    for guidance, scorer in GRID:
        params = SearchParams.cbs(
            max_tokens=12, guidance=guidance, scorer=scorer, temperature=0.7, chunk_length=4
        )
        shared = provider.generate(PROMPTS, params, seed=5)
        with monkeypatch.context() as patch:
            patch.setattr(tree_search, "MAX_TREE_SLOTS", 0)
            apart = provider.generate(PROMPTS, params, seed=5)
        assert [r.token_ids for r in shared] == [r.token_ids for r in apart]


def test_constant_shapes_change_nothing(family: Family) -> None:
    fixed = TunedPyTorchIVG(
        family.models["base"],
        family.models["tuned"],
        family.models["untuned"],
        ValueModel(family.models["value"].base_model, family.head),
        eos_token_ids=[family.eos],
        use_constant_shapes=True,
    )
    for guidance, scorer in GRID:
        params = SearchParams.cbs(max_tokens=12, guidance=guidance, scorer=scorer, temperature=0.7)
        expected = family.provider("tuned_pytorch").generate(PROMPTS, params, seed=5)
        results = fixed.generate(PROMPTS, params, seed=5)
        assert [r.token_ids for r in results] == [r.token_ids for r in expected]


def winner_law(family: Family, params: SearchParams) -> dict[tuple[int, ...], float]:
    """The exact law of the response to PROMPTS[0] for L = 1, T = 2, without EOS."""
    prompt, size = PROMPTS[0], family.eos + 1
    width, fanout = params.beam_width, params.num_candidates

    def law(ids: Tensor) -> Tensor:
        z = family.combined(params.guidance, params.guidance_weight, ids)
        return torch.softmax(z / params.temperature, -1)

    def score(rows: Tensor) -> Tensor:
        return family.score(params.scorer, len(prompt), rows)

    start = torch.tensor([prompt])
    firsts = torch.cat([start.repeat(size, 1), torch.arange(size)[:, None]], dim=1)
    first_law, first_score = law(start)[0].tolist(), score(firsts).tolist()
    seconds = torch.cat(
        [firsts.repeat_interleave(size, 0), torch.arange(size).repeat(size)[:, None]], dim=1
    )
    second_law, second_score = law(firsts), score(seconds).view(size, size)
    survivors: dict[tuple[int, ...], float] = {}
    for pool in itertools.product(range(size), repeat=width * fanout):
        kept = tuple(sorted(pool, key=lambda y: -first_score[y])[:width])
        mass = 1.0
        for y in pool:
            mass *= first_law[y]
        survivors[kept] = survivors.get(kept, 0.0) + mass
    winners: dict[tuple[int, ...], float] = {}
    for kept, mass in survivors.items():
        ends = [(float(second_score[y, e]), y, e) for y in set(kept) for e in range(size)]
        below = 0.0
        for value, y, e in sorted(ends):
            cumulative = 1.0
            for parent in kept:
                at_most = second_law[parent][second_score[parent] <= value].sum()
                cumulative *= float(at_most) ** fanout
            winners[(y, e)] = winners.get((y, e), 0.0) + mass * (cumulative - below)
            below = cumulative
    return winners


def chi_square_p(results: list[tuple[int, ...]], law: dict[tuple[int, ...], float]) -> float:
    """p-value of the observed responses; cells that expect fewer than 5 are pooled."""
    counts = {cell: results.count(cell) for cell in law}
    assert sum(counts.values()) == len(results)
    expected = {cell: mass * len(results) for cell, mass in law.items()}
    common_cells = [cell for cell, mean in expected.items() if mean >= 5]
    pairs = [(counts[cell], expected[cell]) for cell in common_cells]
    rare = [cell for cell in law if cell not in common_cells]
    rest = sum(expected[cell] for cell in rare)
    if rest > 1:
        pairs.append((sum(counts[cell] for cell in rare), rest))
    statistic = sum((seen - mean) ** 2 / mean for seen, mean in pairs)
    half = torch.tensor([(len(pairs) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


@pytest.mark.parametrize(
    ("name", "guidance", "scorer"),
    [
        ("reference_style", "implicit", "explicit"),
        ("tuned_pytorch", "implicit", "explicit"),
        ("tuned_pytorch", "none", "implicit"),
    ],
)
def test_winners_follow_the_exact_law(
    tiny_family: Family, name: str, guidance: str, scorer: str
) -> None:
    params = SearchParams(
        max_tokens=2,
        beam_width=2,
        num_candidates=2,
        chunk_length=1,
        guidance=guidance,
        guidance_weight=0.5,
        scorer=scorer,
        temperature=1.5,
        ignore_eos=True,
    )
    other = {"explicit": "implicit", "implicit": "explicit"}[scorer]
    provider = tiny_family.provider(name)
    num_prompts = 1500 if name == "tuned_pytorch" else 250
    results = provider.generate(PROMPTS[:1] * num_prompts, params, seed=torch.seed() % 2**31)
    winners = [tuple(result.token_ids) for result in results]
    law = winner_law(tiny_family, params)
    assert sum(law.values()) == pytest.approx(1)
    assert chi_square_p(winners, law) > 1e-5
    bugs = [{"scorer": other}]
    if guidance != "none":
        bugs.append({"guidance_weight": 0.0})
    for bug in bugs:
        law = winner_law(tiny_family, dataclasses.replace(params, **bug))
        assert chi_square_p(winners, law) < 1e-8


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"), [(0, 1.0, 0.0), (5, 1.0, 0.0), (0, 0.8, 0.0), (6, 0.9, 0.1)]
)
def test_inverse_cdf_follows_the_filtered_law(top_k: int, top_p: float, min_p: float) -> None:
    params = SearchParams(max_tokens=1, temperature=0.8, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = torch.linspace(-1.5, 1.5, 24)[torch.randperm(24)][None]
    probs = torch.softmax(logits[0].double() / 0.8, -1)
    order = probs.argsort(descending=True)
    kept = order[: top_k or 24]
    mass = probs[kept] / probs[kept].sum()
    kept = kept[: int((mass.cumsum(0) < top_p).sum()) + 1]
    kept = kept[probs[kept] >= min_p * probs.max()]
    law = {(int(i),): float(probs[i] / probs[kept].sum()) for i in kept}
    tokens = inverse_cdf.draw(logits, torch.rand(1, 20000), params)[0].tolist()
    samples = [(token,) for token in tokens]
    assert chi_square_p(samples, law) > 1e-5
    hotter = probs**0.5
    bug = {(int(i),): float(hotter[i] / hotter[kept].sum()) for i in kept}
    assert chi_square_p(samples, bug) < 1e-8


def test_models_are_left_as_they_were(family: Family) -> None:
    before = {role: model.config._attn_implementation for role, model in family.models.items()}
    names = [type(m).__name__ for m in family.models["base"].modules()]
    family.provider("tuned_pytorch")
    family.provider("reference_style")
    after = {role: model.config._attn_implementation for role, model in family.models.items()}
    assert before == after
    assert names == [type(m).__name__ for m in family.models["base"].modules()]


@pytest.mark.parametrize("name", PROVIDERS)
def test_what_is_not_computed_is_refused(family: Family, name: str) -> None:
    provider = family.provider(name)
    with pytest.raises(ValueError, match=r"stop is not part of the baselines, got \('x',\)"):
        provider.generate(PROMPTS, SearchParams(max_tokens=2, stop="x"))
    with pytest.raises(ValueError, match="none of them empty"):
        provider.generate([[]], SearchParams(max_tokens=2))
    with pytest.raises(ValueError, match="301 positions needed"):
        provider.generate([[1]], SearchParams(max_tokens=300))
    bare = PROVIDERS[name](family.models["base"])
    for field, kind in itertools.product(("guidance", "scorer"), ("implicit", "explicit")):
        with pytest.raises(ValueError, match=f"{field}='{kind}' needs"):
            bare.generate(PROMPTS, SearchParams(max_tokens=2, **{field: kind}))
    assert common.stop_ids([3], SearchParams(max_tokens=1, stop_token_ids=[2])) == [2, 3]
