# SPDX-License-Identifier: Apache-2.0
"""Scores of the vocabulary head, and what a callable may and may not return."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError

import pytest
import torch
from tiny_models import tiny_model

from ivg_fast.errors import ScorerError, UnsupportedModelError
from ivg_fast.models.runner import ModelRunner
from ivg_fast.models.value_head import ValueHeadModel
from ivg_fast.models.values import ScoreInput, VocabularyHeadValue, call_text_value

INPUTS = [ScoreInput("p", text, (1, 2), False) for text in ("a", "bb", "ccc")]


def test_vocabulary_head_is_one_dot_product_a_token() -> None:
    head = torch.nn.Linear(32, 97, bias=False)
    runner = ModelRunner(ValueHeadModel(tiny_model("gpt2").transformer, head), role="value")
    value = VocabularyHeadValue(runner)
    hidden, ids = torch.randn(9, 32), torch.randint(97, (9,))
    expected = (hidden.double() @ head.weight.double().T)[torch.arange(9), ids]
    torch.testing.assert_close(value.score(hidden, ids).double(), expected, atol=1e-5, rtol=1e-5)
    assert not value.reads_own_token
    # The same score read off the whole row of token values, one place to the right, is another.
    assert not torch.allclose(value.score(hidden, (ids + 1) % 97).double(), expected)


def test_vocabulary_head_wants_a_value_head() -> None:
    with pytest.raises(UnsupportedModelError, match="base must be a ValueHeadModel"):
        VocabularyHeadValue(ModelRunner(tiny_model("gpt2"), role="base", self_test=False))


def test_callable_scores() -> None:
    assert call_text_value(lambda xs: [len(x.response) for x in xs], INPUTS) == [1.0, 2.0, 3.0]
    tensor_scorer = lambda xs: torch.arange(len(xs)) / 2  # noqa: E731
    assert call_text_value(tensor_scorer, INPUTS) == [0.0, 0.5, 1.0]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([1.0, 2.0], "must return 3 scores, got 2"),
        ([1.0, 2.0, 3.0, 4.0], "must return 3 scores, got 4"),
        ([1.0, math.nan, 3.0], "finite scores, got nan for input 1"),
        ([1.0, 2.0, -math.inf], "finite scores, got -inf for input 2"),
        ([1.0, "no number", 3.0], "raised ValueError"),
        (None, "raised TypeError"),
    ],
)
def test_callable_is_checked(scores, message: str) -> None:
    with pytest.raises(ScorerError, match=message):
        call_text_value(lambda _: scores, INPUTS)


def test_callable_that_raises_keeps_its_cause() -> None:
    def broken(_):
        raise KeyError("lexicon")

    with pytest.raises(ScorerError, match="scorer broken raised KeyError: 'lexicon'") as caught:
        call_text_value(broken, INPUTS)
    assert isinstance(caught.value.__cause__, KeyError)


def test_score_input_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        INPUTS[0].response = "x"
