# SPDX-License-Identifier: Apache-2.0
"""What a search costs, by the engine's own counters: each token forwarded once, prompts once."""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest
from engine_cases import (
    CELLS,
    Case,
    Family,
    differences,
    fresh_seed,
    is_near_tie,
    random_case,
    random_prompt,
    run_engine,
    with_stop_string,
)
from naive_search import NaiveModels

from ivg_fast.params import SearchParams

SEED = fresh_seed()
FAMILY = Family("llama", seed=SEED)


@functools.cache
def naive() -> NaiveModels:
    return FAMILY.naive()


@functools.cache
def engine(**config: Any) -> Any:
    return FAMILY.engine(**config)


@pytest.fixture(scope="module", autouse=True)
def _drop_models():
    yield
    naive.cache_clear()
    engine.cache_clear()


def guiding_roles(params: SearchParams) -> set[str]:
    """The roles that tilt the distribution, base included."""
    return {
        "none": {"base"},
        "implicit": {"base", "tuned", "untuned"},
        "explicit": {"base", "value"},
    }[params.guidance]


def scoring_roles(params: SearchParams) -> set[str]:
    """The roles that only score."""
    roles = {"implicit": {"tuned", "untuned"}, "explicit": {"value"}}.get(params.scorer, set())
    return roles - guiding_roles(params)


def counts(by_role: dict[str, int]) -> dict[str, int]:
    return {role: count for role, count in by_role.items() if count}


@pytest.mark.parametrize(("guidance", "scorer"), CELLS)
def test_every_token_is_forwarded_once(guidance: str, scorer: str) -> None:
    rng = random.Random(f"{SEED} {guidance} {scorer}")
    cases = [random_case(rng, FAMILY, guidance, scorer) for _ in range(3)]
    cases.append(with_stop_string(rng, cases[-1], naive()))
    for case, output in zip(cases, run_engine(engine(max_burst_steps=8), cases), strict=True):
        result, stats, params = case.solve(naive()), output.stats, case.params
        if differences(output, result, case):
            assert is_near_tie(result)
            continue  # another search, with other counts
        guides, scorers = guiding_roles(params), scoring_roles(params)
        assert counts(stats.prefill_tokens) == dict.fromkeys(guides | scorers, len(case.prompt))
        assert stats.num_selections == len(result.selections)
        num_rows = params.pool_size
        assert stats.num_blocks_copied <= num_rows * (len(result.selections) - 1)
        if params.stop:
            # Text is looked at after a burst, so that a row may run on behind its stop string.
            for role in guides:
                assert stats.decode_tokens[role] >= result.num_decode_rows
            for role in scorers:
                assert stats.score_tokens[role] >= result.num_decode_rows
            continue
        rows, appended = result.num_decode_rows, result.num_appended
        assert rows <= result.num_sampled
        # An end of text behind a candidate is scored by forwarding its last token: one more.
        ranking = {"implicit": {"tuned", "untuned"}, "explicit": {"value"}}.get(scorer, set())
        expected = {role: rows + appended * (role in ranking) for role in guides | scorers}
        assert counts(stats.decode_tokens) == counts({r: expected[r] for r in guides})
        assert counts(stats.score_tokens) == counts({r: expected[r] for r in scorers})


@pytest.mark.parametrize(
    ("width", "children", "length"), [(1, 3, 2), (2, 2, 5), (3, 2, 1), (4, 4, 5)]
)
@pytest.mark.parametrize("scorer", ["implicit", "explicit", "callable"])
def test_rows_of_a_chunk(width: int, children: int, length: int, scorer: str) -> None:
    """W + (L-1)*W*K a chunk; the first one has the prompt's row in place of W."""
    case = random_case(
        random.Random(f"{SEED} rows"),
        FAMILY,
        "implicit",
        scorer,
        beam_width=width,
        num_candidates=children,
        chunk_length=length,
        max_tokens=3 * length,
        ignore_eos=True,
        stop_token_ids=[],
        min_tokens=0,
        score_eos_on_truncation=False,
    )
    (output,) = run_engine(engine(max_burst_steps=16), [case])
    rows = 2 * width + 3 * (length - 1) * width * children
    stats = output.stats
    assert counts(stats.decode_tokens) == counts(dict.fromkeys(("base", "tuned", "untuned"), rows))
    assert counts(stats.score_tokens) == ({"value": rows} if scorer == "explicit" and rows else {})
    assert stats.num_selections == 3
    assert stats.num_host_syncs == 0


def test_a_long_prompt_and_many_candidates_fit_a_tenth_of_their_caches() -> None:
    """W = K = 8, L = 5, 50 tokens on 400: at most 1/10 of 64 caches of 450 tokens.

    The lower limit is set by blocks of 16: all 64 rows have a block of their own, and two where a
    chunk straddles a border, besides 25 of the prompt: 153 of the 1800 that 64 caches need.
    """
    family = Family("llama", seed=SEED, overrides={"max_position_embeddings": 512})
    rng = random.Random(f"{SEED} long")
    prompt = [rng.randrange(28) for _ in range(400)]
    params = SearchParams.ivg(
        max_tokens=50, beam_width=8, num_candidates=8, chunk_length=5, ignore_eos=True
    )
    engine_ = family.engine(num_blocks=400)
    (output,) = run_engine(engine_, [Case(prompt, params, SEED)])
    assert counts(output.stats.prefill_tokens) == dict.fromkeys(
        ("base", "tuned", "untuned", "value"), 400
    )
    assert output.stats.peak_blocks * 16 * 10 <= 64 * 450
    assert output.stats.num_blocks_copied <= 64 * 9
    rows = 9 * 8 + 10 * 4 * 64
    assert counts(output.stats.decode_tokens) == dict.fromkeys(("base", "tuned", "untuned"), rows)
    assert counts(output.stats.score_tokens) == {"value": rows}


def test_the_prompt_is_computed_once_whatever_the_width() -> None:
    prompt = random_prompt(random.Random(SEED), FAMILY)
    cases = [
        Case(prompt, SearchParams.ivg(max_tokens=4, beam_width=w, num_candidates=k), SEED)
        for w, k in ((1, 1), (1, 4), (4, 1), (4, 4))
    ]
    for output in run_engine(engine(max_burst_steps=8), cases):
        assert set(output.stats.prefill_tokens.values()) == {len(prompt)}


def test_counters_do_not_depend_on_the_neighbours() -> None:
    rng = random.Random(f"{SEED} neighbours")
    cases = [random_case(rng, FAMILY, *cell) for cell in CELLS]
    together = run_engine(engine(max_burst_steps=8), cases)
    alone = [run_engine(engine(max_burst_steps=8), [case])[0] for case in cases]
    for a, b in zip(together, alone, strict=True):
        for name in ("prefill_tokens", "decode_tokens", "score_tokens", "num_selections"):
            assert counts_of(a.stats, name) == counts_of(b.stats, name)


def counts_of(stats: Any, name: str) -> Any:
    value = getattr(stats, name)
    return counts(value) if isinstance(value, dict) else value
