# SPDX-License-Identifier: Apache-2.0
"""A value model with its own tokenizer against each text scored from scratch."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch
from engine_cases import (
    TEXT_VOCAB_SIZE,
    NaiveTextValue,
    fresh_seed,
    pair_tokenizer,
    value_model,
)
from tokenizers import processors

from ivg_fast.errors import CapacityError, InvalidParameterError, IVGError, UnsupportedModelError
from ivg_fast.models import prefix_cache
from ivg_fast.models.text_value import TextValueModel
from ivg_fast.params import ScoreInput

ALPHABET = [chr(code) for code in range(32, 60)]
SHAPES = ("gpt2", "llama", "mistral", "gemma2", "qwen3")


def pair_of(shape: str, *, is_scalar: bool, **options: Any) -> tuple[TextValueModel, Any]:
    """What is tested, and its oracle."""
    fields = {"vocab_size": TEXT_VOCAB_SIZE, "eos_token_id": TEXT_VOCAB_SIZE - 1, "seed": 3}
    mine, stock = (value_model(shape, is_scalar=is_scalar, **fields) for _ in range(2))
    tokenizer = pair_tokenizer()
    return TextValueModel(mine, tokenizer, **options), NaiveTextValue(stock, tokenizer)


def a_search(rng: random.Random) -> list[list[ScoreInput]]:
    """The calls of a few searches, taking turns: texts that grow, fork, end, and are dropped."""
    calls = []
    for _ in range(3):
        prompt = "".join(rng.choices(ALPHABET, k=rng.randint(1, 40)))
        beams = [""]
        mine = []
        for _ in range(rng.randint(2, 5)):
            beams = [
                beam + "".join(rng.choices(ALPHABET, k=rng.randint(1, 9)))
                for beam in beams
                for _ in range(3)
            ]
            ends = [rng.random() < 0.2 for _ in beams]
            mine.append(
                [
                    ScoreInput(prompt, beam, (), end, end)
                    for beam, end in zip(beams, ends, strict=True)
                ]
            )
            beams = rng.sample(beams, 2)
        calls.append(mine)
    return [mine.pop(0) for mine in rng.sample(calls * 9, len(calls) * 9) if mine]


def worst_error(scorer: TextValueModel, oracle: Any, calls: list[list[ScoreInput]]) -> float:
    errors = [np.abs(np.subtract(scorer(call), oracle(call))).max() for call in calls]
    return float(max(errors))


@pytest.mark.parametrize("num_blocks", [12, 200])
@pytest.mark.parametrize("is_scalar", [False, True], ids=["vocabulary", "scalar"])
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_scoring_from_scratch(shape: str, is_scalar: bool, num_blocks: int) -> None:
    """With room for every text, and with so little that most of it gives way all the time."""
    scorer, oracle = pair_of(shape, is_scalar=is_scalar, num_blocks=num_blocks)
    calls = a_search(random.Random(fresh_seed()))
    assert worst_error(scorer, oracle, calls) < 1e-4
    texts = [scorer.encode(item) for call in calls for item in call]
    assert scorer.num_tokens_forwarded <= sum(map(len, texts))
    if num_blocks == 200:
        assert scorer.num_tokens_forwarded < 0.5 * sum(map(len, texts))
    assert all(pool.shape[0] == num_blocks for pool in scorer.runner.pools)


def test_last_tokens_do_change() -> None:
    """The premise: texts that grow are tokenised otherwise at their old end."""
    tokenizer = pair_tokenizer()
    rng = random.Random(5)
    text = "".join(rng.choices(ALPHABET, k=40))
    ids = [tokenizer(text[:n]).input_ids for n in range(1, 40)]
    assert any(b[: len(a)] != a for a, b in itertools.pairwise(ids))
    assert max(map(len, ids)) < 30


@pytest.mark.parametrize("is_scalar", [False, True], ids=["vocabulary", "scalar"])
def test_too_long_a_prefix_is_seen(monkeypatch, is_scalar: bool) -> None:
    """The control: one token too many taken for known."""
    honest = prefix_cache._common_prefix
    monkeypatch.setattr(
        prefix_cache,
        "_common_prefix",
        lambda a, b: min(honest(a, b) + 1, len(a), len(b)),
    )
    scorer, oracle = pair_of("llama", is_scalar=is_scalar)
    assert worst_error(scorer, oracle, a_search(random.Random(1))) > 1e-2


def test_only_what_is_new_is_computed() -> None:
    scorer, _ = pair_of("llama", is_scalar=True)

    def cost(*texts: str, ends_text: bool = False) -> int:
        before = scorer.num_tokens_forwarded
        scorer([ScoreInput(text, "", (), ends_text, ends_text) for text in texts])
        return scorer.num_tokens_forwarded - before

    # Letters do not merge: a token each.
    text = "abcdefghijklmnopqrstuvwxyz" * 2
    assert cost(text) == 52 + 1  # and the beginning of text
    assert cost(text + "abc") == 3
    assert cost(text + "abc", ends_text=True) == 1
    assert cost(text + "abc") == 1
    assert cost(text + "abc", text + "abc") == 1
    assert cost(text + "z", text + "y", text + "x") == 3


def test_special_tokens() -> None:
    scorer, _ = pair_of("llama", is_scalar=True)
    bos, eos = scorer.tokenizer.bos_token_id, scorer.tokenizer.eos_token_id
    plain = scorer.tokenizer("ab", add_special_tokens=False).input_ids
    assert scorer.encode(ScoreInput("a", "b", (), False)) == [bos, *plain]
    assert scorer.encode(ScoreInput("a", "b", (), True)) == [bos, *plain]
    assert scorer.encode(ScoreInput("a", "b", (), True, True)) == [bos, *plain, eos]
    # A chat template has written it already.
    assert scorer.encode(ScoreInput("<s>a", "b", (), False)) == [bos, *plain]
    # A tokenizer that would end every text: only those that have ended.
    fields = {"vocab_size": TEXT_VOCAB_SIZE, "seed": 3}
    closing = pair_tokenizer()
    closing.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", bos), ("</s>", eos)]
    )
    other = TextValueModel(value_model("gpt2", is_scalar=True, **fields), closing)
    assert closing("a").input_ids[-1] == eos
    assert other.encode(ScoreInput("a", "b", (), False)) == [bos, *plain]


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("a" * 256, CapacityError, "257 tokens exceeds the 256 positions"),
        ("a" * 130, CapacityError, "needs 10 KV blocks of 16, the value model has 8"),
        ("", InvalidParameterError, "must have 2 tokens"),
    ],
)
def test_texts_that_cannot_be_scored(text: str, error: type[Exception], message: str) -> None:
    scorer, oracle = pair_of("llama", is_scalar=False, num_blocks=8)
    good = ScoreInput("ab", "cd", (), False)
    with pytest.raises(error, match=message):
        scorer([good, ScoreInput(text, "", (), False)])
    np.testing.assert_allclose(scorer([good]), oracle([good]), atol=1e-4)


def test_a_failed_forward_leaves_nothing_behind(monkeypatch) -> None:
    scorer, oracle = pair_of("llama", is_scalar=True)
    texts = [ScoreInput("some text " * 3, "", (), False)]
    with monkeypatch.context() as patch:
        patch.setattr(scorer.runner, "hidden", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            scorer(texts)
    np.testing.assert_allclose(scorer(texts), oracle(texts), atol=1e-4)


def test_no_texts() -> None:
    scorer, _ = pair_of("gpt2", is_scalar=True)
    assert list(scorer([])) == []


def test_close_gives_the_model_back() -> None:
    model = value_model("gpt2", vocab_size=TEXT_VOCAB_SIZE, seed=3, is_scalar=True)
    ids = torch.tensor([[1, 2, 3]])
    before = model(ids)
    scorer = TextValueModel(model, pair_tokenizer(), num_blocks=8)
    scorer([ScoreInput("a", "b", (), False)])
    scorer.close()
    scorer.close()
    assert torch.equal(model(ids), before)
    assert scorer.runner.pools == []
    with pytest.raises(IVGError, match="closed"):
        scorer([ScoreInput("a", "b", (), False)])


def test_what_it_does_not_take() -> None:
    tokenizer = pair_tokenizer()
    with pytest.raises(UnsupportedModelError, match="value must be a ValueHeadModel"):
        TextValueModel(torch.nn.Linear(2, 2), tokenizer)
    tokenizer.eos_token = None
    model = value_model("gpt2", vocab_size=TEXT_VOCAB_SIZE, seed=3)
    with pytest.raises(InvalidParameterError, match="tokenizer must have an end-of-text token"):
        TextValueModel(model, tokenizer)
