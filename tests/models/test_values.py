# SPDX-License-Identifier: Apache-2.0
"""What tokens are worth to the value functions, and what a callable may and may not return."""

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


def value_runner() -> ModelRunner:
    head = torch.nn.Linear(32, 97, bias=False)
    return ModelRunner(ValueHeadModel(tiny_model("gpt2").transformer, head), role="value")


@pytest.mark.parametrize("seed", [1, 2])
def test_explicit_score_is_one_dot_product_a_token(seed: int) -> None:
    runner = value_runner()
    rng = np.random.default_rng(seed)
    hidden = torch.from_numpy(rng.normal(size=(5, 32)).astype(np.float32))
    rows, tokens = rng.integers(0, 5, 9), rng.integers(0, 97, 9)
    expected = (hidden.double() @ runner.score_head.weight.detach().double().T).numpy()
    scores = TokenScorer({"value": runner}, 97).scores("explicit", [hidden], rows, tokens)
    np.testing.assert_allclose(scores, expected[rows, tokens], atol=1e-5)
    assert not np.allclose(scores, expected[rows, (tokens + 1) % 97], atol=1e-2)


@pytest.mark.parametrize("seed", [1, 2])
def test_implicit_score_is_the_normalised_log_ratio(seed: int) -> None:
    """Over the shared ids only: what stands in the padding of wider logits must not count."""
    rng = np.random.default_rng(seed)
    tuned, untuned = (torch.from_numpy(rng.normal(size=(5, n)) * 3).float() for n in (99, 104))
    tuned[:, 97:], untuned[:, 97:] = 50.0, -50.0
    rows, tokens = rng.integers(0, 5, 9), rng.integers(0, 97, 9)
    ratio = (
        tuned[:, :97].double().log_softmax(-1) - untuned[:, :97].double().log_softmax(-1)
    ).numpy()
    scores = TokenScorer({}, 97).scores("implicit", [tuned, untuned], rows, tokens)
    np.testing.assert_allclose(scores, ratio[rows, tokens], atol=1e-5)


def test_only_a_value_head_gives_hidden_states() -> None:
    runner = ModelRunner(tiny_model("gpt2"), role="value", self_test=False)
    with pytest.raises(UnsupportedModelError, match="value must be a ValueHeadModel"):
        TokenScorer({"value": runner}, 97)


def test_callable_scores() -> None:
    assert call_scorer(lambda xs: [len(x.response) for x in xs], INPUTS).tolist() == [1, 2, 3]
    assert call_scorer(lambda xs: torch.arange(len(xs)) / 2, INPUTS).tolist() == [0, 0.5, 1]


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
