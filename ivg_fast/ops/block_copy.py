# SPDX-License-Identifier: Apache-2.0
"""Copying whole blocks in the paged KV cache: what a fork does to all layers of all roles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ivg_fast import _C
from ivg_fast.errors import InvalidParameterError
from ivg_fast.ops._triton import check_device
from ivg_fast.ops.kv_cache import check_pool, thread_count

Pairs = Tensor | np.ndarray
Backend = Literal["auto", "cpu", "cuda", "triton", "torch"]

_BACKENDS = ("cpu", "cuda", "triton", "torch")
# The kernels move vectors of 16 bytes. Blocks of 16 slots are whole vectors; a pool that does not
# begin at one is a view of something else.
_ALIGNMENT = 16


def gpu_backend() -> str:
    """What copies blocks on a GPU: "cuda" where this build has its kernels, else "triton"."""
    return "cuda" if _C.cuda_built else "triton"


def _choose(backend: str, pools: Sequence[Tensor]) -> str:
    device = pools[0].device if pools else torch.device("cpu")
    if backend == "auto":
        choices = {"cpu": "cpu", "cuda": gpu_backend()}
        if device.type not in choices:
            requirement = f"must be 'torch' on a device of type {device.type!r}"
            raise InvalidParameterError("backend", backend, requirement)
        return choices[device.type]
    if backend not in _BACKENDS:
        raise InvalidParameterError("backend", backend, f"must be 'auto' or one of {_BACKENDS}")
    if backend in ("cpu", "cuda") and device.type != backend:
        requirement = f"must be on a device of type {backend!r} for that backend"
        raise InvalidParameterError("pools", str(device), requirement)
    if backend == "cuda" and not _C.cuda_built:
        requirement = "must be another one: this build has no CUDA kernels"
        raise InvalidParameterError("backend", backend, requirement)
    if backend == "triton" and pools:
        check_device("pools", pools[0])
    return backend


class BlockCopier:
    """Copies blocks inside a fixed set of pools, all of them in one call, on a GPU in one launch.

    Args:
        pools: the pools of all layers and roles, each contiguous [num_blocks, ...] with the same
            num_blocks, on one device; kept alive. Head counts, sizes and dtypes may differ.
        backend: "cpu" (C++), "cuda" (where the build has it), "triton", "torch"; "auto" picks by
            the pools' device, on a GPU `gpu_backend()`.

    Attributes:
        backend: the one in use.
        bytes_per_block: bytes that one block takes in all pools together.
    """

    __slots__ = (
        "_addresses",
        "_block_bytes",
        "_largest",
        "_num_blocks",
        "_pools",
        "backend",
        "bytes_per_block",
    )

    def __init__(self, pools: Sequence[Tensor], *, backend: Backend = "auto") -> None:
        for i, pool in enumerate(pools):
            check_pool(f"pools[{i}]", pool)
            for what, value, first in (
                ("blocks", pool.shape[0], pools[0].shape[0]),
                ("device", str(pool.device), str(pools[0].device)),
            ):
                if value != first:
                    requirement = f"must have the {what} of pools[0], {first}"
                    raise InvalidParameterError(f"pools[{i}]", value, requirement)
        self.backend = _choose(backend, pools)
        self._pools = tuple(pools)
        self._num_blocks = pools[0].shape[0] if pools else 0
        sizes = [pool[0].nbytes if pool.shape[0] else 0 for pool in pools]
        self._largest = max(sizes, default=0)
        self.bytes_per_block = sum(sizes)
        addresses = [pool.data_ptr() for pool in pools]
        if self.backend == "cpu":
            self._addresses: Any = np.array(addresses, dtype=np.uint64)
            self._block_bytes: Any = np.array(sizes, dtype=np.int64)
        elif pools:
            for i, address in enumerate(addresses):
                if self.backend != "torch" and address % _ALIGNMENT:
                    requirement = f"must begin at a multiple of {_ALIGNMENT} bytes"
                    raise InvalidParameterError(f"pools[{i}]", hex(address), requirement)
            device = pools[0].device
            self._addresses = torch.tensor(addresses, dtype=torch.int64, device=device)
            self._block_bytes = torch.tensor(sizes, dtype=torch.int64, device=device)

    def copy(self, pairs: Pairs, *, num_threads: int | None = None) -> None:
        """``pool[dst] = pool[src]`` for each (src, dst) of `pairs` and each pool.

        Does not wait for a GPU. The CUDA kernel makes one launch for each 500 pairs.

        Args:
            pairs: int32 [num_pairs, 2] on the CPU; no dst occurs twice, or as a src.
            num_threads: default `torch.get_num_threads()`; for the CPU.

        Raises:
            InvalidParameterError: pairs that break these rules; nothing is copied then.
        """
        array = pairs_array(pairs)
        if not len(array) or not self._pools:
            return
        if self.backend == "cpu":
            failure = _C.copy_blocks(
                *(self._addresses.ctypes.data, self._block_bytes.ctypes.data, len(self._pools)),
                *(array.ctypes.data, len(array), self._num_blocks, thread_count(num_threads)),
            )
        elif self.backend == "cuda":
            device = self._pools[0].device
            failure = _C.cuda_copy_blocks(
                *(self._addresses.data_ptr(), self._block_bytes.data_ptr(), self._largest),
                *(len(self._pools), array.ctypes.data, len(array), self._num_blocks),
                *(device.index, torch.cuda.current_stream(device).cuda_stream),
            )
        else:
            failure = _C.find_bad_pair(array.ctypes.data, len(array), self._num_blocks)
        if failure is not None:
            raise InvalidParameterError(*failure)
        if self.backend == "torch":
            copy_blocks_ref(self._pools, array)
        elif self.backend == "triton":
            from ivg_fast.triton_kernels import copy_blocks as kernels

            on_device = torch.from_numpy(array).to(self._pools[0].device, non_blocking=True)
            kernels.copy_blocks(self._addresses, self._block_bytes, self._largest, on_device)


def pairs_array(pairs: Pairs) -> np.ndarray:
    """Pairs of block ids (source, destination) as contiguous int32 [N, 2]."""
    if isinstance(pairs, Tensor) and not pairs.is_cpu:
        raise InvalidParameterError("pairs", str(pairs.device), "must be on the CPU")
    array = pairs.numpy() if isinstance(pairs, Tensor) else pairs
    if array.dtype != np.int32 or array.ndim != 2 or array.shape[1] != 2:
        raise InvalidParameterError("pairs", (array.shape, array.dtype), "must be int32 [n, 2]")
    return np.ascontiguousarray(array)


def copy_blocks(
    pools: Sequence[Tensor],
    pairs: Pairs,
    *,
    num_threads: int | None = None,
    backend: Backend = "auto",
) -> None:
    """Copy whole blocks inside every pool; `BlockCopier` does the same without the set-up."""
    BlockCopier(pools, backend=backend).copy(pairs, num_threads=num_threads)


def copy_blocks_ref(
    pools: Sequence[Tensor], pairs: Pairs, *, num_threads: int | None = None
) -> None:
    """`copy_blocks` in plain PyTorch."""
    index = torch.from_numpy(pairs_array(pairs).astype(np.int64))
    for pool in pools:
        of_pool = index.to(pool.device)
        pool[of_pool[:, 1]] = pool[of_pool[:, 0]]
