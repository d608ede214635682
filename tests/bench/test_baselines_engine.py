# SPDX-License-Identifier: Apache-2.0
"""Both baselines against the engine: the same tokens where both are greedy or draw with the same
uniforms, the same distribution where each draws with its own."""

from __future__ import annotations

import functools
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import engine_cases
import pytest
import torch
from baseline_cases import PROMPTS, PROVIDERS, Family, chi_square_p, two_samples_p, winner_law
from engine_cases import fresh_seed, random_case
from naive_search import NaiveCandidate, NaiveModels, NaiveSearch
from torch import Tensor

from bench.baselines import ValueModel
from bench.baselines.tree_search import TreeSearch
from ivg_fast.assets import imdb_path
from ivg_fast.engine import Engine
from ivg_fast.models.loading import load_model
from ivg_fast.models.value_head import load_value_model
from ivg_fast.ops.philox import uniform
from ivg_fast.params import SearchParams
from ivg_fast.training import data

SEED = fresh_seed()
GUIDANCE = ("none", "implicit", "explicit")
# None of the baselines has these.
PLAIN = {
    "min_tokens": 0,
    "logprobs": False,
    "score_eos_on_truncation": False,
    "dedup_finished": False,
}


class WaryOfTwins(NaiveSearch):
    """Calls it a near-tie when two candidates drew the same text: the baselines score each by
    itself, and rounding may rank them either way."""

    def look_for_ties(self, ranking: list[NaiveCandidate]) -> None:
        super().look_for_ties(ranking)
        pairs = pairwise(ranking if self.params.scorer != "none" else [])
        if any(a.token_ids == b.token_ids and a.lineage != b.lineage for a, b in pairs):
            self.gap = 0.0


def uniforms_of(seed: int, candidates: list[int], position: int) -> Tensor:
    """f64 [N]: what the engine draws with."""
    n = len(candidates)
    return uniform(
        torch.full((n,), seed),
        torch.tensor(candidates, dtype=torch.int32),
        torch.full((n,), position, dtype=torch.int32),
    )


def multinomial_by_address() -> Callable[..., Tensor]:
    """torch.multinomial for reference_style, whose row i is candidate i at all times."""
    drawn: Counter[int] = Counter()

    def multinomial(probs: Tensor, num_samples: int, *, generator: torch.Generator) -> Tensor:
        assert num_samples == 1
        seed = generator.initial_seed()
        u = uniforms_of(seed, list(range(len(probs))), drawn[seed])
        drawn[seed] += 1
        cumulative = probs.double().cumsum(1)
        return torch.searchsorted(cumulative, u[:, None] * cumulative[:, -1:], right=True)

    return multinomial


def tree_uniforms_by_address(self: TreeSearch, num_children: int, num_tokens: int) -> Tensor:
    """TreeSearch._uniforms: child c of the survivor of rank r is candidate c*W + r."""
    position = self.base - self.prompt_slots
    width = self.params.beam_width if position else 1
    parts = []
    for prompt in dict.fromkeys(self.row_prompts):
        seed = self.generators[prompt].initial_seed()
        active = self.searches[prompt].active
        ids = [child * width + rank for rank in active for child in range(num_children)]
        columns = [uniforms_of(seed, ids, position + i) for i in range(num_tokens)]
        parts.append(torch.stack(columns, dim=1))
    return torch.cat(parts).float()


@pytest.fixture
def same_uniforms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "multinomial", multinomial_by_address())
    monkeypatch.setattr(TreeSearch, "_uniforms", tree_uniforms_by_address)


class Models:
    """One random family, by the naive search, the engine and both baselines."""

    def __init__(self, shape: str, **overrides: Any) -> None:
        # So many ids that a text is seldom drawn twice, which makes ties.
        self.family = engine_cases.Family(
            shape, seed=SEED, vocab_size=97, eos_token_id=96, overrides=overrides
        )

    @functools.cached_property
    def engine(self) -> Engine:
        return self.family.engine()

    @functools.cached_property
    def naive(self) -> NaiveModels:
        return self.family.naive()

    @functools.cached_property
    def providers(self) -> dict[str, Any]:
        roles = self.family.roles()
        value = roles.pop("value")
        head = ValueModel(value.backbone, value.score_head.weight)
        eos = [self.family.eos_token_id]
        return {
            name: make(*roles.values(), head, eos_token_ids=eos) for name, make in PROVIDERS.items()
        }


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def models(request: pytest.FixtureRequest) -> Models:
    return Models(request.param, sliding_window=None)


@pytest.mark.usefixtures("same_uniforms")
@pytest.mark.parametrize("name", PROVIDERS)
@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("scorer", ["none", "implicit", "explicit"])
def test_the_engines_uniforms_give_the_engines_tokens(
    models: Models, name: str, guidance: str, scorer: str
) -> None:
    rng = random.Random(f"{SEED} {models.family.shape} {guidance} {scorer}")
    # tuned_pytorch draws filtered tokens in order of rank, the engine in order of id.
    fixed = PLAIN | ({} if name == "reference_style" else {"top_k": 0, "top_p": 1.0, "min_p": 0.0})
    provider = models.providers[name]
    num_compared = num_bugs_seen = 0
    for _ in range(30):
        case = random_case(
            rng, models.family, guidance, scorer, max_tokens=rng.randint(4, 11), **fixed
        )
        params, seed = replace(case.params, n=1), rng.randrange(2**40)
        result = replace(case, params=params, seed=seed).solve(models.naive, WaryOfTwins)
        if result.min_gap < 1e-4:
            continue  # float32 may rightly decide otherwise
        num_compared += 1
        (output,) = models.engine.generate([case.prompt], params, seeds=[seed])
        (found,) = provider.generate([case.prompt], params, seed=seed)
        assert found.token_ids == output.outputs[0].token_ids
        assert found.score == pytest.approx(output.outputs[0].score, abs=1e-4)
        (wrong,) = provider.generate([case.prompt], params, seed=seed + 1)
        num_bugs_seen += wrong.token_ids != output.outputs[0].token_ids
        if num_compared == 3 and num_bugs_seen:
            return
    pytest.fail(f"{num_compared} cases compared, another seed seen in {num_bugs_seen}")


@pytest.mark.usefixtures("same_uniforms")
@pytest.mark.parametrize("name", PROVIDERS)
def test_a_batch_of_prompts_gives_the_engines_tokens(models: Models, name: str) -> None:
    rng = random.Random(f"{SEED} batch")
    shape = {"beam_width": 2, "num_candidates": 2, "chunk_length": 4}
    params = SearchParams.ivg(max_tokens=10, temperature=1.2, guidance_weight=0.5, **shape)
    prompts = [engine_cases.random_prompt(rng, models.family) for _ in range(8)]
    seed = rng.randrange(2**40)
    seeds = [seed + i for i in range(8)]
    outputs = models.engine.generate(prompts, params, seeds=seeds)
    results = models.providers[name].generate(prompts, params, seed=seed)
    num_compared = 0
    for prompt, own_seed, output, found in zip(prompts, seeds, outputs, results, strict=True):
        case = engine_cases.Case(prompt, params, own_seed)
        if case.solve(models.naive, WaryOfTwins).min_gap >= 1e-4:
            num_compared += 1
            assert found.token_ids == output.outputs[0].token_ids
    assert num_compared >= 1


@pytest.mark.parametrize("name", PROVIDERS)
@pytest.mark.parametrize("guidance", GUIDANCE)
def test_greedy_tokens_are_the_engines(models: Models, name: str, guidance: str) -> None:
    rng = random.Random(f"{SEED} greedy {guidance}")
    cases = [
        random_case(
            rng,
            models.family,
            guidance,
            scorer,
            **PLAIN,
            max_tokens=24,
            temperature=0,
            beam_width=1,
            num_candidates=1,
            ignore_eos=scorer == "none",
        )
        for scorer in ("none", "implicit", "explicit")
    ]
    num_compared = 0
    for case in cases:
        if case.solve(models.naive).min_gap < 1e-4:
            continue
        num_compared += 1
        (output,) = models.engine.generate([case.prompt], case.params, seeds=[0])
        (found,) = models.providers[name].generate([case.prompt], case.params)
        assert found.token_ids == output.outputs[0].token_ids
        assert found.score == pytest.approx(output.outputs[0].score, abs=1e-4)
    assert num_compared >= 1


@pytest.fixture(scope="module")
def imdb() -> Iterator[tuple[Engine, dict[str, Any]]]:
    """The engine and both baselines on the bundled family."""
    family = imdb_path()
    roles = ("base", "tuned", "untuned")
    value = load_value_model(family / "value")
    head = ValueModel(value.backbone, value.score_head.weight)
    models = [load_model(family / role) for role in roles]
    providers = {name: make(*models, head) for name, make in PROVIDERS.items()}
    with Engine.from_pretrained(*(family / role for role in (*roles, "value"))) as engine:
        yield engine, providers


@pytest.mark.parametrize("guidance", GUIDANCE)
def test_greedy_tokens_of_the_imdb_family(
    imdb: tuple[Engine, dict[str, Any]], guidance: str
) -> None:
    engine, providers = imdb
    prompts = [engine.tokenizer(text).input_ids for text in data.test_prompts(3)]
    params = SearchParams(
        max_tokens=20, temperature=0, guidance=guidance, guidance_weight=0.5, ignore_eos=True
    )
    expected = [output.outputs[0].token_ids for output in engine.generate(prompts, params)]
    for provider in providers.values():
        found = provider.generate(prompts, params)
        assert [result.token_ids for result in found] == expected
    bug = replace(params, guidance="none" if guidance != "none" else "implicit")
    others = [output.outputs[0].token_ids for output in engine.generate(prompts, bug)]
    assert others != expected


SEARCH = {"beam_width": 2, "num_candidates": 2, "temperature": 1.5, "ignore_eos": True}


@pytest.fixture(scope="module")
def small() -> Family:
    return Family(6)


def engine_winners(family: Family, params: SearchParams, num: int) -> list[tuple[int, ...]]:
    seeds = [fresh_seed() + 10**6 * i for i in range(num)]
    outputs = family.engine().generate(PROMPTS[:1] * num, params, seeds=seeds)
    return [tuple(output.outputs[0].token_ids) for output in outputs]


def test_the_engine_follows_the_law_of_the_baselines(small: Family) -> None:
    params = SearchParams.ivg(max_tokens=2, chunk_length=1, guidance_weight=0.5, **SEARCH)
    winners = engine_winners(small, params, 1500)
    assert chi_square_p(winners, winner_law(small, params)) > 1e-5
    for bug in ({"scorer": "implicit"}, {"guidance_weight": 0.0}, {"num_candidates": 1}):
        assert chi_square_p(winners, winner_law(small, replace(params, **bug))) < 1e-8


@pytest.mark.parametrize(
    ("name", "num", "guidance", "scorer"),
    [
        ("reference_style", 300, "implicit", "explicit"),
        ("tuned_pytorch", 1500, "implicit", "explicit"),
        ("tuned_pytorch", 1500, "none", "implicit"),
        ("tuned_pytorch", 1500, "explicit", "explicit"),
    ],
)
def test_the_surviving_first_chunk_is_distributed_as_the_engines(
    small: Family, name: str, num: int, guidance: str, scorer: str
) -> None:
    params = SearchParams(
        max_tokens=4,
        chunk_length=2,
        guidance=guidance,
        guidance_weight=0.5,
        scorer=scorer,
        **SEARCH,
    )
    provider = small.provider(name)

    def first_chunks(params: SearchParams) -> list[tuple[int, ...]]:
        results = provider.generate(PROMPTS[:1] * num, params, seed=fresh_seed())
        return [tuple(result.token_ids[:2]) for result in results]

    expected = [winner[:2] for winner in engine_winners(small, params, 1500)]
    assert two_samples_p(first_chunks(params), expected) > 1e-5
    other = {"explicit": "implicit", "implicit": "explicit"}[scorer]
    assert two_samples_p(first_chunks(replace(params, scorer=other)), expected) < 1e-8
