# SPDX-License-Identifier: Apache-2.0
"""Tokens measured by models, and what a callable may and may not return."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from tiny_models import tiny_model

from ivg_fast.errors import ScorerError, UnsupportedModelError
from ivg_fast.models.runner import ModelRunner
from ivg_fast.models.value_head import ValueHeadModel
from ivg_fast.models.values import TokenScorer, call_scorer
from ivg_fast.params import ScoreInput

INPUTS = [ScoreInput("p", text, (1, 2), False) for text in ("a", "bb", "ccc")]


def test_explicit_is_one_dot_product_a_token() -> None:
    head = torch.nn.Linear(32, 97, bias=False).requires_grad_(False)
    runner = ModelRunner(ValueHeadModel(tiny_model("gpt2").transformer, head), role="value")
    hidden, rows, ids = torch.randn(5, 32), np.array([4, 0, 0, 2]), np.array([96, 1, 7, 7])
    measured = TokenScorer({"value": runner}, 97).scores("explicit", [hidden], rows, ids)
    expected = (hidden.double() @ head.weight.double().T).numpy()[rows, ids]
    np.testing.assert_allclose(measured, expected, atol=1e-5)
    # One place to the right in the row of token values is another score.
    shifted = TokenScorer({"value": runner}, 97).scores("explicit", [hidden], rows, (ids + 1) % 97)
    assert not np.allclose(shifted, expected, atol=1e-5)


def test_implicit_is_a_log_ratio_over_the_shared_ids() -> None:
    tuned, untuned = torch.randn(5, 100), torch.randn(5, 104)
    rows, ids = np.array([4, 0, 0, 2]), np.array([96, 1, 7, 7])
    measured = TokenScorer({}, 97).scores("implicit", [tuned, untuned], rows, ids)
    # Padded logits beyond the shared ids take no part in either distribution.
    parts = [logits[:, :97].double().log_softmax(-1).numpy() for logits in (tuned, untuned)]
    np.testing.assert_allclose(measured, (parts[0] - parts[1])[rows, ids], atol=1e-5)


def test_hidden_states_need_a_value_head() -> None:
    runner = ModelRunner(tiny_model("gpt2"), role="base", self_test=False)
    with pytest.raises(UnsupportedModelError, match="base must be a ValueHeadModel"):
        runner.head(torch.randn(1, 32))


def test_callable_scores() -> None:
    assert call_scorer(lambda xs: [len(x.response) for x in xs], INPUTS).tolist() == [1.0, 2.0, 3.0]
    tensor_scorer = lambda xs: torch.arange(len(xs)) / 2  # noqa: E731
    assert call_scorer(tensor_scorer, INPUTS).tolist() == [0.0, 0.5, 1.0]


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
        call_scorer(lambda _: scores, INPUTS)


def test_callable_that_raises_keeps_its_cause() -> None:
    def broken(_):
        raise KeyError("lexicon")

    with pytest.raises(ScorerError, match="scorer broken raised KeyError: 'lexicon'") as caught:
        call_scorer(broken, INPUTS)
    assert isinstance(caught.value.__cause__, KeyError)


def test_score_input_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        INPUTS[0].response = "x"
