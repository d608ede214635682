# SPDX-License-Identifier: Apache-2.0
"""token_logprobs and its pair on the CPU."""

import numpy as np
import pytest
import torch

from ivg_fast.errors import InvalidParameterError
from ivg_fast.ops.token_logprobs import (
    pair_token_logprobs,
    pair_token_logprobs_ref,
    token_logprobs,
    token_logprobs_ref,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("vocab_size", [2, 63, 1024, 1025, 50_257])
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_at_most_twice_that_of_plain_pytorch(vocab_size, dtype):
    torch.manual_seed(vocab_size)
    logits = torch.randn(40, vocab_size + 3).mul(3).to(dtype)[:, 2:-1]
    other = torch.randn(40, vocab_size).mul(3)
    ids = torch.randint(0, vocab_size, (40,))
    at = ids[:, None]
    exact = logits.double().log_softmax(1).gather(1, at)[:, 0]
    plain = logits.float().log_softmax(1).gather(1, at)[:, 0]
    floor = 2.0**-23 * float(exact.abs().max())
    bound = max(2 * float((plain - exact).abs().max()), floor)
    assert float((token_logprobs(logits, ids) - exact).abs().max()) <= bound
    pair = exact - other.double().log_softmax(1).gather(1, at)[:, 0]
    plain_pair = plain - other.log_softmax(1).gather(1, at)[:, 0]
    bound = max(2 * float((plain_pair - pair).abs().max()), floor)
    assert float((pair_token_logprobs(logits, other, ids) - pair).abs().max()) <= bound


def test_rows_may_repeat_and_come_in_any_order():
    torch.manual_seed(1)
    logits, other = torch.randn(5, 3000), torch.randn(5, 3000).bfloat16()
    rows = torch.tensor([4, 4, 0, 1, 1, 1, 4, 3], dtype=torch.int32)
    ids = torch.randint(0, 3000, (8,))
    expected = token_logprobs_ref(logits, ids, rows)
    for backend in ("cpu", "torch", "auto"):
        got = token_logprobs(logits, ids, rows, backend=backend)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    got = pair_token_logprobs(logits, other, ids.numpy(), rows.numpy())
    torch.testing.assert_close(
        got, pair_token_logprobs_ref(logits, other, ids, rows), rtol=1e-6, atol=1e-6
    )
    assert torch.equal(got, pair_token_logprobs(logits[rows], other[rows], ids))


def test_special_values():
    logits = torch.zeros(4, 2000)
    logits[0, 3] = -torch.inf
    logits[1, 5] = torch.nan
    logits[2, 5] = torch.inf
    logits[3] = -torch.inf
    for backend in ("cpu", "torch"):
        got = token_logprobs(logits, [3, 3, 3, 3], backend=backend)
        assert got[0] == -torch.inf
        assert bool(got[1:].isnan().all())
    assert token_logprobs(torch.empty(0, 10), torch.empty(0, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("token_ids", (torch.zeros(3, 8), [0, 1, 8])),
        ("token_ids", (torch.zeros(3, 8), [0, 1])),
        ("token_ids", (torch.zeros(3, 8), np.zeros(3))),
        ("logit_rows", (torch.zeros(3, 8), [0, 1], [0, 3])),
        ("logits", (torch.zeros(3, 8).double(), [0, 1, 2])),
        ("logits", (torch.zeros(8, 3).T, [0, 1, 2])),
    ],
)
def test_errors_name_the_parameter(name, arguments, backend):
    with pytest.raises(InvalidParameterError) as caught:
        token_logprobs(*arguments, backend=backend)
    assert caught.value.parameter == name


def test_errors_of_the_pair_name_its_tensors():
    with pytest.raises(InvalidParameterError, match="untuned must have the shape of tuned"):
        pair_token_logprobs(torch.zeros(3, 8), torch.zeros(3, 9), [0, 1, 2])


def test_no_temporary_of_the_logits_size():
    logits = torch.randn(64, 50_000).bfloat16()
    ids = torch.randint(0, 50_000, (64,))
    with torch.profiler.profile(profile_memory=True) as profile:
        token_logprobs(logits, ids)
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())
    assert allocated <= 16 * 1024
