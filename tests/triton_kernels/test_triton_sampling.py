# SPDX-License-Identifier: Apache-2.0
"""The Triton sampling kernels, in small: vocabularies of a few blocks of 64."""

import random

import pytest
import torch
from ops.step_cases import advanced, make_state, unequal
from sampling_cases import DTYPES, make_case, rows_of
from sampling_contract import is_drawable, violation

from ivg_fast.errors import InvalidParameterError
from ivg_fast.ops.guided_sample import GuidedSample, guided_sample, guided_sample_ref
from ivg_fast.ops.step_state import sample_step
from ivg_fast.ops.token_logprobs import (
    pair_token_logprobs,
    pair_token_logprobs_ref,
    token_logprobs,
    token_logprobs_ref,
)
from ivg_fast.triton_kernels import guided_sample as kernels
from ivg_fast.triton_kernels import token_logprobs as logprob_kernels

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 64)
    monkeypatch.setattr(logprob_kernels, "BLOCK", 64)


def index(num_samples: int, device: str) -> dict[str, torch.Tensor]:
    return {
        "seeds": torch.arange(num_samples, device=device) + 2**45,
        "candidate_ids": torch.arange(num_samples, device=device) * 5,
        "positions": torch.arange(num_samples, device=device, dtype=torch.int32),
    }


def check(case, got: GuidedSample) -> None:
    for i, row in enumerate(rows_of(case)):
        token = int(got.token_ids[i])
        assert bool(got.valid[i]) == is_drawable(row) == (token >= 0)
        assert token < 0 or violation(row, token) is None
    reference = guided_sample_ref(*case.logits, **case.arguments)
    same = got.valid & (got.token_ids == reference.token_ids)
    for ours, theirs in zip(got[1:5], reference[1:5], strict=True):
        torch.testing.assert_close(ours[same], theirs[same], rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("seed", range(6))
def test_contract_without_filters(seed, device):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    case = make_case(rng, [2, 63, 64, 150, 200, 300][seed], 4, device)
    for name, off in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)):
        case.arguments[name].fill_(off)
    numbers = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    got = guided_sample(*case.logits, **(case.arguments | numbers), backend="triton")
    check(case, got)


@pytest.mark.parametrize("seed", [10, 11, 12])
def test_contract_with_filters(seed, device):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    case = make_case(rng, 150, 4, device)
    check(case, guided_sample(*case.logits, **case.arguments, backend="triton"))


def test_filters_given_as_numbers(device):
    torch.manual_seed(1)
    logits = [torch.randn(3, 130, device=device) * 2 for _ in range(3)]
    logits[0][1] = (logits[0][1] * 2).round()  # ties at the thresholds
    for setting in ({"top_k": 7}, {"top_p": 0.6}, {"min_p": 0.2, "temperature": 0.6}):
        got = guided_sample(*logits, **setting, **index(3, device), backend="triton")
        reference = guided_sample_ref(*logits, **setting, **index(3, device))
        assert torch.equal(got.token_ids, reference.token_ids)
        torch.testing.assert_close(got.logprob, reference.logprob, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_offsets_beyond_two_to_the_31(dtype, device):
    torch.manual_seed(2)
    far = 2**31 + 5
    # Only the touched pages of this become memory.
    storage = torch.empty(far + 100, dtype=dtype, device=device)
    logits = storage.as_strided((2, 100), (far, 1))
    logits.copy_(torch.randn(2, 100))
    got = guided_sample(logits, **index(2, device), backend="triton")
    reference = guided_sample_ref(logits, **index(2, device))
    assert torch.equal(got.token_ids, reference.token_ids)
    ids = torch.tensor([5, 99], device=device)
    got_logprobs = token_logprobs(logits, ids, backend="triton")
    torch.testing.assert_close(got_logprobs, token_logprobs_ref(logits, ids))


@pytest.mark.parametrize("vocab_size", [9, 150])
def test_the_draw_prepares_the_next_step(vocab_size, device):
    """The kernel's last part, over one vocabulary block and over several."""
    rng = random.Random(vocab_size)
    torch.manual_seed(3)
    state = make_state(rng, 13, vocab_size, device)
    logits = [torch.randn(13, vocab_size, device=device) for _ in range(3)]
    logits[1][2] = torch.nan
    for _ in range(2):
        arguments = index(13, device) | {"positions": state.positions}
        drawn = guided_sample(*logits, **arguments, backend="triton")
        expected = advanced(state, drawn)
        del arguments["positions"]
        numbers = {"weight": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        sample_step(*logits, state, **arguments, **numbers, backend="triton")
        assert unequal(state, expected) == []


def test_token_logprobs(device):
    torch.manual_seed(4)
    logits = torch.randn(5, 150, device=device) * 3
    other = torch.randn(5, 150, device=device).bfloat16()
    logits[3, 7] = -torch.inf
    rows = torch.tensor([4, 0, 0, 3], device=device)
    ids = torch.tensor([149, 64, 63, 7], device=device)
    got = token_logprobs(logits, ids, rows, backend="triton")
    torch.testing.assert_close(got, token_logprobs_ref(logits, ids, rows), rtol=1e-6, atol=1e-6)
    got = pair_token_logprobs(logits, other, ids, rows, backend="triton")
    expected = pair_token_logprobs_ref(logits, other, ids, rows)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_empty_batch(device):
    got = guided_sample(torch.empty(0, 10, device=device), **index(0, device), backend="triton")
    assert [tuple(field.shape) for field in got] == [(0,)] * 6
    ids = torch.empty(0, dtype=torch.int64, device=device)
    assert token_logprobs(torch.empty(0, 10, device=device), ids, backend="triton").shape == (0,)


def test_compiled_kernels_refuse_the_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(InvalidParameterError, match="must be on a GPU"):
        guided_sample(torch.zeros(1, 8), **index(1, "cpu"), backend="triton")
    with pytest.raises(InvalidParameterError, match="logits must be on a GPU"):
        token_logprobs(torch.zeros(1, 8), [1], backend="triton")
