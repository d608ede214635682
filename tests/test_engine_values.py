# SPDX-License-Identifier: Apache-2.0
"""Every kind of explicit value: the engine returns what the naive search returns."""

from __future__ import annotations

import functools
import random
from dataclasses import replace
from typing import Any

import pytest
from engine_cases import (
    CELLS,
    SHAPES,
    VALUES,
    Case,
    Family,
    compare,
    differences,
    fresh_seed,
    is_near_tie,
    random_case,
    run_arrivals,
    run_engine,
    with_stop_string,
)
from naive_search import NaiveCandidate, NaiveModels, NaiveResult, NaiveSearch

from ivg_fast import (
    Engine,
    ScoreInput,
    SearchParams,
)
from ivg_fast.request import ROLE_BIT, LiveRequest

SEED = fresh_seed()
EOS = {"gpt2": 28, "llama": 7, "mistral": 28, "qwen3": 13, "gemma2": 0}
# Every shape has a scalar head; the rest is spread over them.
KINDS = [("scalar", shape) for shape in SHAPES]
KINDS += [("sequence", "gemma2"), ("token", "gpt2")]
KINDS += [("trunk", shape) for shape in ("gpt2", "llama", "gemma2")]
KINDS += [("scalar trunk", "mistral"), ("scalar trunk", "gpt2")]
KINDS += [("text", "gpt2"), ("text", "mistral"), ("scalar text", "llama"), ("scalar text", "qwen3")]


def family(value: str, shape: str) -> Family:
    return Family(shape, seed=SEED, eos_token_id=EOS[shape], value=value)


@functools.cache
def naive(value: str, shape: str) -> NaiveModels:
    return family(value, shape).naive()


@functools.cache
def engine(value: str, shape: str, **config: Any) -> Any:
    return family(value, shape).engine(**config)


@pytest.fixture(scope="module", autouse=True)
def _drop_models():
    yield
    for cached in (naive, engine, solved):
        cached.cache_clear()


def cells(value: str) -> list[tuple[str, str]]:
    """Cells of the grid that ask for the value, some of them twice, and a few neighbours."""
    able = [cell for cell in CELLS if value == "trunk" or cell[0] != "explicit"]
    scored = [cell for cell in able if cell[1] == "explicit"]
    others = [("none", "implicit"), ("implicit", "callable")]
    return [cell for cell in able if "explicit" in cell] + scored + others


@functools.cache
def solved(value: str, shape: str) -> tuple[list[Case], list[NaiveResult]]:
    rng = random.Random(f"{SEED} {value} {shape}")
    cases = [random_case(rng, family(value, shape), *cell) for cell in cells(value)]
    models = naive(value, shape)
    cases = [with_stop_string(rng, c, models) if rng.random() < 0.34 else c for c in cases]
    rng.shuffle(cases)
    return cases, [case.solve(models) for case in cases]


def assert_same(outputs, results, cases, allowed_ties: int = 3) -> None:
    found, num_near_ties = compare(outputs, results, cases)
    assert not found, f"seed {SEED}, {len(found)} of {len(cases)} differ\n" + "\n".join(found)
    assert num_near_ties <= allowed_ties, f"seed {SEED}: {num_near_ties} of {len(cases)} near-ties"


def test_every_kind_is_there() -> None:
    assert {value for value, _ in KINDS} == set(VALUES) - {"vocabulary"}


@pytest.mark.parametrize("burst", [1, 8])
@pytest.mark.parametrize(("value", "shape"), KINDS)
def test_every_value(value: str, shape: str, burst: int) -> None:
    cases, results = solved(value, shape)
    assert_same(run_engine(engine(value, shape, max_burst_steps=burst), cases), results, cases)


@pytest.mark.parametrize(
    ("value", "shape"), [("scalar", "gpt2"), ("trunk", "gpt2"), ("text", "gpt2")]
)
def test_arrivals_in_between(value: str, shape: str) -> None:
    """Requests that come while others run, in a pool that makes some wait."""
    cases, results = solved(value, shape)
    rng = random.Random(f"{SEED} arrivals {value}")
    order = rng.sample(range(len(cases)), len(cases))
    engine_ = family(value, shape).engine(max_burst_steps=4, num_blocks=60, max_num_rows=14)
    outputs = run_arrivals(engine_, [cases[i] for i in order], rng)
    assert_same(outputs, [results[i] for i in order], [cases[i] for i in order])


# Planted bugs: a comparison that cannot fail shows nothing.


class OneTokenEarly(NaiveSearch):
    """The head of a trunk or of a scalar reads the state that comes before the right one."""

    def value_of(self, ids: tuple[int, ...]) -> float:
        if len(ids) < 3:
            return super().value_of(ids)
        before = self.models.logits("value", ids[:-2])
        return float(before[ids[-1]]) if len(before) > 1 else super().value_of(ids[:-1])


class NoEndOfText(NaiveSearch):
    """Ends of text that were appended are forgotten, ends that were sampled too."""

    def value_of(self, ids: tuple[int, ...]) -> float:
        return super().value_of(ids[:-1] if ids[-1] == self.eos else ids)

    def seen(self, candidate: NaiveCandidate) -> ScoreInput:
        return replace(super().seen(candidate), ends_text=False)


@pytest.mark.parametrize(
    ("value", "bug"),
    [
        ("scalar", OneTokenEarly),
        ("scalar", NoEndOfText),
        ("trunk", OneTokenEarly),
        ("scalar trunk", OneTokenEarly),
        ("scalar trunk", NoEndOfText),
        ("text", NoEndOfText),
        ("scalar text", NoEndOfText),
    ],
)
def test_planted_bugs_are_seen(value: str, bug: type[NaiveSearch]) -> None:
    rng = random.Random(f"{SEED} planted {value}")
    cases = [
        random_case(
            rng,
            family(value, "gpt2"),
            "implicit",
            "explicit",
            beam_width=2,
            num_candidates=2,
            chunk_length=2,
            max_tokens=6,
            temperature=1.5,
            min_tokens=0,
            stop_token_ids=(),
            ignore_eos=False,
            score_eos_on_truncation=True,
        )
        for _ in range(4)
    ]
    models = naive(value, "gpt2")
    outputs = run_engine(engine(value, "gpt2", max_burst_steps=8), cases)
    assert_same(outputs, [case.solve(models) for case in cases], cases)
    seen = [
        bool(differences(output, case.solve(models, bug), case))
        for case, output in zip(cases, outputs, strict=True)
    ]
    assert sum(seen) >= 3


# What it costs.


@pytest.mark.parametrize("guidance", ["none", "implicit"])
@pytest.mark.parametrize("value", ["scalar", "trunk", "scalar trunk"])
def test_what_is_forwarded(value: str, guidance: str) -> None:
    """A scalar head reads what was sampled and the ends of text; a trunk reads nothing again."""
    rng = random.Random(f"{SEED} costs {value} {guidance}")
    cases = [random_case(rng, family(value, "llama"), guidance, "explicit") for _ in range(6)]
    models = naive(value, "llama")
    cases += [with_stop_string(rng, case, models) for case in cases]
    for case, output in zip(
        cases, run_engine(engine(value, "llama", max_burst_steps=8), cases), strict=True
    ):
        result, stats = case.solve(models), output.stats
        if differences(output, result, case):
            assert is_near_tie(result)
            continue
        rows, appended = result.num_decode_rows, result.num_appended
        is_served = guidance == "implicit" and "trunk" in value
        roles = {"base"} if guidance == "none" else {"base", "tuned", "untuned"}
        readers = roles if is_served else roles | {"value"}
        assert stats.prefill_tokens == dict.fromkeys(readers, len(case.prompt))
        if is_served:
            assert not any(stats.score_tokens.values())
        elif "scalar" in value:
            assert stats.score_tokens == {"value": result.num_sampled + appended}
        else:
            assert stats.score_tokens.get("value", 0) == rows + appended
        if case.params.stop:
            continue  # a row may run on behind its stop string: see test_engine_stats
        expected = dict.fromkeys(roles, rows)
        if is_served and value == "trunk":
            expected["tuned"] += appended
        elif is_served:  # every token once: the last ones of the candidates when they are scored
            expected["tuned"] = result.num_sampled + appended
        assert {r: n for r, n in stats.decode_tokens.items() if n} == {
            r: n for r, n in expected.items() if n
        }


def test_a_settle_that_reads_again_would_be_seen(monkeypatch) -> None:
    """The control of the counts above: a scalar head that reads a survivor's last token twice."""
    spec = LiveRequest.spec
    value = {"settle_roles": ROLE_BIT["value"]}
    monkeypatch.setattr(LiveRequest, "spec", lambda request: spec(request) | value)
    case = random_case(
        random.Random(SEED),
        family("scalar", "llama"),
        "none",
        "explicit",
        beam_width=2,
        num_candidates=2,
        chunk_length=2,
        max_tokens=8,
        ignore_eos=True,
        stop_token_ids=(),
        score_eos_on_truncation=False,
    )
    (output,) = run_engine(engine("scalar", "llama", max_burst_steps=8), [case])
    assert output.stats.score_tokens["value"] == 2 * 2 * 8 + 3 * 2


def test_one_forward_serves_the_trunk() -> None:
    """Under implicit guidance the backbone runs once where the tuned model's own head does."""
    models = family("trunk", "llama").roles()
    calls = {"backbone": 0, "lm_head": 0}

    def count(name: str) -> Any:
        return lambda *_: calls.update({name: calls[name] + 1})

    with Engine(models.pop("base"), family("trunk", "llama").tokenizer(), **models) as engine_:
        value = engine_._runners["value"]
        assert value.pools == []
        assert value.bytes_per_block == 0
        models["tuned"].base_model.register_forward_hook(count("backbone"))
        models["tuned"].get_output_embeddings().register_forward_hook(count("lm_head"))
        params = SearchParams.ivg(max_tokens=20, beam_width=2, num_candidates=2, ignore_eos=True)
        (output,) = engine_.generate([[1, 2, 3]], params)
        assert calls["backbone"] == calls["lm_head"] == 20  # one a step, the prompt's among them
        assert "value" not in output.stats.score_tokens
        # Without the pair's guidance the value runs on the trunk by itself.
        params = SearchParams.cbs(max_tokens=20, scorer="explicit", ignore_eos=True)
        (output,) = engine_.generate([[1, 2, 3]], params)
        assert calls["lm_head"] == 20 < calls["backbone"]
        assert output.stats.score_tokens["value"] > 0
