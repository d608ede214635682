# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from ivg_fast.errors import InvalidParameterError
from ivg_fast.training.grow import grow_gpt2
from ivg_fast.training.sft import new_gpt2


@pytest.mark.parametrize(("num_layers", "seed"), [(2, 0), (3, 1), (4, 2)])
def test_grown_model_has_the_same_logits(tokenizer, num_layers, seed):
    small = new_gpt2(tokenizer, 2, 64, 32, seed).double().eval()
    for parameter in small.parameters():  # so that every weight and bias matters
        torch.nn.init.normal_(parameter, std=0.2)
    large = grow_gpt2(small, num_layers, seed).double().eval()
    assert (large.config.n_embd, large.config.n_head) == (128, 4)
    assert len(large.transformer.h) == num_layers
    ids = torch.randint(0, len(tokenizer), (3, 20))
    with torch.no_grad():
        expected = small(ids).logits
        torch.testing.assert_close(large(ids).logits, expected, atol=1e-5, rtol=1e-5)
        # control: one block left out is seen
        large.transformer.h[0].mlp.c_proj.weight.zero_()
        assert (large(ids).logits - expected).abs().max() > 1e-2


def test_copies_part_ways(tokenizer):
    """Both halves of a doubled unit get different gradients, or growing would be for nothing."""
    large = grow_gpt2(new_gpt2(tokenizer, 1, 64, 32), 1)
    ids = torch.randint(0, len(tokenizer), (2, 20))
    large(input_ids=ids, labels=ids).loss.backward()
    first, second = large.transformer.h[0].mlp.c_fc.weight.grad.chunk(2, 1)
    assert (first - second).abs().max() > 1e-3 * first.abs().max()


def test_too_many_layers(tokenizer):
    with pytest.raises(InvalidParameterError, match="num_layers"):
        grow_gpt2(new_gpt2(tokenizer, 2, 64, 32), 5)
