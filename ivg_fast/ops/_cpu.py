# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels behind guided_sample and token_logprobs.

The extension reads the plain forms of an argument by itself and declines the rest; only then does the
slow path look closer, to name what is wrong or to bring the argument to a plain form.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ivg_fast import _C
from ivg_fast.errors import InvalidParameterError
from ivg_fast.ops._sample_args import (
    MIN_TEMPERATURE,
    GuidedSample,
    normalise,
)

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_CPU = torch.device("cpu")

Source = tuple[int, int, int]


def _source(logits: Tensor, shape: torch.Size) -> Source | None:
    """(address, row stride in elements, dtype code); None where the kernels cannot read it."""
    code = _DTYPE_CODES.get(logits.dtype)
    if code is None or logits.shape != shape or not logits.is_cpu:
        return None
    row_stride, column_stride = logits.stride()
    return (logits.data_ptr(), row_stride, code) if column_stride == 1 else None


def _sources(*logits: Tensor | None) -> tuple[list[Source | None], int, int] | None:
    """The sources, rows and vocabulary; None where something is wrong with one of the logits."""
    shape = logits[0].shape  # type: ignore[union-attr]
    if len(shape) != 2 or shape[1] < 2:
        return None
    sources: list[Source | None] = []
    for each in logits:
        source = None if each is None else _source(each, shape)
        if source is None and each is not None:
            return None
        sources.append(source)
    return sources, shape[0], shape[1]


def _check_device(name: str, logits: Tensor) -> None:
    if not logits.is_cpu:
        raise InvalidParameterError(name, logits.device, "must be on the CPU for backend 'cpu'")


def _try_sample(
    base: Tensor, tuned: Tensor | None, untuned: Tensor | None, logit_rows: Any, *rest: Any
) -> GuidedSample | None:
    if untuned is not None and tuned is None:
        return None
    described = _sources(base, tuned, untuned)
    if described is None:
        return None
    sources, num_rows, vocab_size = described
    num_samples = num_rows if logit_rows is None else len(logit_rows)
    result = GuidedSample(
        torch.empty(num_samples, dtype=torch.int64),
        torch.empty(num_samples, dtype=torch.float32),
        torch.empty(num_samples, dtype=torch.float32),
        torch.empty(num_samples, dtype=torch.float32),
        torch.empty(num_samples, dtype=torch.float32),
        torch.empty(num_samples, dtype=torch.bool),
    )
    is_done = _C.guided_sample(
        *sources,
        *(num_rows, vocab_size, num_samples, logit_rows),
        *rest,
        MIN_TEMPERATURE,
        [tensor.data_ptr() for tensor in result],
        torch.get_num_threads(),
    )
    return result if is_done else None


def sample_cpu(
    base: Tensor,
    tuned: Tensor | None,
    untuned: Tensor | None,
    weight: Any,
    temperature: Any,
    top_k: Any,
    top_p: Any,
    min_p: Any,
    seeds: Any,
    candidate_ids: Any,
    positions: Any,
    logit_rows: Any,
    banned_ids: Any,
    banned_until: Any,
) -> GuidedSample:
    """guided_sample by the C++ kernel."""
    try:
        result = _try_sample(
            *(base, tuned, untuned, logit_rows, weight, temperature, top_k, top_p, min_p),
            *(seeds, candidate_ids, positions, banned_ids, banned_until),
        )
    except (AttributeError, TypeError):  # something is no tensor, or has no length
        result = None
    if result is not None:
        return result
    args = normalise(
        base,
        tuned,
        untuned,
        weight=weight,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seeds=seeds,
        candidate_ids=candidate_ids,
        positions=positions,
        logit_rows=logit_rows,
        banned_ids=banned_ids,
        banned_until=banned_until,
    )
    _check_device("base", base)
    result = _try_sample(
        *(base, tuned, untuned, args.rows, args.weight, args.temperature),
        *(args.top_k, args.top_p, args.min_p, args.seeds, args.candidate_ids, args.positions),
        *(torch.where(args.banned, args.banned_ids, -1), None),
    )
    if result is None:
        raise RuntimeError("the kernel declined arguments in their normal form")
    return result
