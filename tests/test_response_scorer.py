# SPDX-License-Identifier: Apache-2.0
"""Given responses, scored by every kind of value function, against stock models in float64."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_cases import VALUES, Family, NaiveTextValue, fresh_seed, pair_tokenizer
from naive_search import NaiveModels
from test_value_functions import save_value
from tiny_models import tiny_model

from ivg_fast import (
    CapacityError,
    Engine,
    EngineConfig,
    InvalidParameterError,
    IVGError,
    Prompt,
    ResponseScorer,
    ScoreInput,
    ScorerError,
    SearchParams,
    TextValueModel,
    ValueHeadModel,
    VocabularyMismatchError,
)

SEED = fresh_seed()
EOS = 28


def scorer_of(given: Family, **options: Any) -> ResponseScorer:
    roles: dict[str, Any] = given.roles()
    del roles["base"]
    if "text" in given.value:
        roles["value"] = TextValueModel(roles["value"], pair_tokenizer())
    return ResponseScorer(given.tokenizer(), **roles, **options)


def texts(num: int) -> tuple[list[str], list[list[int]], list[bool]]:
    """Prompts, token ids of responses, and whether an end of text is to be read behind them."""
    rng = random.Random(SEED)
    letters = [chr(code) for code in range(32, 60)]
    prompts = ["".join(rng.choices(letters, k=rng.randint(1, 40))) for _ in range(num)]
    responses = [rng.choices(range(EOS), k=rng.choice([1, 2, 16, 17, 30])) for _ in range(num)]
    for ids in responses:
        ids += [EOS] * (rng.random() < 0.3)
    return prompts, responses, [rng.random() < 0.4 for _ in range(num)]


class Oracle:
    """Stock models in float64, one text at a time."""

    def __init__(self, given: Family) -> None:
        roles: dict[str, Any] = {role: model.double() for role, model in given.roles().items()}
        self.tokenizer = given.tokenizer()
        self.models = NaiveModels(tokenizer=self.tokenizer, **roles)
        self.text = NaiveTextValue(roles["value"], pair_tokenizer())
        self.is_text = "text" in given.value

    def __call__(self, prompt: str, ids: list[int], ends_text: bool, scorer: str) -> float:
        before = tuple(self.tokenizer(prompt).input_ids)
        whole = tuple(ids) if ids[-1] == EOS or not ends_text else (*ids, EOS)
        if scorer == "implicit":
            return self._implicit(before, whole)
        if self.is_text:
            said = self.tokenizer.decode(ids, skip_special_tokens=True)
            ends = ends_text or ids[-1] == EOS
            (score,) = self.text([ScoreInput(prompt, said, tuple(ids), ends, ends)])
            return score
        return self.models.value_of(before + whole)

    def _implicit(self, before: tuple[int, ...], ids: tuple[int, ...]) -> float:
        total = 0.0
        for i, token in enumerate(ids):
            for role, sign in (("tuned", 1), ("untuned", -1)):
                logits = torch.from_numpy(self.models.logits(role, before + ids[:i]))
                total += sign * float(logits.log_softmax(-1)[token])
        return total


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("shape", ["gpt2", "llama", "gemma2"])
def test_every_value_function(value: str, shape: str) -> None:
    given = Family(shape, seed=SEED, value=value)
    prompts, responses, ends = texts(8)
    oracle = Oracle(given)
    with scorer_of(given, max_batch_tokens=100) as scorer:
        for kind in ("implicit", "explicit") if value == "vocabulary" else ("explicit",):
            got = scorer.score(prompts, responses, kind, ends_text=ends)
            wanted = [oracle(*item, kind) for item in zip(prompts, responses, ends, strict=True)]
            assert got == pytest.approx(wanted, abs=1e-4, rel=1e-5), f"seed {SEED}"
            # A response that is one token longer, or shorter, has another value.
            shifted = [[*ids, 3] for ids in responses]
            assert scorer.score(prompts, shifted, kind) != pytest.approx(wanted, abs=1e-2)


@pytest.mark.parametrize("max_batch_tokens", [1, 64, 10**6])
def test_batches_do_not_matter(max_batch_tokens: int) -> None:
    given = Family("llama", seed=SEED)
    prompts, responses, ends = texts(9)
    with (
        scorer_of(given) as one,
        scorer_of(given, max_batch_tokens=max_batch_tokens) as other,
    ):
        for kind in ("implicit", "explicit"):
            a, b = (s.score(prompts, responses, kind, ends_text=ends) for s in (one, other))
            assert a == pytest.approx(b, abs=1e-5)
        assert one.score([], [], "explicit") == []


@pytest.mark.parametrize(
    ("value", "guidance", "kind"),
    [
        ("vocabulary", "none", "implicit"),
        ("vocabulary", "implicit", "implicit"),
        ("vocabulary", "implicit", "explicit"),
        ("scalar", "implicit", "explicit"),
        ("scalar text", "none", "explicit"),
    ],
)
def test_it_says_what_the_engine_said(value: str, guidance: str, kind: str) -> None:
    given = Family("gpt2", seed=SEED, value=value)
    prompts, _, _ = texts(3)
    params = SearchParams.cbs(
        max_tokens=20, beam_width=2, num_candidates=2, chunk_length=3, guidance=guidance,
        scorer=kind, n=4, seed=SEED, dedup_finished=True,
    )  # fmt: skip
    with given.engine() as engine:
        outputs = engine.generate(prompts, params)
    found = [(o.prompt, c.token_ids, c.score) for o in outputs for c in o.outputs]
    with scorer_of(given) as scorer:
        got = scorer.score([f[0] for f in found], [f[1] for f in found], kind)
    assert got == pytest.approx([score for _, _, score in found], abs=1e-4)


def test_every_role_reads_its_own_prompt() -> None:
    given = Family("gpt2", seed=SEED)
    prompts, responses, _ = texts(1)
    oracle = Oracle(given)
    with scorer_of(given, templates={"tuned": "raw", "value": "imdb"}) as scorer:
        (got,) = scorer.score([Prompt(prompts[0], value=[1, 2, 3])], responses, "explicit")
        assert got == pytest.approx(oracle.models.value_of((1, 2, 3, *responses[0])), abs=1e-4)


def test_texts_and_token_ids_are_one() -> None:
    given = Family("gpt2", seed=SEED)
    tokenizer = given.tokenizer()
    prompts, responses, _ = texts(5)
    said = [tokenizer.decode(ids, skip_special_tokens=True) for ids in responses]
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in said]
    with scorer_of(given) as scorer:
        for kind in ("implicit", "explicit"):
            assert scorer.score(prompts, said, kind) == scorer.score(
                [tokenizer(prompt).input_ids for prompt in prompts], ids, kind
            )


def test_callables() -> None:
    seen = []

    def last_word(inputs: list[ScoreInput]) -> list[float]:
        seen.extend(inputs)
        return [float(len(item.response)) for item in inputs]

    with ResponseScorer() as scorer:  # needs nothing at all
        assert scorer.score(["a"] * 2, ["bc", ""], last_word, ends_text=[True, False]) == [2.0, 0.0]
        assert seen[0] == ScoreInput("a", "bc", (), True, True)
        assert scorer.score([], [], last_word) == []
        with pytest.raises(ScorerError, match="raised ZeroDivisionError"):
            scorer.score(["a"], ["b"], lambda inputs: 1 / 0)
        with pytest.raises(InvalidParameterError, match="tokenizer"):
            scorer.score(["a"], [[1]], last_word)
    given = Family("gpt2", seed=SEED)
    with ResponseScorer(given.tokenizer(), value=last_word) as scorer:
        assert scorer.score([[1, 2]], [[33 - 32, EOS]], "explicit") == [1.0]
        assert seen[-1].ends_text


@pytest.mark.parametrize(
    ("prompt", "response", "options", "message"),
    [
        ("", "!", {}, "prompts must have a token for tuned"),
        ("!", "", {}, "responses must have a token"),
        ("!", [29], {}, "responses must be token ids of tuned"),
        ("!", [-1], {}, "responses must be token ids of tuned"),
        ([29], [1], {}, "prompts must be token ids of tuned"),
        ("!", [1.5], {}, "responses must be"),
        ("!", None, {}, "responses must be texts or token ids, got None"),
        ("!", "!", {"ends_text": [True, False]}, "ends_text must be a bool, or 1 of them, got"),
        ("!", "!", {"ends_text": ["no"]}, "ends_text must be a bool, or 1 of them, got"),
        ("!", "!", {"ends_text": None}, "ends_text must be a list, got None"),
    ],
)
def test_what_cannot_be_scored(prompt: Any, response: Any, options: Any, message: str) -> None:
    with scorer_of(Family("gpt2", seed=1)) as scorer:
        with pytest.raises(InvalidParameterError, match=message):
            scorer.score([prompt], [response], "implicit", **options)
        assert scorer.score(["!"], ["!"], "implicit")


def test_limits_and_missing_parts() -> None:
    given = Family("gpt2", seed=1)
    with scorer_of(given) as scorer:
        assert scorer.score([[1] * 250], [[1] * 6], "explicit")
        with pytest.raises(CapacityError, match="250 tokens and a response of 7 exceed the 256"):
            scorer.score([[1] * 250], [[1] * 7], "explicit")
        with pytest.raises(InvalidParameterError, match="responses must be 1, got 2"):
            scorer.score(["!"], ["!", "!"], "explicit")
        with pytest.raises(InvalidParameterError, match="scorer must be 'implicit', 'explicit' or"):
            scorer.score(["!"], ["!"], "none")
        for prompts, responses in (("!", ["!"]), (["!"], "!"), (None, ["!"]), (iter("!"), ["!"])):
            with pytest.raises(InvalidParameterError, match="must be a list"):
                scorer.score(prompts, responses, "explicit")
        assert scorer.score(np.array([[1, 2]]), [[3]], "explicit", ends_text=[np.True_])
    for kind in ("explicit", len):
        with pytest.raises(IVGError, match="the scorer is closed"):
            scorer.score(["!"], ["!"], kind)
    roles = given.roles()
    with pytest.raises(InvalidParameterError, match="untuned must be given too"):
        ResponseScorer(tuned=roles["tuned"])
    with pytest.raises(InvalidParameterError, match="tuned must be a torch module, got 'tuned'"):
        ResponseScorer(tuned="tuned", untuned="untuned")
    with pytest.raises(InvalidParameterError, match="tuned must be on the CPU, got 'meta'"):
        ResponseScorer(tuned=tiny_model("gpt2").to("meta"), untuned=roles["untuned"])
    with pytest.raises(InvalidParameterError, match="value must be a model or a ValueFunction"):
        ResponseScorer(value=3)
    for wrong in (0, 1.5, None, True, "a"):
        with pytest.raises(InvalidParameterError, match="max_batch_tokens must be an integer"):
            ResponseScorer(max_batch_tokens=wrong)
    with pytest.raises(VocabularyMismatchError):
        ResponseScorer(
            given.tokenizer(), value=roles["value"], tokenizers={"value": pair_tokenizer()}
        )
    with (
        ResponseScorer(given.tokenizer(), value=roles["value"]) as scorer,
        pytest.raises(InvalidParameterError, match="scorer needs tuned and untuned"),
    ):
        scorer.score(["!"], ["!"], "implicit")


def test_values_that_are_not_finite_and_models_given_back() -> None:
    head = torch.nn.Linear(32, 97, bias=False).requires_grad_(False)
    trunk = tiny_model("gpt2", seed=4).transformer
    before = trunk.config._attn_implementation
    with ResponseScorer(value=ValueHeadModel(trunk, head)) as scorer:
        assert trunk.config._attn_implementation == "ivg_paged"
        head.weight.fill_(math.inf)
        with pytest.raises(ScorerError, match="must give finite scores"):
            scorer.score([[1, 2]], [[3]], "explicit")
    assert trunk.config._attn_implementation == before


def test_beside_an_engine_with_the_same_models() -> None:
    given = Family("llama", seed=SEED)
    roles = given.roles()
    params = SearchParams.ivg(max_tokens=12, chunk_length=3, seed=SEED, n=16)
    base = roles.pop("base")
    with Engine(base, given.tokenizer(), **roles, config=EngineConfig(num_blocks=500)) as engine:
        (first,) = engine.generate("!!", params)
        with ResponseScorer(given.tokenizer(), **roles) as scorer:
            got = scorer.score(
                ["!!"] * len(first.outputs), [c.token_ids for c in first.outputs], "explicit"
            )
        (second,) = engine.generate("!!", params)
    assert got == pytest.approx([c.score for c in first.outputs], abs=1e-4)
    assert [c.token_ids for c in first.outputs] == [c.token_ids for c in second.outputs]


@pytest.mark.parametrize("value", ["scalar text", "scalar", "vocabulary"])
@pytest.mark.parametrize("has_base", [True, False])
def test_folders(tmp_path: Path, value: str, has_base: bool) -> None:
    """A value of another tokenizer than the base's scores texts, as in an engine."""
    given = Family("llama", seed=SEED, value=value)
    roles = given.roles()
    for role in ("base", "tuned", "untuned"):
        roles[role].save_pretrained(tmp_path / role)
        given.tokenizer().save_pretrained(tmp_path / role)
    save_value(roles["value"], tmp_path / "value")
    own = pair_tokenizer() if "text" in value else given.tokenizer()
    own.save_pretrained(tmp_path / "value")
    prompts, responses, ends = texts(5)
    oracle = Oracle(given)
    paths = {role: tmp_path / role for role in ("tuned", "untuned", "value")}
    if has_base:
        paths["base"] = tmp_path / "base"
    with ResponseScorer.from_pretrained(**paths) as scorer:
        for kind in ("explicit", "implicit"):
            got = scorer.score(prompts, responses, kind, ends_text=ends)
            wanted = [oracle(*item, kind) for item in zip(prompts, responses, ends, strict=True)]
            assert got == pytest.approx(wanted, abs=1e-4, rel=1e-5), f"seed {SEED}"
