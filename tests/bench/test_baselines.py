# SPDX-License-Identifier: Apache-2.0
"""Both baselines against naive recomputation, exact laws on a tiny vocabulary, and each other."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from baseline_cases import PROMPTS, PROVIDERS, Family, chi_square_p, winner_law

from bench.baselines import TunedPyTorchIVG, ValueModel, common, inverse_cdf, tree_search
from ivg_fast.params import SearchParams

GRID = list(itertools.product(("none", "implicit", "explicit"), ("implicit", "explicit")))


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
