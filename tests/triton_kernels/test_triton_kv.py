# SPDX-License-Identifier: Apache-2.0
"""Writing and copying in the pools by the Triton kernels, and by CUDA where there is a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ivg_fast import _C
from ivg_fast.errors import InvalidParameterError
from ivg_fast.ops.block_copy import BlockCopier, copy_blocks_ref, gpu_backend
from ivg_fast.ops.kv_cache import write_key_value, write_kv, write_kv_ref

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GPU_BACKENDS = ["triton", "cuda"]


def slots_of(num_tokens: int, num_blocks: int, seed: int) -> torch.Tensor:
    """Distinct slots in any order, about a third of them pads."""
    g = torch.Generator().manual_seed(seed)
    slots = torch.randperm(num_blocks * 16, generator=g)[:num_tokens].int()
    slots[torch.rand(num_tokens, generator=g) < 0.3] = -1
    return slots


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "sizes"), [(2, (16, 16)), (3, (7, 40)), (9, (192, 128))])
def test_keys_and_values_are_written_to_these_slots_and_no_other(heads, sizes, dtype, device):
    num_tokens, num_blocks = 12, 5
    slots = slots_of(num_tokens, num_blocks, heads)
    pools = [torch.randn(num_blocks, heads, 16, size).to(dtype) for size in sizes]
    # As transformers has them: by head, or a slice of a fused projection.
    key = torch.randn(heads, num_tokens, sizes[0]).to(dtype).transpose(0, 1)
    value = torch.randn(num_tokens, 2 * heads, sizes[1] + 3).to(dtype)[:, heads:, 1:-2]
    expected = [pool.clone() for pool in pools]
    for src, pool in zip((key, value), expected, strict=True):
        write_kv_ref(src, pool, slots)
    got = [pool.to(device) for pool in pools]
    on_device = slots.to(device)
    write_key_value(key.to(device), value.to(device), *got, on_device, backend="triton")
    for pool, wanted in zip(got, expected, strict=True):
        assert torch.equal(pool.cpu(), wanted)
    alone = pools[0].to(device)
    write_kv(key.to(device), alone, on_device, backend="triton")
    assert torch.equal(alone.cpu(), expected[0])


def test_slots_beyond_two_to_the_31_elements(device):
    num_blocks = 2**20 + 8
    pool = torch.empty(num_blocks, 1, 16, 128, dtype=torch.bfloat16, device=device)
    src = torch.randn(1, 1, 128).bfloat16().to(device)
    slot = torch.tensor([num_blocks * 16 - 3], dtype=torch.int32, device=device)
    write_kv(src, pool, slot, backend="triton")
    assert torch.equal(pool[num_blocks - 1, 0, 13], src[0, 0])
    pairs = np.array([[num_blocks - 1, num_blocks - 3]], dtype=np.int32)
    BlockCopier([pool], backend="triton").copy(pairs)
    assert torch.equal(pool[num_blocks - 3, 0, 13], src[0, 0])


def test_write_refuses(monkeypatch, device):
    pool = torch.zeros(2, 2, 16, 8, device=device)
    src = torch.zeros(3, 2, 8, device=device)
    slots = torch.zeros(3, dtype=torch.int32, device=device)
    with pytest.raises(InvalidParameterError, match="value must have 2 heads"):
        write_key_value(src, src[:, :1], pool, pool[:, :1].contiguous(), slots, backend="triton")
    with pytest.raises(InvalidParameterError, match="backend"):
        write_kv(src, pool, slots, backend="cuda")  # type: ignore[arg-type]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(InvalidParameterError, match="src must be on a GPU"):
        write_kv(src.cpu(), pool.cpu(), slots.cpu(), backend="triton")


def skip_without(backend: str, device: str) -> None:
    if backend == "cuda" and device == "cpu":
        pytest.skip("the CUDA kernel needs a GPU")
    if backend == "cuda" and not _C.cuda_built:
        pytest.skip("this build has no CUDA kernels")


@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("num_pairs", [1, 5, 700])
def test_blocks_are_copied_in_every_pool(backend, num_pairs, device):
    skip_without(backend, device)
    if num_pairs > 5 and device == "cpu":
        num_pairs = 7  # more than a launch takes: a matter of CUDA alone
    rng = np.random.default_rng(num_pairs)
    num_blocks = 2 * num_pairs + 3
    ids = rng.permutation(num_blocks)
    sources = rng.choice(ids[num_pairs:], num_pairs)  # one block may be copied to several
    pairs = np.stack([sources, ids[:num_pairs]], axis=1).astype(np.int32)
    shapes = [(1, 1, torch.bfloat16), (3, 40, torch.float32), (2, 9, torch.float16)]
    shapes.append((8, 128, torch.bfloat16))  # more than one program's stretch
    pools = [torch.randn(num_blocks, h, 16, d).to(dtype).to(device) for h, d, dtype in shapes]
    expected = [pool.clone() for pool in pools]
    copy_blocks_ref(expected, pairs)
    copier = BlockCopier(pools, backend=backend)
    assert copier.backend == backend
    assert copier.bytes_per_block == sum(pool[0].nbytes for pool in pools)
    copier.copy(pairs)
    for pool, wanted in zip(pools, expected, strict=True):
        assert torch.equal(pool, wanted)


@pytest.mark.parametrize("backend", [*GPU_BACKENDS, "torch"])
def test_copy_refuses_bad_pairs(backend, device):
    skip_without(backend, device)
    pool = torch.randn(4, 2, 16, 8, device=device)
    before = pool.clone()
    copier = BlockCopier([pool], backend=backend)
    for bad in ([[0, 4]], [[-1, 2]], [[0, 1], [2, 1]], [[0, 1], [1, 2]]):
        with pytest.raises(InvalidParameterError, match="pairs"):
            copier.copy(np.array(bad, dtype=np.int32))
    assert torch.equal(pool, before)
    copier.copy(np.empty((0, 2), dtype=np.int32))
    BlockCopier([], backend=backend if backend != "cuda" else "auto").copy(
        np.array([[0, 1]], dtype=np.int32)
    )


def test_copy_refuses_what_it_cannot_reach(monkeypatch, device):
    pool = torch.zeros(4 * 2 * 16 * 8 + 4, device=device)
    with pytest.raises(InvalidParameterError, match="multiple of 16 bytes"):
        BlockCopier([pool[1:-3].view(4, 2, 16, 8)], backend="triton")
    on_cpu = torch.zeros(4, 2, 16, 8)
    with pytest.raises(InvalidParameterError, match="of type 'cuda' for that backend"):
        BlockCopier([on_cpu], backend="cuda")
    with pytest.raises(InvalidParameterError, match="backend"):
        BlockCopier([on_cpu], backend="gpu")  # type: ignore[arg-type]
    assert BlockCopier([on_cpu]).backend == "cpu"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(InvalidParameterError, match="pools must be on a GPU"):
        BlockCopier([on_cpu], backend="triton")


def test_a_gpu_uses_the_cuda_kernel_where_the_build_has_it(device):
    assert gpu_backend() == ("cuda" if _C.cuda_built else "triton")
    if device == "cuda":
        pool = torch.zeros(4, 2, 16, 8, device=device)
        assert BlockCopier([pool]).backend == gpu_backend()
