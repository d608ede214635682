# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of given tokens."""

from __future__ import annotations

from torch import Tensor


def pair_token_logprobs(
    tuned: Tensor, untuned: Tensor, token_ids: Tensor, logit_rows: Tensor
) -> Tensor:
    """log tuned - log untuned of token_ids [N], float32 [N], from rows [N] of logits [R, V]."""
    difference = tuned[logit_rows].float().log_softmax(-1)
    difference -= untuned[logit_rows].float().log_softmax(-1)
    return difference.gather(1, token_ids[:, None]).squeeze(1)
