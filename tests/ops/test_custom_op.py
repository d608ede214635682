# SPDX-License-Identifier: Apache-2.0
"""guided_sample under torch.compile, and the checks of its fake implementation."""

import pytest
import torch

from ivg_fast.errors import InvalidParameterError
from ivg_fast.ops._custom_op import guided_sample_op
from ivg_fast.ops.guided_sample import guided_sample


def test_op_passes_the_library_checks():
    torch.manual_seed(0)
    logits = [torch.randn(4, 300) for _ in range(3)]
    index = torch.arange(4)
    numbers = [1.0, 0.0, 10.0, 1.0, 0.0]
    tensors = [None, torch.tensor([0.5, 1.0, 0.0, 2.0]), None, None, None]
    torch.library.opcheck(
        guided_sample_op,
        (*logits, numbers, tensors, index, index, index, None, None, None, "cpu"),
    )
    base, three = logits[0].bfloat16(), index[:3]
    bans = torch.zeros(3, 2, dtype=torch.int64)
    torch.library.opcheck(
        guided_sample_op,
        (base, None, None, numbers, [None] * 5, three, three, three, three, bans, three, "torch"),
    )


def test_compiled_equals_eager():
    torch.manual_seed(1)
    head = torch.randn(16, 500)
    others = [torch.randn(3, 500) for _ in range(2)]
    temperature = torch.tensor([0.5, 0.0, 2.0])

    def step(hidden, seeds, positions):
        logits = hidden @ head
        drawn = guided_sample(
            logits,
            *others,
            temperature=temperature,
            top_k=20,
            seeds=seeds,
            candidate_ids=7,
            positions=positions,
            banned_ids=torch.tensor([[1, 2]] * 3),
        )
        return drawn.token_ids + 1, drawn.logprob

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    hidden = torch.randn(3, 16)
    arguments = (hidden, torch.tensor([1, -5, 9]), torch.tensor([0, 3, 4]))
    for got, expected in zip(compiled(*arguments), step(*arguments), strict=True):
        assert torch.equal(got, expected)
    with pytest.raises(InvalidParameterError, match="positions"):
        compiled(hidden, torch.tensor([1, 2, 3]), torch.tensor([0, -1, 2]))
