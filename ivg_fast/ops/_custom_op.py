# SPDX-License-Identifier: Apache-2.0
"""guided_sample as a torch.library op, which is how it goes through torch.compile."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ivg_fast.ops._sample_args import GuidedSample

Fields = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("ivg_fast::guided_sample", mutates_args=())
def guided_sample_op(
    base: Tensor,
    tuned: Tensor | None,
    untuned: Tensor | None,
    numbers: Sequence[float],
    tensors: Sequence[Tensor | None],
    seeds: Tensor,
    candidate_ids: Tensor,
    positions: Tensor,
    logit_rows: Tensor | None,
    banned_ids: Tensor | None,
    banned_until: Tensor | None,
    backend: str,
) -> Fields:
    """The fields of GuidedSample.

    `tensors` are weight, temperature, top_k, top_p and min_p where these are per-sample tensors;
    where one is None, the number at its place in `numbers` holds for all samples.
    """
    from ivg_fast.ops.guided_sample import guided_sample

    weight, temperature, top_k, top_p, min_p = (
        number if tensor is None else tensor
        for number, tensor in zip(numbers, tensors, strict=True)
    )
    return guided_sample(
        base,
        tuned,
        untuned,
        weight=weight,
        temperature=temperature,
        top_k=top_k if isinstance(top_k, Tensor) else int(top_k),
        top_p=top_p,
        min_p=min_p,
        seeds=seeds,
        candidate_ids=candidate_ids,
        positions=positions,
        logit_rows=logit_rows,
        banned_ids=banned_ids,
        banned_until=banned_until,
        backend=backend,  # type: ignore[arg-type]
    )


@guided_sample_op.register_fake
def _(
    base: Tensor,
    tuned: Tensor | None,
    untuned: Tensor | None,
    numbers: Sequence[float],
    tensors: Sequence[Tensor | None],
    seeds: Tensor,
    candidate_ids: Tensor,
    positions: Tensor,
    logit_rows: Tensor | None,
    banned_ids: Tensor | None,
    banned_until: Tensor | None,
    backend: str,
) -> Fields:
    num_samples = base.shape[0] if logit_rows is None else logit_rows.shape[0]
    return (
        base.new_empty(num_samples, dtype=torch.int64),
        base.new_empty(num_samples, dtype=torch.float32),
        base.new_empty(num_samples, dtype=torch.float32),
        base.new_empty(num_samples, dtype=torch.float32),
        base.new_empty(num_samples, dtype=torch.float32),
        base.new_empty(num_samples, dtype=torch.bool),
    )


def _tensor(values: Any) -> Tensor:
    if isinstance(values, int):
        values = (values + 2**63) % 2**64 - 2**63  # unsigned seeds keep their bits
    return torch.as_tensor(values)


def sample_traced(
    base: Tensor,
    tuned: Tensor | None,
    untuned: Tensor | None,
    parameters: Sequence[Any],
    indices: Sequence[Any],
    optional: Sequence[Any],
    backend: str,
) -> GuidedSample:
    """guided_sample while torch.compile traces it; values are checked when the graph runs.

    Args:
        parameters: weight, temperature, top_k, top_p, min_p.
        indices: seeds, candidate_ids, positions.
        optional: logit_rows, banned_ids, banned_until.
    """
    return GuidedSample(
        *guided_sample_op(
            base,
            tuned,
            untuned,
            [0.0 if isinstance(each, Tensor) else float(each) for each in parameters],
            [each if isinstance(each, Tensor) else None for each in parameters],
            *(_tensor(each) for each in indices),
            *(None if each is None else _tensor(each) for each in optional),
            backend,
        )
    )
