# SPDX-License-Identifier: Apache-2.0
"""The naive search against models whose tables can be read: it is the oracle of the engine."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from naive_search import (
    NaiveModels,
    NaiveSearch,
    completed_stop,
    naive_search,
    philox_uniform,
)
from toy_tables import LetterTokenizer, TableModel, TableValue

from ivg_fast.params import SearchParams

EOS = 3
PROMPT = [0]
TOKENIZER = LetterTokenizer("abc$", EOS)


def random_table(seed: int, size: int = 4, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(size, size, generator=generator, dtype=torch.float64)


def toy(seed: int = 0, tokenizer: LetterTokenizer = TOKENIZER, **replaced: object) -> NaiveModels:
    """Four tokens a, b, c and EOS."""
    roles = {
        "base": TableModel(random_table(seed)),
        "tuned": TableModel(random_table(seed + 100)),
        "untuned": TableModel(random_table(seed + 200)),
        "value": TableValue(random_table(seed + 300)),
    }
    return NaiveModels(tokenizer=tokenizer, **{**roles, **replaced})


def chain(*tokens: int) -> TableModel:
    """A base model that says tokens[0] after the prompt's 0, tokens[i + 1] after tokens[i]."""
    table = torch.zeros(4, 4, dtype=torch.float64)
    for last, following in itertools.pairwise((PROMPT[-1], *tokens)):
        table[last, following] = 60.0
    return TableModel(table)


# One candidate.


def test_a_single_candidate_follows_the_chain_and_stops_at_eos() -> None:
    result = naive_search(toy(base=chain(1, 2, EOS)), PROMPT, SearchParams(max_tokens=9), 1)
    (output,) = result.outputs
    assert output.token_ids == [1, 2, EOS]
    assert (output.text, output.finish_reason, output.stop_reason) == ("bc", "stop", None)
    assert (result.num_sampled, result.num_decode_rows) == (3, 2)
    assert [s.num_tokens for s in result.selections] == [9]


def test_chunks_have_no_effect_on_a_single_candidate() -> None:
    models = toy(3)
    whole, chunked = (
        naive_search(models, PROMPT, SearchParams(max_tokens=8, ignore_eos=True, chunk_length=L), 5)
        for L in (None, 2)
    )
    assert whole == chunked
    assert len(chunked.selections) == 1


def test_ignored_eos_is_an_ordinary_token() -> None:
    models = toy(base=chain(EOS, 1, 0))
    for stop_ids, length in (((), 4), ((EOS,), 1)):
        params = SearchParams(max_tokens=4, ignore_eos=True, stop_token_ids=stop_ids)
        (output,) = naive_search(models, PROMPT, params, 2).outputs
        assert output.token_ids == [EOS, 1, 0, EOS][:length]
        assert output.finish_reason == ("length" if length == 4 else "stop")
        assert output.stop_reason == (None if length == 4 else EOS)


def test_min_tokens_bans_stop_tokens_and_delays_stop_strings() -> None:
    params = SearchParams(max_tokens=9, min_tokens=2)
    (output,) = naive_search(toy(base=chain(1, EOS)), PROMPT, params, 1).outputs
    # "b", then EOS is banned: any other token, after which everything is possible again.
    assert output.token_ids[0] == 1
    assert output.token_ids[1] != EOS
    models = toy(base=chain(1, 2, 0))  # b c a b c a ...
    for min_tokens, length in ((0, 2), (2, 2), (3, 5), (5, 5), (6, 8)):
        params = SearchParams(max_tokens=9, min_tokens=min_tokens, stop="bc", stop_token_ids=[EOS])
        (output,) = naive_search(models, PROMPT, params, 1).outputs
        assert output.token_ids == [1, 2, 0, 1, 2, 0, 1, 2, 0][:length]
        assert output.text == "bcabcabca"[: length - 2]
        assert output.stop_reason == "bc"


def test_the_token_that_completes_a_stop_string() -> None:
    tokenizer = LetterTokenizer(["a", "b", "ab", "$"], EOS)
    for ids, stops, expected in (
        ([0, 1], ["ab"], (0, "ab")),
        ([0, 1, 0], ["ab"], None),  # completed before
        ([2, 2], ["aba"], (0, "aba")),
        ([1, 2], ["ab", "ba"], (0, "ba")),  # the one that begins first
        ([0, EOS], ["a$"], None),
        ([0], ["ab"], None),
    ):
        assert completed_stop(tokenizer, ids, stops) == expected


def test_log_probabilities_are_those_of_the_tables() -> None:
    models = toy(4)
    params = SearchParams(
        max_tokens=6, guidance="implicit", guidance_weight=-0.5, temperature=0.8, ignore_eos=True
    )
    (output,) = naive_search(models, PROMPT, params, 9).outputs
    contexts = [PROMPT[-1], *output.token_ids[:-1]]
    base, tuned, untuned = (
        torch.stack([getattr(models, role).table[last] for last in contexts])
        for role in ("base", "tuned", "untuned")
    )
    taken = torch.tensor(output.token_ids)[:, None]

    def log_likelihood(logits: torch.Tensor) -> float:
        return float(logits.log_softmax(1).gather(1, taken).sum())

    assert output.base_logprob == pytest.approx(log_likelihood(base))
    assert output.cumulative_logprob == pytest.approx(
        log_likelihood((base - 0.5 * (tuned - untuned)) / 0.8)
    )
    assert output.implicit_reward == pytest.approx(log_likelihood(tuned) - log_likelihood(untuned))
    assert output.score == 0.0


def test_explicit_guidance_adds_the_token_values() -> None:
    models = toy(5)
    params = SearchParams(max_tokens=1, guidance="explicit", guidance_weight=2.0)
    z = models.base.table[0] + 2.0 * models.value.score_head.weight.T[0]
    edges = z.softmax(0).cumsum(0)
    for seed in range(20):
        (output,) = naive_search(models, PROMPT, params, seed).outputs
        assert output.token_ids == [int((edges <= philox_uniform(seed, 0, 0)).sum())]
        assert output.implicit_reward == 0.0


# Scores.


@pytest.mark.parametrize("ending", ["eos", "stop", "stop_token", "length", "cut"])
def test_end_of_text_counts_once(ending: str) -> None:
    tokens = (1, 2, EOS) if ending == "eos" else (1, 2, 0)
    models = toy(base=chain(*tokens))
    models.value = TableValue(torch.arange(16, dtype=torch.float64).reshape(4, 4) ** 2)
    options = {
        "eos": {},
        "stop": {"stop": ["bca"]},
        "stop_token": {"stop_token_ids": [0]},
        "length": {},
        "cut": {"score_eos_on_truncation": True},
    }[ending]
    scored = [*tokens, EOS] if ending in ("stop", "cut") else list(tokens)
    steps = list(itertools.pairwise([PROMPT[-1], *scored]))
    ratios = [
        float(
            models.tuned.table[last].log_softmax(0)[token]
            - models.untuned.table[last].log_softmax(0)[token]
        )
        for last, token in steps
    ]
    for guidance in ("none", "implicit", "explicit"):
        for scorer in ("implicit", "explicit"):
            params = SearchParams(
                max_tokens=3, guidance=guidance, guidance_weight=1e-9, scorer=scorer, **options
            )
            result = naive_search(models, PROMPT, params, 0)
            (output,) = result.outputs
            assert output.token_ids == list(tokens)
            assert result.num_appended == len(scored) - 3
            if scorer == "implicit":
                assert output.score == pytest.approx(sum(ratios))
            else:
                last, token = steps[-1]
                assert output.score == pytest.approx(float((4 * last + token) ** 2))
            uses_pair = "implicit" in (guidance, scorer)
            assert output.implicit_reward == pytest.approx(sum(ratios[:3]) if uses_pair else 0.0)


def test_what_a_callable_sees() -> None:
    seen = []

    def scorer(inputs):
        seen.append(inputs)
        return [len(i.token_ids) for i in inputs]

    params = SearchParams(
        max_tokens=6, num_candidates=2, chunk_length=2, scorer=scorer, stop="bca", n=2
    )
    result = naive_search(toy(base=chain(1, 2, 0)), PROMPT, params, 0)
    assert [[(i.response, i.is_finished) for i in inputs] for inputs in seen] == [
        [("bc", False)] * 2,
        [("bca", True)] * 2,
    ]
    assert {i.prompt for inputs in seen for i in inputs} == {"a"}
    assert [(o.text, o.score, o.candidate_id) for o in result.outputs] == [("", 3, 0), ("", 3, 1)]


# The search.

FLAT = TableModel(torch.zeros(4, 4, dtype=torch.float64))


def digit(seed: int, candidate_id: int, position: int) -> int:
    """What a flat distribution over four tokens draws."""
    return int(4 * Fraction(philox_uniform(seed, candidate_id, position)))


def spell(i) -> int:
    """Reads the last three tokens as a number, so that hardly any two prefixes tie."""
    return sum(t * 4**k for k, t in enumerate(reversed(i.token_ids)))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("width", "children", "length"), [(2, 2, 1), (2, 3, 2), (3, 2, 3), (1, 4, 2)]
)
def test_selection_by_hand(seed: int, width: int, children: int, length: int) -> None:
    """A second search for a flat model without ends: digits, sort, c*W + r, in four lines."""
    params = SearchParams(
        max_tokens=7,
        beam_width=width,
        num_candidates=children,
        chunk_length=length,
        scorer=lambda inputs: [spell(i) for i in inputs],
        ignore_eos=True,
        n=width * children,
    )
    result = naive_search(toy(base=FLAT), PROMPT, params, seed)
    pool: dict[int, list[int]] = {i: [] for i in range(width * children)}
    boundaries = sorted({*range(length, 7, length), 7})
    for start, goal in itertools.pairwise((0, *boundaries)):
        for i, tokens in pool.items():
            tokens += [digit(seed, i, t) for t in range(start, goal)]
        order = sorted(pool, key=lambda i: (-int("".join(map(str, pool[i])), 4), i))
        assert result.selections[boundaries.index(goal)].candidate_ids == order
        if goal < 7:
            pool = {
                c * width + r: list(pool[order[r]]) for c in range(children) for r in range(width)
            }
    assert [(o.candidate_id, o.token_ids) for o in result.outputs] == [(i, pool[i]) for i in order]
    assert result.num_sampled == 7 * width * children
    num_chunks = len(boundaries)
    assert result.num_decode_rows == (num_chunks - 1) * width + (7 - num_chunks) * width * children


def test_best_of_n_ranks_the_whole_pool_and_none_ranks_by_id() -> None:
    models = toy(base=FLAT)
    best = SearchParams.best_of_n(
        6, max_tokens=3, scorer=lambda inputs: [spell(i) for i in inputs], n=6, ignore_eos=True
    )
    plain = SearchParams(max_tokens=3, beam_width=2, num_candidates=3, n=4, ignore_eos=True)
    ranked = naive_search(models, PROMPT, best, 8).outputs
    assert [o.score for o in ranked] == sorted((o.score for o in ranked), reverse=True)
    assert [o.candidate_id for o in naive_search(models, PROMPT, plain, 8).outputs] == [0, 1, 2, 3]


def finishing_models() -> NaiveModels:
    """a -> b, c or EOS alike; b -> b, c -> c for ever. Values make EOS first, then c, then b."""
    base = torch.full((4, 4), -math.inf, dtype=torch.float64)
    base[0, 1:] = 0.0
    base[1, 1] = base[2, 2] = base[3, 3] = 0.0
    value = torch.zeros(4, 4, dtype=torch.float64)
    value[0] = torch.tensor([0.0, 1.0, 2.0, 3.0])
    value[1, 1], value[2, 2] = 1.0, 2.0
    return toy(base=TableModel(base), value=TableValue(value))


def first_tokens(seed: int, count: int) -> list[int]:
    return [1 + int(3 * Fraction(philox_uniform(seed, i, 0))) for i in range(count)]


def seed_with(count: int, wanted: list[int]) -> int:
    return next(s for s in itertools.count() if sorted(first_tokens(s, count)) == sorted(wanted))


def test_finished_survivors_are_cloned_and_crowd_others_out() -> None:
    """W = 2, K = 2 with one EOS: its two clones take both places of the next selection."""
    seed = seed_with(4, [EOS, 2, 2, 1])
    first = first_tokens(seed, 4)
    finished = first.index(EOS)
    params = SearchParams(
        max_tokens=6,
        beam_width=2,
        num_candidates=2,
        chunk_length=1,
        scorer="explicit",
        n=4,
    )
    result = naive_search(finishing_models(), PROMPT, params, seed)
    assert result.selections[0].candidate_ids[:2] == [finished, first.index(2)]
    assert result.selections[1].candidate_ids == [0, 2, 1, 3]  # clones 0*2+0 and 1*2+0 lead
    assert len(result.selections) == 2
    # The clones are one output; the two others were left off unfinished.
    assert [(o.candidate_id, o.token_ids) for o in result.outputs] == [
        (0, [EOS]),
        (1, [2, 2]),
        (3, [2, 2]),
    ]
    assert [o.finish_reason for o in result.outputs] == ["stop", "abort", "abort"]

    deduplicated = naive_search(
        finishing_models(),
        PROMPT,
        SearchParams(
            max_tokens=6,
            beam_width=2,
            num_candidates=2,
            chunk_length=1,
            scorer="explicit",
            n=4,
            dedup_finished=True,
        ),
        seed,
    )
    assert [s.num_tokens for s in deduplicated.selections] == [1, 2, 3, 4, 5, 6]
    assert all(s.candidate_ids[0] == 0 for s in deduplicated.selections[1:])
    assert [len(s.candidate_ids) for s in deduplicated.selections[1:]] == [3] * 5
    assert [(o.candidate_id, o.token_ids) for o in deduplicated.outputs] == [
        (0, [EOS]),
        (1, [2] * 6),
        (3, [2] * 6),
    ]


def test_a_pool_that_is_finished_early_ends_the_search() -> None:
    params = SearchParams(
        max_tokens=9, beam_width=2, num_candidates=2, chunk_length=4, scorer="implicit", n=4
    )
    result = naive_search(toy(base=chain(1, 2, EOS)), PROMPT, params, 3)
    assert len(result.selections) == 1
    assert [o.candidate_id for o in result.outputs] == [0, 1, 2, 3]  # no clones: drawn apart
    assert {tuple(o.token_ids) for o in result.outputs} == {(1, 2, EOS)}


def test_gaps_of_scores() -> None:
    """The gap is that of neighbours which can change a place that matters."""
    values = {(0,): 4.0, (1,): 3.0, (2,): 1.5, (3,): 1.4}

    def scorer(inputs):
        return [values[i.token_ids[-1:]] for i in inputs]

    flat = toy(base=FLAT)
    seed = next(s for s in itertools.count() if {digit(s, i, 0) for i in range(4)} == {0, 1, 2, 3})
    params = SearchParams(max_tokens=1, num_candidates=4, scorer=scorer, ignore_eos=True)
    u_gap = min(
        abs(4 * philox_uniform(seed, i, 0) - edge) / 4 for i in range(4) for edge in (1, 2, 3)
    )
    assert naive_search(flat, PROMPT, params, seed).min_gap == pytest.approx(min(u_gap, 0.1))
    values[3,] = values[2,] - 1e-9
    assert naive_search(flat, PROMPT, params, seed).min_gap < 1e-8


def test_each_text_is_forwarded_once() -> None:
    models = toy(7)
    params = SearchParams.cbs(max_tokens=6, beam_width=2, num_candidates=2, chunk_length=2)
    naive_search(models, PROMPT, params, 1)
    texts = {ids for role, ids in models.memory if role == "base"}
    assert models.base.num_forwards == len(texts)


class WrongChild(NaiveSearch):
    def child_id(self, child: int, rank: int) -> int:
        return rank * self.params.num_candidates + child


def test_another_child_rule_is_another_search() -> None:
    """The planted bug that the engine's tests use does change results."""
    params = SearchParams.cbs(
        max_tokens=8, beam_width=2, num_candidates=3, chunk_length=2, n=6, ignore_eos=True
    )
    models = toy(8)
    right, wrong = (kind(models, PROMPT, params, 4).run() for kind in (NaiveSearch, WrongChild))
    assert [o.token_ids for o in right.outputs] != [o.token_ids for o in wrong.outputs]
