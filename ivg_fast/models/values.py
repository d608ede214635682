# SPDX-License-Identifier: Apache-2.0
"""How the engine asks a value function for scores.

Two kinds. A `PrefixValue` maps hidden states of the value role to scores; that role runs the
sampled tokens on the paged cache as every other does. A callable (`Scorer`) sees texts: any Python
callable, so also a model with another tokenizer.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch

from ivg_fast.errors import ScorerError, UnsupportedModelError
from ivg_fast.models.runner import ModelRunner
from ivg_fast.models.value_head import ValueHeadModel
from ivg_fast.params import ScoreInput, Scorer


class PrefixValue(Protocol):
    """A value that reads hidden states of the value role's runner.

    Attributes:
        runner: writes the tokens and gives the hidden states.
        reads_own_token: True if V(x, y<=t) needs the hidden state of y_t itself (a scalar head);
            False if that of the token before it will do (a vocabulary head).
    """

    runner: ModelRunner
    reads_own_token: bool

    def score(self, hidden: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """f32 [N]: V of N prefixes that end in `token_ids` i64 [N], from hidden states [N, H]."""
        ...


class VocabularyHeadValue:
    """V(x, y<=t) = w_{y_t} . h_{t-1}: one dot product a candidate."""

    reads_own_token = False

    def __init__(self, runner: ModelRunner) -> None:
        if not isinstance(runner.model, ValueHeadModel):
            raise UnsupportedModelError(
                f"{runner.role} must be a ValueHeadModel, got {type(runner.model).__name__}"
            )
        self.runner = runner
        self._weight = runner.model.score_head.weight

    @torch.inference_mode()
    def score(self, hidden: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """`hidden` [N, H] is of the token before each of `token_ids`; sums in float32."""
        return (hidden.float() * self._weight[token_ids].float()).sum(-1)


def call_text_value(scorer: Scorer, inputs: list[ScoreInput]) -> list[float]:
    """Calls `scorer` and checks what it returns.

    Raises:
        ScorerError: it raised, or did not return one finite number an input.
    """
    name = getattr(scorer, "__name__", type(scorer).__name__)
    try:
        scores = [float(score) for score in scorer(inputs)]
    except Exception as error:
        raise ScorerError(f"scorer {name} raised {type(error).__name__}: {error}") from error
    if len(scores) != len(inputs):
        raise ScorerError(f"scorer {name} must return {len(inputs)} scores, got {len(scores)}")
    for i, score in enumerate(scores):
        if not math.isfinite(score):
            raise ScorerError(f"scorer {name} must return finite scores, got {score} for input {i}")
    return scores
