# SPDX-License-Identifier: Apache-2.0
"""Writing and copying in the paged KV cache.

A pool is one layer's keys (or values): [num_blocks, num_kv_heads, 16, head_size]. Slot s of it is
block s // 16, offset s % 16.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ivg_fast import _C
from ivg_fast.errors import InvalidParameterError

BLOCK_SIZE = 16

Pairs = Tensor | np.ndarray


def thread_count(num_threads: int | None) -> int:
    """The threads that a CPU kernel may use: what was asked for, else torch's own number."""
    if num_threads is None:
        return torch.get_num_threads()
    if num_threads < 1:
        raise InvalidParameterError("num_threads", num_threads, "must be None or positive")
    return num_threads


def _check_pool(name: str, pool: Tensor) -> None:
    if pool.dim() != 4 or pool.shape[2] != BLOCK_SIZE or not pool.is_contiguous():
        raise InvalidParameterError(
            name,
            (tuple(pool.shape), pool.stride()),
            f"must be contiguous [num_blocks, num_kv_heads, {BLOCK_SIZE}, head_size]",
        )
    if not pool.is_cpu:
        raise InvalidParameterError(name, str(pool.device), "must be on the CPU")


def _check_write(src: Tensor, pool: Tensor, slot_mapping: Tensor) -> None:
    _check_pool("pool", pool)
    if src.shape != (src.shape[0], pool.shape[1], pool.shape[3]) or src.stride(2) != 1:
        raise InvalidParameterError(
            "src",
            (tuple(src.shape), src.stride()),
            f"must be [num_tokens, {pool.shape[1]}, {pool.shape[3]}], the last one contiguous",
        )
    if src.dtype != pool.dtype or not src.is_cpu:
        raise InvalidParameterError(
            "src", (src.dtype, str(src.device)), f"must be {pool.dtype} on the CPU, as the pool is"
        )
    if (
        slot_mapping.dtype != torch.int32
        or slot_mapping.shape != (src.shape[0],)
        or not slot_mapping.is_contiguous()
    ):
        raise InvalidParameterError(
            "slot_mapping",
            (tuple(slot_mapping.shape), slot_mapping.dtype),
            f"must be a contiguous int32 [{src.shape[0]}]",
        )


def write_kv(
    src: Tensor, pool: Tensor, slot_mapping: Tensor, *, num_threads: int | None = None
) -> None:
    """Store new tokens' keys (or values): ``pool[slot // 16, :, slot % 16] = src[t]``.

    Args:
        src: [num_tokens, num_kv_heads, head_size], any strides with the last dimension contiguous.
        pool: [num_blocks, num_kv_heads, 16, head_size], contiguous, dtype of `src`; changed.
        slot_mapping: int32 [num_tokens], block * 16 + offset; -1 marks a pad token, not stored. No
            slot may occur twice.
        num_threads: default `torch.get_num_threads()`.

    Raises:
        InvalidParameterError: a shape, dtype or slot that does not fit; nothing is written then.
    """
    _check_write(src, pool, slot_mapping)
    num_tokens, num_heads, head_size = src.shape
    item = src.element_size()
    failure = _C.write_kv(
        src.data_ptr(),
        src.stride(0) * item,
        src.stride(1) * item,
        pool.data_ptr(),
        pool.shape[0],
        slot_mapping.data_ptr(),
        num_tokens,
        num_heads,
        head_size * item,
        thread_count(num_threads),
    )
    if failure is not None:
        raise InvalidParameterError(*failure)


def write_kv_ref(
    src: Tensor, pool: Tensor, slot_mapping: Tensor, *, num_threads: int | None = None
) -> None:
    """`write_kv` in plain PyTorch."""
    _check_write(src, pool, slot_mapping)
    slots = slot_mapping.long()
    outside = slots[(slots < -1) | (slots >= pool.shape[0] * BLOCK_SIZE)]
    if outside.numel():
        raise InvalidParameterError(
            "slot_mapping",
            int(outside[0]),
            f"must hold slots in [-1, {pool.shape[0] * BLOCK_SIZE})",
        )
    kept = slots >= 0
    slots = slots[kept]
    pool[slots // BLOCK_SIZE, :, slots % BLOCK_SIZE] = src[kept]


class BlockCopier:
    """Copies blocks inside a fixed set of pools, all of them in one call.

    Args:
        pools: the pools of all layers and roles, each contiguous [num_blocks, ...] with the same
            num_blocks; kept alive. Head counts, sizes and dtypes may differ.
    """

    __slots__ = ("_addresses", "_block_bytes", "_num_blocks", "_pools")

    def __init__(self, pools: Sequence[Tensor]) -> None:
        for i, pool in enumerate(pools):
            _check_pool(f"pools[{i}]", pool)
            if pool.shape[0] != pools[0].shape[0]:
                raise InvalidParameterError(
                    f"pools[{i}]",
                    tuple(pool.shape),
                    f"must have as many blocks as pools[0], {pools[0].shape[0]}",
                )
        self._pools = tuple(pools)
        self._num_blocks = pools[0].shape[0] if pools else 0
        self._addresses = np.array([pool.data_ptr() for pool in pools], dtype=np.uint64)
        self._block_bytes = np.array([pool[0].nbytes for pool in pools], dtype=np.int64)

    @property
    def bytes_per_block(self) -> int:
        """Bytes that one block takes in all pools together."""
        return int(self._block_bytes.sum())

    def copy(self, pairs: Pairs, *, num_threads: int | None = None) -> None:
        """``pool[dst] = pool[src]`` for each (src, dst) of `pairs` and each pool.

        Args:
            pairs: int32 [num_pairs, 2]; no dst occurs twice, or as a src.
            num_threads: default `torch.get_num_threads()`.

        Raises:
            InvalidParameterError: pairs that break these rules; nothing is copied then.
        """
        array = _pairs_array(pairs)
        if not len(array):
            return
        failure = _C.copy_blocks(
            self._addresses.ctypes.data,
            self._block_bytes.ctypes.data,
            len(self._pools),
            array.ctypes.data,
            len(array),
            self._num_blocks,
            thread_count(num_threads),
        )
        if failure is not None:
            raise InvalidParameterError(*failure)


def _pairs_array(pairs: Pairs) -> np.ndarray:
    array = pairs.numpy() if isinstance(pairs, Tensor) else pairs
    if array.dtype != np.int32 or array.ndim != 2 or array.shape[1] != 2:
        raise InvalidParameterError("pairs", (array.shape, array.dtype), "must be int32 [n, 2]")
    return np.ascontiguousarray(array)


def copy_blocks(pools: Sequence[Tensor], pairs: Pairs, *, num_threads: int | None = None) -> None:
    """Copy whole blocks inside every pool; `BlockCopier` does the same without the set-up."""
    BlockCopier(pools).copy(pairs, num_threads=num_threads)


def copy_blocks_ref(
    pools: Sequence[Tensor], pairs: Pairs, *, num_threads: int | None = None
) -> None:
    """`copy_blocks` in plain PyTorch."""
    index = torch.from_numpy(_pairs_array(pairs).astype(np.int64))
    for pool in pools:
        pool[index[:, 1]] = pool[index[:, 0]]
