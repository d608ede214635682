# SPDX-License-Identifier: Apache-2.0
"""Roles that read different prompts: the naive search's ids, whatever the lengths and forms."""

from __future__ import annotations

import functools
import random
from dataclasses import replace
from typing import Any

import pytest
from engine_cases import (
    CELLS,
    Case,
    Family,
    compare,
    fresh_seed,
    random_case,
    run_arrivals,
    run_engine,
    text_score,
    with_stop_string,
)
from naive_search import NaiveModels, NaiveResult, NaiveSearch

from ivg_fast import (
    InvalidParameterError,
    Prompt,
    ScoreInput,
    SearchParams,
    Template,
    batches,
    first_forward,
)
from ivg_fast.request import ROLES

SEED = fresh_seed()
# Lengths around the borders of blocks: which role needs the most of them differs.
LENGTHS = (1, 2, 15, 16, 17, 31, 32, 33, 48)


def family(shape: str) -> Family:
    return Family(shape, seed=SEED, eos_token_id={"gpt2": 28, "llama": 7}[shape])


@functools.cache
def naive(shape: str) -> NaiveModels:
    return family(shape).naive()


@functools.cache
def engine(shape: str, **config: Any):
    return family(shape).engine(**config)


@pytest.fixture(scope="module", autouse=True)
def _drop_models():
    yield
    for cache in (engine, naive, solved, written):
        cache.cache_clear()


def by_role(rng: random.Random, case: Case, of: Family) -> Case:
    """The case with token ids of another length for every role."""
    allowed = [t for t in range(of.vocab_size) if t != of.eos_token_id]
    lengths = rng.sample(LENGTHS, len(ROLES))
    ids = {r: rng.choices(allowed, k=n) for r, n in zip(ROLES, lengths, strict=True)}
    given = Prompt(**ids)
    return replace(case, prompt=ids.pop("base"), of_role=ids, given=given)


@functools.cache
def solved(shape: str) -> tuple[list[Case], list[NaiveResult]]:
    """Two cases a cell of the grid, some with a stop string, and the naive search's answers."""
    rng = random.Random(f"{SEED} {shape}")
    cases = []
    for cell in CELLS * 2:
        case = by_role(rng, random_case(rng, family(shape), *cell), family(shape))
        cases.append(with_stop_string(rng, case, naive(shape)) if rng.random() < 0.3 else case)
    rng.shuffle(cases)
    return cases, [case.solve(naive(shape)) for case in cases]


def assert_same(outputs, results, cases, allowed_ties: int = 3) -> None:
    found, num_near_ties = compare(outputs, results, cases)
    assert not found, f"seed {SEED}, {len(found)} of {len(cases)} differ\n" + "\n".join(found)
    assert num_near_ties <= allowed_ties, f"seed {SEED}: {num_near_ties} of {len(cases)} near-ties"


@pytest.mark.parametrize("max_burst_steps", [1, 8])
@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_every_role_reads_its_own_prompt(shape: str, max_burst_steps: int) -> None:
    cases, results = solved(shape)
    outputs = run_engine(engine(shape, max_burst_steps=max_burst_steps), cases)
    assert_same(outputs, results, cases)
    for case, output in zip(cases, outputs, strict=True):
        lens = {"base": len(case.prompt), **{r: len(ids) for r, ids in case.of_role.items()}}
        for role, number in output.stats.prefill_tokens.items():
            assert number == lens[role]


def test_prompts_of_different_lengths_arrive_in_between() -> None:
    cases, results = solved("gpt2")
    rng = random.Random(f"{SEED} arrivals")
    order = rng.sample(range(len(cases)), len(cases))
    outputs = run_arrivals(engine("gpt2", max_burst_steps=4), [cases[i] for i in order], rng)
    assert_same(outputs, [results[i] for i in order], [cases[i] for i in order])


@pytest.mark.parametrize("longest", ROLES)
def test_the_longest_prompt_sets_the_blocks(longest: str) -> None:
    """Bp = max ceil(P_r / 16), and one more block for a response of a single row."""
    prompt = Prompt([1], **{longest: [2] * 33})
    params = SearchParams.ivg(
        max_tokens=16, beam_width=1, num_candidates=1, chunk_length=4, ignore_eos=True
    )
    (output,) = engine("gpt2", max_burst_steps=8).generate(prompt, params)
    assert output.stats.peak_blocks == 3 + 1
    assert output.stats.prefill_tokens == {r: 33 if r == longest else 1 for r in ROLES}


def test_a_prompt_reads_as_a_plain_one() -> None:
    params = SearchParams.ivg(max_tokens=8, seed=3)
    (plain,) = engine("gpt2").generate("1 + 2", params)
    same = [Prompt("1 + 2"), Prompt(base="1 + 2", tuned="1 + 2", untuned="1 + 2", value="1 + 2")]
    for prompt in same:
        (output,) = engine("gpt2").generate(prompt, params)
        assert output == replace(plain, stats=output.stats)


# --- templates ---------------------------------------------------------------------------------

# Without letters: the tokenizer of 29 pieces has the characters from space to ";".
FORMATS = {
    "base": ("({raw})", None),
    "tuned": ("#1: {raw} +", True),
    "untuned": ("{raw}..", False),
    "value": ("%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%% {raw} %%", True),
}


@functools.cache
def written() -> tuple[Any, Family]:
    of = family("llama")
    templates = {role: Template(text, add_bos) for role, (text, add_bos) in FORMATS.items()}
    return of.engine(templates=templates, max_burst_steps=8), of


def spelt(of: Family, text: str, add_bos: bool | None) -> list[int]:
    """Token ids by hand: a piece a character, and the begin of text where it is wanted."""
    bos = [of.tokenizer().bos_token_id] if add_bos else []
    return bos + [ord(character) - 32 for character in text]


def test_a_plain_text_goes_through_the_template_of_each_role() -> None:
    served, of = written()
    rng = random.Random(f"{SEED} templates")
    cases = []
    for cell in CELLS:
        raw = "".join(rng.choices("0123456+-*/ ,.", k=rng.randint(1, 30)))
        ids = {r: spelt(of, t.replace("{raw}", raw), bos) for r, (t, bos) in FORMATS.items()}
        case = random_case(rng, of, *cell)
        cases.append(replace(case, prompt=ids.pop("base"), of_role=ids, given=raw))
    outputs = run_engine(served, cases)
    assert_same(outputs, [case.solve(naive("llama")) for case in cases], cases)
    assert [o.prompt for o in outputs] == [f"({case.given})" for case in cases]


def test_a_text_of_a_role_is_not_written_again() -> None:
    served, of = written()
    case = random_case(random.Random(SEED), of, "implicit", "explicit")
    ids = {r: spelt(of, t.replace("{raw}", "1+1"), bos) for r, (t, bos) in FORMATS.items()}
    ids["tuned"], ids["value"] = spelt(of, "7 (0)", None), [5, 6, 9]
    given = Prompt("1+1", tuned="7 (0)", value=[5, 6, 9])
    case = replace(case, prompt=ids.pop("base"), of_role=ids, given=given)
    assert_same(run_engine(served, [case]), [case.solve(naive("llama"))], [case])


@pytest.mark.parametrize("value", ["scalar", "text", "scalar text"])
def test_every_kind_of_value_reads_its_own_prompt(value: str) -> None:
    of = Family("gpt2", seed=SEED, value=value)
    rng = random.Random(f"{SEED} {value}")
    cases = []
    for guidance in ("none", "implicit") * 3:
        texts = {r: "".join(rng.choices("0123456+-*/", k=rng.choice(LENGTHS))) for r in ROLES}
        ids = {role: spelt(of, text, None) for role, text in texts.items()}
        case = random_case(rng, of, guidance, "explicit", beam_width=2, num_candidates=2)
        cases.append(replace(case, prompt=ids.pop("base"), of_role=ids, given=Prompt(**texts)))
    models = of.naive()
    with of.engine(max_burst_steps=8) as served:
        outputs = run_engine(served, cases)
        if "text" in value:
            case = cases[0]
            with pytest.raises(InvalidParameterError, match=r"must be a text for value.*\(1, 2\)"):
                served.generate(Prompt("1", value=[1, 2]), case.params)
    assert_same(outputs, [case.solve(models) for case in cases], cases)


def with_chat(of: Family, form: str | None) -> Any:
    tokenizer = of.tokenizer()
    tokenizer.chat_template = form
    return tokenizer


TURNS = "{% for m in messages %}SIGN {{ m['content'] }};{% endfor %}"


def test_chat_goes_through_the_template_of_each_tokenizer() -> None:
    of = family("llama")
    signs = {"base": "+", "tuned": "**", "untuned": "---", "value": "////////////////////"}
    tokenizers = {r: with_chat(of, TURNS.replace("SIGN", sign)) for r, sign in signs.items()}
    messages = [
        {"role": "user", "content": "1 2"},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": "4"},
    ]
    ids = {
        role: spelt(of, "".join(f"{sign} {text};" for text in ("1 2", "3", "4")), None)
        for role, sign in signs.items()
    }
    case = random_case(random.Random(SEED), of, "implicit", "explicit")
    case = replace(case, prompt=ids.pop("base"), of_role=ids, given=messages)
    with of.engine(tokenizers=tokenizers) as served:
        outputs = run_engine(served, [case])
        assert_same(outputs, [case.solve(naive("llama"))], [case])
        assert outputs[0].prompt == "+ 1 2;+ 3;+ 4;"
    # A text through the "chat" template is the user's only turn.
    with of.engine(tokenizers=tokenizers, templates=dict.fromkeys(ROLES, "chat")) as served:
        (one,) = served.generate("4", SearchParams(max_tokens=2, seed=1))
        (two,) = served.generate(messages[2:], SearchParams(max_tokens=2, seed=1))
    assert one == two
    assert one.prompt == "+ 4;"


def test_a_template_serves_a_role_without_a_chat_template() -> None:
    of = family("llama")
    tokenizers = {"base": with_chat(of, TURNS.replace("SIGN", "+")), "value": with_chat(of, None)}
    message = {"role": "user", "content": "12"}
    case = replace(
        random_case(random.Random(SEED), of, "implicit", "explicit"),
        prompt=spelt(of, "+ 12;", None),
        of_role={"value": spelt(of, "(12)", True)},
        given=[message],
    )
    with of.engine(tokenizers=tokenizers, templates={"value": Template("({raw})", True)}) as served:
        assert_same(run_engine(served, [case]), [case.solve(naive("llama"))], [case])


def test_a_callable_sees_the_text_of_the_base() -> None:
    seen: list[ScoreInput] = []

    def spy(inputs: list[ScoreInput]) -> list[float]:
        seen.extend(inputs)
        return text_score(inputs)

    served, _ = written()
    params = SearchParams.cbs(max_tokens=4, beam_width=1, num_candidates=2, scorer=spy)
    served.generate([Prompt("1", base="22"), "33"], params)
    assert {item.prompt for item in seen} == {"22", "(33)"}


# --- planted bugs --------------------------------------------------------------------------------


class OnePrompt(NaiveSearch):
    """The guides read the base's prompt."""

    def context(self, role: str, token_ids: tuple[int, ...]) -> tuple[int, ...]:
        return self.prompts["base"] + token_ids


class SwappedPair(NaiveSearch):
    """The untuned model reads the tuned one's prompt."""

    def context(self, role: str, token_ids: tuple[int, ...]) -> tuple[int, ...]:
        return self.prompts["tuned" if role == "untuned" else role] + token_ids


class TrimmedValue(NaiveSearch):
    """The value model misses its prompt's first token."""

    def context(self, role: str, token_ids: tuple[int, ...]) -> tuple[int, ...]:
        prompt = self.prompts[role]
        return (prompt[1:] if role == "value" else prompt) + token_ids


def _ivg_cases(count: int) -> list[Case]:
    rng = random.Random(f"{SEED} planted")
    options = {
        "beam_width": 2,
        "num_candidates": 3,
        "chunk_length": 2,
        "max_tokens": 10,
        "ignore_eos": True,
        "guidance_weight": 1.0,
        "temperature": 1.2,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
    }
    of = family("gpt2")
    return [
        by_role(rng, random_case(rng, of, "implicit", "explicit", **options), of)
        for _ in range(count)
    ]


def _num_unlike(outputs: Any, cases: list[Case], search: type[NaiveSearch] = NaiveSearch) -> int:
    results = [case.solve(naive("gpt2"), search) for case in cases]
    pairs = zip(outputs, results, strict=True)
    return sum(o.outputs[0].token_ids != r.outputs[0].token_ids for o, r in pairs)


@pytest.mark.parametrize("bug", [OnePrompt, SwappedPair, TrimmedValue])
def test_planted_bugs_of_the_search_are_seen(bug: type[NaiveSearch]) -> None:
    cases = _ivg_cases(6)
    outputs = run_engine(engine("gpt2", max_burst_steps=8), cases)
    assert _num_unlike(outputs, cases) == 0
    assert _num_unlike(outputs, cases, bug) >= 2


def test_planted_bugs_of_the_engine_are_seen(monkeypatch) -> None:
    """All roles with the base's prompt length, and positions that run on from it."""
    cases = _ivg_cases(6)
    of_role = batches.prompt_lens

    def of_base(requests, role):
        return of_role(requests, "base")

    monkeypatch.setattr(batches, "prompt_lens", of_base)
    with family("gpt2").engine(max_burst_steps=8) as served:
        try:
            outputs = run_engine(served, cases)
        except Exception as error:  # a prompt that is said to be longer than its blocks
            outputs = error.outputs
    got = [(o, c) for o, c in zip(outputs, cases, strict=True) if o is not None]
    num_failed = len(cases) - len(got)
    assert num_failed + _num_unlike([o for o, _ in got], [c for _, c in got]) >= 2
    assert first_forward.first_batch is batches.first_batch, "the forward uses what was patched"
