# SPDX-License-Identifier: Apache-2.0
"""Writing and copying in the pools against the same in plain PyTorch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ivg_fast.errors import InvalidParameterError
from ivg_fast.ops.block_copy import BlockCopier, copy_blocks, copy_blocks_ref
from ivg_fast.ops.kv_cache import write_kv, write_kv_ref

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_pool(num_blocks: int, heads: int, size: int, dtype: torch.dtype, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(num_blocks, heads, 16, size, generator=g).to(dtype)


def make_slots(num_tokens: int, num_blocks: int, seed: int) -> Tensor:
    """Distinct slots in any order, about a third of them pads."""
    g = torch.Generator().manual_seed(seed)
    slots = torch.randperm(num_blocks * 16, generator=g)[:num_tokens].int()
    slots[torch.rand(num_tokens, generator=g) < 0.3] = -1
    return slots


@given(
    num_tokens=st.integers(0, 40),
    heads=st.integers(1, 4),
    size=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    by_head=st.booleans(),
    num_threads=st.integers(1, 3),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=60, deadline=None)
def test_write_kv_writes_these_slots_and_no_other(
    num_tokens: int,
    heads: int,
    size: int,
    dtype: torch.dtype,
    by_head: bool,
    num_threads: int,
    seed: int,
) -> None:
    num_blocks = 5
    pool = make_pool(num_blocks, heads, size, dtype, seed)
    before = pool.clone()
    slots = make_slots(num_tokens, num_blocks, seed)
    src = torch.randn(heads, num_tokens, size).to(dtype).transpose(0, 1)
    if not by_head:
        src = torch.randn(num_tokens, 2 * heads, size + 3).to(dtype)[:, heads:, 1 : size + 1]
    write_kv(src, pool, slots, num_threads=num_threads)
    expected = before.clone()
    for t, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected[slot // 16, :, slot % 16] = src[t]
    assert torch.equal(pool, expected)
    write_kv_ref(src, before, slots)
    assert torch.equal(before, expected)


def test_write_kv_by_many_threads() -> None:
    src = torch.randn(3000, 4, 64)
    one, two = (torch.zeros(200, 4, 16, 64) for _ in range(2))
    slots = make_slots(3000, 200, 0)
    write_kv(src, one, slots, num_threads=1)
    write_kv(src, two, slots, num_threads=2)
    assert torch.equal(one, two)


@given(
    num_pairs=st.integers(0, 6),
    shapes=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 40)), min_size=1, max_size=5),
    dtype=st.sampled_from(DTYPES),
    as_tensor=st.booleans(),
    num_threads=st.integers(1, 3),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=60, deadline=None)
def test_copy_blocks_copies_in_every_pool(
    num_pairs: int,
    shapes: list[tuple[int, int]],
    dtype: torch.dtype,
    as_tensor: bool,
    num_threads: int,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    num_blocks = 12
    ids = rng.permutation(num_blocks)
    sources = rng.choice(ids[num_pairs:], num_pairs)  # one block may be copied to several
    pairs = np.stack([sources, ids[:num_pairs]], axis=1).astype(np.int32)
    given_pairs: Any = torch.from_numpy(pairs) if as_tensor else pairs
    pools = [make_pool(num_blocks, h, d, dtype, seed + i) for i, (h, d) in enumerate(shapes)]
    pools.append(make_pool(num_blocks, 2, 9, torch.float32, seed))  # a role of another dtype
    by_hand, by_ref = ([pool.clone() for pool in pools] for _ in range(2))
    for pool in by_hand:
        for source, target in pairs.tolist():
            pool[target] = pool[source]
    copy_blocks(pools, given_pairs, num_threads=num_threads)
    copy_blocks_ref(by_ref, given_pairs)
    for pool, expected, reference in zip(pools, by_hand, by_ref, strict=True):
        assert torch.equal(pool, expected)
        assert torch.equal(reference, expected)


def test_a_copier_is_reused() -> None:
    pools = [make_pool(6, 2, 8, torch.float32, i) for i in range(3)]
    copier = BlockCopier(pools)
    assert copier.bytes_per_block == 3 * 2 * 16 * 8 * 4
    for source, target in ((0, 1), (1, 2), (2, 5)):
        copier.copy(np.array([[source, target]], dtype=np.int32))
    assert all(torch.equal(pool[0], pool[5]) for pool in pools)


POOL = torch.zeros(4, 2, 16, 8)
SRC = torch.ones(3, 2, 8)
SLOTS = torch.tensor([5, -1, 63], dtype=torch.int32)


@pytest.mark.parametrize(
    ("parameter", "src", "pool", "slots"),
    [
        ("src", SRC[0], POOL, SLOTS),
        ("src", SRC[:, :1], POOL, SLOTS),
        ("src", SRC[..., :4], POOL, SLOTS),
        ("src", SRC.mT.contiguous().mT, POOL, SLOTS),
        ("src", SRC.bfloat16(), POOL, SLOTS),
        ("pool", SRC, POOL[:, :, :8].contiguous(), SLOTS),
        ("pool", SRC, POOL[:, :, :, ::2], SLOTS),
        ("pool", SRC, POOL[0], SLOTS),
        ("slot_mapping", SRC, POOL, SLOTS.long()),
        ("slot_mapping", SRC, POOL, SLOTS[:2]),
        ("slot_mapping", SRC, POOL, SLOTS.repeat(2)[::2]),
        ("slot_mapping", SRC, POOL, SLOTS + 1),
        ("slot_mapping", SRC, POOL, SLOTS - 1),
    ],
)
def test_write_kv_refuses(parameter: str, src: Tensor, pool: Tensor, slots: Tensor) -> None:
    before = pool.clone()
    for write in (write_kv, write_kv_ref):
        with pytest.raises(InvalidParameterError) as caught:
            write(src, pool, slots)
        assert caught.value.parameter == parameter
    assert torch.equal(pool, before)


@pytest.mark.parametrize(
    "pairs",
    [
        np.zeros((2, 2), dtype=np.int64),
        np.zeros((2, 3), dtype=np.int32),
        np.zeros(2, dtype=np.int32),
        np.array([[0, 4]], dtype=np.int32),
        np.array([[-1, 2]], dtype=np.int32),
        np.array([[0, 1], [2, 1]], dtype=np.int32),
        np.array([[0, 1], [1, 2]], dtype=np.int32),
        np.array([[1, 1]], dtype=np.int32),
    ],
)
def test_copy_blocks_refuses(pairs: np.ndarray) -> None:
    pools = [make_pool(4, 2, 8, torch.float32, 0)]
    before = pools[0].clone()
    with pytest.raises(InvalidParameterError) as caught:
        copy_blocks(pools, pairs)
    assert caught.value.parameter == "pairs"
    assert torch.equal(pools[0], before)


def test_refuses_no_threads_and_unequal_pools() -> None:
    with pytest.raises(InvalidParameterError, match="num_threads"):
        write_kv(SRC, POOL.clone(), SLOTS, num_threads=0)
    with pytest.raises(InvalidParameterError, match=r"pools\[1\]"):
        BlockCopier([POOL, torch.zeros(5, 2, 16, 8)])
