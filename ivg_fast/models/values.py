# SPDX-License-Identifier: Apache-2.0
"""How value functions measure tokens and texts.

A value that lives in a role of the engine measures from that role's outputs, and the role runs the
sampled tokens on the paged cache as every other does: the implicit pair and a vocabulary head at
the position before a token, a scalar head at the token itself. A ValueFunction sees texts, so it
may be anything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ivg_fast.errors import ScorerError
from ivg_fast.models.runner import ModelRunner
from ivg_fast.ops.packed import upload
from ivg_fast.ops.token_logprobs import pair_token_logprobs
from ivg_fast.params import ScoreInput, Scorer


class ValueFunction(Protocol):
    """What scores texts: any callable of this signature, a plain function too.

    Given to an engine as its `value`, it is what scorer="explicit" asks, with the value role's
    prompt; given as SearchParams.scorer, it sees the base model's. An engine calls it once a
    request and selection, with every candidate that has no score yet. One that also has `close()`
    is closed together with the engine whose `value` it is.
    """

    def __call__(self, inputs: list[ScoreInput], /) -> Sequence[float]:
        """One finite number an input, larger is better."""
        ...


@dataclass(frozen=True, slots=True)
class ExplicitValue:
    """Which explicit value an engine has.

    Attributes:
        kind: "vocabulary" and "scalar" are heads that share the base's token ids; "text" goes
            through text.
        shares_trunk: its backbone is that of `tuned`, so one forward serves both.
        function: of kind "text".
    """

    kind: Literal["none", "vocabulary", "scalar", "text"] = "none"
    shares_trunk: bool = False
    function: ValueFunction | None = None

    @property
    def is_role(self) -> bool:
        """Whether it runs on the engine's paged cache."""
        return self.kind in ("vocabulary", "scalar")


class TokenScorer:
    """Measures given tokens from model outputs.

    Args:
        runners: by role; those that are there decide what can be measured.
        vocab_size: ids that all models share; wider logits are cut to it.
    """

    def __init__(self, runners: Mapping[str, ModelRunner], vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._head = runners["value"].score_head if "value" in runners else None

    @torch.inference_mode()
    def scores(
        self,
        kind: str,
        outputs: Sequence[torch.Tensor],
        rows: NDArray[np.integer],
        tokens: NDArray[np.integer],
    ) -> NDArray[np.float64]:
        """What each token is worth to the value function `kind`.

        Args:
            kind: "implicit": log tuned - log untuned of the token; "explicit": V(x, y<=t) =
                w_{y_t} . h_{t-1}.
            outputs: "implicit": logits [R, V] of tuned and of untuned; "explicit": hidden states
                [R, H] of the value role.
            rows: [N], the row of `outputs` that stands right before each token.
            tokens: [N] ids.

        Returns:
            float64 [N].
        """
        device = outputs[0].device
        index = upload(rows.astype(np.int64), device)
        ids = upload(tokens.astype(np.int64), device)
        return self.measure(kind, outputs, index, ids).double().cpu().numpy()

    def measure(
        self,
        kind: str,
        outputs: Sequence[torch.Tensor],
        rows: torch.Tensor | None,
        tokens: torch.Tensor,
    ) -> torch.Tensor:
        """`scores` of int64 tensors on the outputs' device, which is not waited for: float32 [N].

        `rows` None: one token a row of the outputs.
        """
        if kind == "implicit":
            tuned, untuned = (logits[:, : self._vocab_size] for logits in outputs)
            return pair_token_logprobs(tuned, untuned, tokens, rows)
        assert self._head is not None
        states = outputs[0] if rows is None else outputs[0][rows]
        return (states.float() * self._head.weight[tokens].float()).sum(-1)

    @torch.inference_mode()
    def scalars(self, states: torch.Tensor) -> NDArray[np.float64]:
        """float64 [N]: what a scalar head makes of hidden states [N, H]."""
        assert self._head is not None
        values = states.float() @ self._head.weight[0].float()
        if self._head.bias is not None:
            values = values + self._head.bias.float()
        return values.double().cpu().numpy()


def call_scorer(scorer: Scorer, inputs: list[ScoreInput]) -> NDArray[np.float64]:
    """Calls a user's scorer and checks what it returns: float64 [len(inputs)].

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
    return np.array(scores)
