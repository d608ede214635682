# SPDX-License-Identifier: Apache-2.0
"""guided_sample on the CPU: the contract, the measures, the arguments."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sampling_cases import DTYPES, run_cases
from sampling_contract import Row, violation

from ivg_fast import _C
from ivg_fast.errors import InvalidParameterError
from ivg_fast.ops.guided_sample import GuidedSample, guided_sample, guided_sample_ref
from ivg_fast.ops.philox import uniform

SIZES = [2, 3, 17, 63, 64, 65, 100, 1000, 1023, 1024, 1025, 2048, 5000, 32000]
ROOT = Path(__file__).parents[2]


def index(num_samples: int) -> dict[str, torch.Tensor]:
    return {
        "seeds": torch.arange(num_samples) * 7919,
        "candidate_ids": torch.arange(num_samples),
        "positions": torch.arange(num_samples) + 3,
    }


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("seed", [1, 2])
def test_contract(backend, seed, record_property):
    report = run_cases(backend, seed, SIZES * 3)
    assert not report.violations
    record_property("share_of_ids_that_differ", report.num_differ / report.num_samples)
    assert report.num_differ <= 0.01 * report.num_samples


def test_contract_at_large_vocabularies():
    report = run_cases("cpu", 3, [128_256, 262_144], num_samples=(4,))
    assert not report.violations


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_contract_in_every_instruction_set(isa):
    if isa == _C.cpu_isa():
        assert not run_cases("cpu", 4, SIZES * 2).violations
        return
    code = f"""
import sys; sys.path.insert(0, {str(ROOT / "tests")!r})
from ivg_fast import _C
from sampling_cases import run_cases
assert _C.cpu_isa() == {isa!r}, _C.cpu_isa()
report = run_cases("cpu", 4, {SIZES * 2})
assert not report.violations, report.violations
"""
    environment = {**os.environ, "IVG_FAST_CPU_ISA": isa}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if "lacks that instruction set" in done.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert done.returncode == 0, done.stderr


def test_contract_catches_wrong_draws():
    torch.manual_seed(5)
    z = torch.randn(1000).double()
    drawn = guided_sample(
        z.float()[None],
        seeds=1,
        candidate_ids=np.arange(20),
        positions=3,
        logit_rows=np.zeros(20, dtype=int),
    ).token_ids.tolist()
    rows = [Row(z, None, None, float(u)) for u in uniform(1, np.arange(20), 3)]
    assert not any(violation(row, token) for row, token in zip(rows, drawn, strict=True))
    neighbours = [min(token + 1, 999) for token in drawn]
    assert (
        sum(violation(row, token) is None for row, token in zip(rows, neighbours, strict=True)) < 2
    )
    hotter = [replace(row, temperature=1.05) for row in rows]
    assert any(violation(row, token) for row, token in zip(hotter, drawn, strict=True))
    eleventh = int(z.argsort(descending=True)[10])
    assert violation(replace(rows[0], top_k=10), eleventh) is not None


def plain_measures(base, tuned, untuned, weight, temperature, tokens) -> list[torch.Tensor]:
    """The three measures in float32 PyTorch."""
    base, tuned, untuned = base.float(), tuned.float(), untuned.float()
    z = (base + weight * (tuned - untuned)) / temperature
    at = tokens[:, None]
    reward = tuned.log_softmax(1).gather(1, at) - untuned.log_softmax(1).gather(1, at)
    return [
        each.squeeze(1)
        for each in (z.log_softmax(1).gather(1, at), base.log_softmax(1).gather(1, at), reward)
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_measures_are_as_good_as_plain_pytorch(dtype, scale):
    torch.manual_seed(6)
    base, tuned, untuned = (torch.randn(96, 8000).mul(scale).to(dtype) for _ in range(3))
    got = guided_sample(base, tuned, untuned, weight=0.7, temperature=0.8, **index(96))
    as_float64 = (base.double(), tuned.double(), untuned.double())
    at = got.token_ids[:, None]
    z = (as_float64[0] + np.float32(0.7) * (as_float64[1] - as_float64[2])) / np.float32(0.8)
    exact = [
        z.log_softmax(1).gather(1, at),
        as_float64[0].log_softmax(1).gather(1, at),
        as_float64[1].log_softmax(1).gather(1, at) - as_float64[2].log_softmax(1).gather(1, at),
    ]
    plain = plain_measures(base, tuned, untuned, 0.7, 0.8, got.token_ids)
    for ours, theirs, true in zip(got[1:4], plain, exact, strict=True):
        error = float((ours - true.squeeze(1)).abs().max())
        assert error <= 2 * float((theirs - true.squeeze(1)).abs().max())
    value = (as_float64[1] - as_float64[2]).gather(1, at).squeeze(1)
    torch.testing.assert_close(got.value, value.float(), rtol=0, atol=0)


def test_measures_agree_with_the_reference_under_filters():
    torch.manual_seed(7)
    base, tuned, untuned = (torch.randn(64, 3000) * 2 for _ in range(3))
    arguments = {"weight": 0.5, "temperature": 0.9, "top_k": 40, "top_p": 0.8, "min_p": 0.01}
    got = guided_sample(base, tuned, untuned, **arguments, **index(64), backend="cpu")
    reference = guided_sample_ref(base, tuned, untuned, **arguments, **index(64))
    same = got.token_ids == reference.token_ids
    assert int(same.sum()) >= 63
    for ours, theirs in zip(got[1:5], reference[1:5], strict=True):
        torch.testing.assert_close(ours[same], theirs[same], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_greedy_takes_the_lowest_of_equals(backend):
    base = torch.zeros(3, 2500)
    base[0, [7, 1030, 2400]] = 2.0
    base[1, [2499, 1024]] = 1.0
    got = guided_sample(base, temperature=0, top_k=1, **index(3), backend=backend)
    assert got.token_ids.tolist() == [7, 1024, 0]
    torch.testing.assert_close(
        got.logprob, base.log_softmax(1).gather(1, got.token_ids[:, None])[:, 0]
    )


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_masked_guides_exclude_unless_their_weight_is_zero(backend):
    base = torch.zeros(1, 6)
    base[0, 5] = -torch.inf
    tuned, untuned = torch.zeros(1, 6), torch.zeros(1, 6)
    tuned[0, [0, 1]] = -torch.inf
    untuned[0, [1, 2]] = -torch.inf
    arguments = {"seeds": 1, "candidate_ids": np.arange(400), "positions": 0, "backend": backend}
    rows = np.zeros(400, dtype=np.int64)
    drawn = guided_sample(base, tuned, untuned, logit_rows=rows, **arguments).token_ids
    assert set(drawn.tolist()) == {3, 4}
    drawn = guided_sample(base, tuned, untuned, weight=0, logit_rows=rows, **arguments).token_ids
    assert set(drawn.tolist()) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_tuned_alone_adds_its_values(backend):
    torch.manual_seed(8)
    base, tuned = torch.randn(20, 300), torch.randn(20, 300)
    got = guided_sample(base, tuned, weight=-2.0, **index(20), backend=backend)
    same = guided_sample(base - 2 * tuned, **index(20), backend=backend)
    assert torch.equal(got.token_ids, same.token_ids)
    assert torch.equal(got.implicit_reward, torch.zeros(20))
    assert torch.equal(got.value, tuned.gather(1, got.token_ids[:, None])[:, 0])


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_bans_hold_until_their_position(backend):
    base = torch.full((1, 50), -20.0)
    base[0, 11] = 20.0
    arguments = {
        "seeds": 3,
        "candidate_ids": torch.arange(6),
        "positions": torch.arange(6),
        "logit_rows": torch.zeros(6, dtype=torch.int32),
        "banned_ids": torch.tensor([[11, -1]] * 6),
        "backend": backend,
    }
    drawn = guided_sample(base, banned_until=4, **arguments).token_ids
    assert (drawn == 11).tolist() == [False] * 4 + [True] * 2
    drawn = guided_sample(base, **arguments)
    assert not (drawn.token_ids == 11).any()
    rest = torch.cat([base[0, :11], base[0, 12:]])
    expected = (base[0, drawn.token_ids] - rest.logsumexp(0)).expand(6)
    torch.testing.assert_close(drawn.logprob, expected)


def test_offsets_beyond_two_to_the_31():
    torch.manual_seed(9)
    vocab_size, far = 3000, 2**31 + 5
    # Only the touched pages of this become memory.
    storage = torch.empty(far + vocab_size, dtype=torch.bfloat16)
    logits = storage.as_strided((2, vocab_size), (far, 1))
    logits.copy_(torch.randn(2, vocab_size))
    for backend in ("cpu", "torch"):
        far_rows = guided_sample(logits, logits, logits, **index(2), backend=backend)
        near_rows = guided_sample(*(logits.clone(),) * 3, **index(2), backend=backend)
        for far_field, near_field in zip(far_rows, near_rows, strict=True):
            assert torch.equal(far_field, near_field)


def test_empty_batch():
    got = guided_sample(torch.empty(0, 10), **index(0))
    assert isinstance(got, GuidedSample)
    assert [tuple(field.shape) for field in got] == [(0,)] * 6
    assert got.token_ids.dtype == torch.int64
    assert got.valid.dtype == torch.bool


def test_numpy_and_narrow_integers_are_the_same_addresses():
    torch.manual_seed(10)
    base = torch.randn(4, 500)
    seeds = np.array([1, 2**63, 2**64 - 1, 17], dtype=np.uint64)
    expected = guided_sample(
        base,
        seeds=torch.from_numpy(seeds.view(np.int64)),
        candidate_ids=torch.arange(4),
        positions=torch.full((4,), 2),
    )
    for backend in ("cpu", "torch"):
        got = guided_sample(
            base,
            seeds=seeds,
            candidate_ids=np.arange(4, dtype=np.int32)[::1],
            positions=2,
            logit_rows=torch.arange(4, dtype=torch.int16),
            temperature=np.ones(8, dtype=np.float64)[::2],
            backend=backend,
        )
        assert torch.equal(got.token_ids, expected.token_ids)


BAD = {
    "base": [
        torch.zeros(4),
        torch.zeros(4, 1),
        torch.zeros(4, 8, dtype=torch.float64),
        torch.zeros(8, 4).T,
        "logits",
    ],
    "tuned": [torch.zeros(4, 9), torch.zeros(3, 8)],
    "untuned": [torch.zeros(4, 8)],
    "weight": [torch.nan, torch.tensor([1.0, torch.inf, 1.0, 1.0]), torch.zeros(3), "x"],
    "temperature": [-0.1, 1e-30, torch.inf, torch.tensor([1.0, -1.0, 0.0, 1.0])],
    "top_k": [-2, 1.5, torch.tensor([1, 2, 3, -7])],
    "top_p": [0.0, 1.1, np.array([0.5, 1.0, 0.0, 1.0])],
    "min_p": [-0.1, 1.5],
    "seeds": [1.5, [1, 2], torch.zeros(4)],
    "candidate_ids": [-1, torch.tensor([0, 1, 2, -3]), 2**32],
    "positions": [-1, np.array([0, 1, -2, 3])],
    "logit_rows": [[0, 1, 2, 4], 3, [-1, 0, 0, 0]],
    "banned_ids": [torch.zeros(4), torch.zeros(3, 1, dtype=torch.int64), torch.full((4, 1), 8)],
    "banned_until": [5],
    "backend": ["cuda", "fast"],
}


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize(("name", "value"), [(n, v) for n, vs in BAD.items() for v in vs])
def test_errors_name_the_parameter(name, value, backend):
    good = {"base": torch.zeros(4, 8), "seeds": 1, "candidate_ids": 0, "positions": 0}
    with pytest.raises(InvalidParameterError) as caught:
        guided_sample(**{**good, "backend": backend, name: value})
    assert caught.value.parameter == name
    assert str(caught.value).startswith(name)
