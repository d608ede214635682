# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels behind guided_sample and token_logprobs; triton is imported when needed."""

from __future__ import annotations

import os

from torch import Tensor

from ivg_fast.errors import InvalidParameterError
from ivg_fast.ops._sample_args import GuidedSample, SampleArgs


def check_device(name: str, logits: Tensor) -> None:
    """Raise for logits that Triton cannot reach: its interpreter alone runs on the CPU."""
    if logits.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise InvalidParameterError(name, logits.device, "must be on a GPU for backend 'triton'")


def sample_triton(args: SampleArgs) -> GuidedSample:
    """guided_sample by the Triton kernels."""
    check_device("base", args.base)
    from ivg_fast.triton_kernels import guided_sample

    return GuidedSample(
        *guided_sample.guided_sample(
            args.base,
            args.tuned,
            args.untuned,
            weight=args.weight,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            min_p=args.min_p,
            seeds=args.seeds.contiguous(),
            candidate_ids=args.candidate_ids.contiguous(),
            positions=args.positions.contiguous(),
            logit_rows=args.logit_rows,
            banned_ids=args.banned_ids,
            banned_until=args.banned_until,
        )
    )


def token_logprobs_triton(
    name: str, logits: Tensor, minus: Tensor | None, token_ids: Tensor, rows: Tensor | None
) -> Tensor:
    """token_logprobs by the Triton kernels; `name` is what the caller calls the logits."""
    check_device(name, logits)
    from ivg_fast.triton_kernels import token_logprobs

    rows = None if rows is None else rows.contiguous()
    return token_logprobs.token_logprobs(logits, minus, token_ids.contiguous(), rows)
