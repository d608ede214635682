# SPDX-License-Identifier: Apache-2.0
"""Writing and copying in the paged KV cache.

A pool is one layer's keys (or values): [num_blocks, num_kv_heads, 16, head_size]. Slot s of it is
block s // 16, offset s % 16. Copying blocks: ops/block_copy.py.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from ivg_fast import _C
from ivg_fast.errors import InvalidParameterError
from ivg_fast.ops._backend import Backend, choose_backend
from ivg_fast.ops._triton import check_device

BLOCK_SIZE = 16


def thread_count(num_threads: int | None) -> int:
    """The threads that a CPU kernel may use: what was asked for, else torch's own number."""
    if num_threads is None:
        return torch.get_num_threads()
    if num_threads < 1:
        raise InvalidParameterError("num_threads", num_threads, "must be None or positive")
    return num_threads


def check_pool(name: str, pool: Tensor) -> None:
    """InvalidParameterError unless it is contiguous [num_blocks, num_kv_heads, 16, head_size]."""
    if pool.dim() != 4 or pool.shape[2] != BLOCK_SIZE or not pool.is_contiguous():
        raise InvalidParameterError(
            name,
            (tuple(pool.shape), pool.stride()),
            f"must be contiguous [num_blocks, num_kv_heads, {BLOCK_SIZE}, head_size]",
        )


def _check_write(name: str, src: Tensor, pool: Tensor, slot_mapping: Tensor) -> None:
    """Refuse what does not fit; one expression, as every layer of every step pays for it."""
    size, width = src.shape, pool.shape
    if not (
        len(size) == 3
        and len(width) == 4
        and size[1] == width[1]
        and width[2] == BLOCK_SIZE
        and size[2] == width[3]
        and src.stride(2) == 1
        and pool.is_contiguous()
        and src.dtype == pool.dtype
        and src.device == pool.device == slot_mapping.device
        and slot_mapping.dtype == torch.int32
        and slot_mapping.shape == size[:1]
        and slot_mapping.is_contiguous()
    ):
        _refuse_write(name, src, pool, slot_mapping)


def _refuse_write(name: str, src: Tensor, pool: Tensor, slot_mapping: Tensor) -> NoReturn:
    check_pool("pool" if name == "src" else f"{name}_pool", pool)
    if src.dim() != 3 or src.shape[1:] != (pool.shape[1], pool.shape[3]) or src.stride(2) != 1:
        raise InvalidParameterError(
            name,
            (tuple(src.shape), src.stride()),
            f"must be [num_tokens, {pool.shape[1]}, {pool.shape[3]}], the last one contiguous",
        )
    if src.dtype != pool.dtype or src.device != pool.device:
        raise InvalidParameterError(
            name,
            (src.dtype, str(src.device)),
            f"must be {pool.dtype} on {pool.device}, as the pool is",
        )
    raise InvalidParameterError(
        "slot_mapping",
        (tuple(slot_mapping.shape), slot_mapping.dtype, str(slot_mapping.device)),
        f"must be a contiguous int32 [{src.shape[0]}] on {src.device}",
    )


def write_kv(
    src: Tensor,
    pool: Tensor,
    slot_mapping: Tensor,
    *,
    num_threads: int | None = None,
    backend: Backend = "auto",
) -> None:
    """Store new tokens' keys (or values): ``pool[slot // 16, :, slot % 16] = src[t]``.

    Args:
        src: [num_tokens, num_kv_heads, head_size], any strides with the last dimension contiguous.
        pool: [num_blocks, num_kv_heads, 16, head_size], contiguous, dtype of `src`; changed.
        slot_mapping: int32 [num_tokens], block * 16 + offset; -1 marks a pad token, not stored. No
            slot may occur twice.
        num_threads: default `torch.get_num_threads()`.
        backend: "cpu" (C++), "triton", "torch" (`write_kv_ref`), "auto" picks by device. Triton
            trusts the slots: a look at them would wait for the GPU.

    Raises:
        InvalidParameterError: a shape, dtype or slot that does not fit; nothing is written then.
    """
    _check_write("src", src, pool, slot_mapping)
    _write(backend, num_threads, slot_mapping, ((src, pool),))


def write_key_value(
    key: Tensor,
    value: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    slot_mapping: Tensor,
    *,
    num_threads: int | None = None,
    backend: Backend = "auto",
) -> None:
    """`write_kv` of keys and values, on a GPU in one launch; head sizes may differ."""
    _check_write("key", key, key_pool, slot_mapping)
    _check_write("value", value, value_pool, slot_mapping)
    if key.shape[1] != value.shape[1]:
        raise InvalidParameterError(
            "value", tuple(value.shape), f"must have {key.shape[1]} heads, as key has"
        )
    _write(backend, num_threads, slot_mapping, ((key, key_pool), (value, value_pool)))


def _write(
    backend: str,
    num_threads: int | None,
    slots: Tensor,
    writes: tuple[tuple[Tensor, Tensor], ...],
) -> None:
    """Write what was checked but for the slots."""
    src, pool = writes[0]
    chosen = choose_backend(backend, src)
    if chosen == "triton":
        check_device("src", src)
        from ivg_fast.triton_kernels import kv_write

        kv_write.write_kv(src, pool, slots, *(writes[1] if len(writes) > 1 else ()))
        return
    for src, pool in writes:
        if chosen == "torch":
            write_kv_ref(src, pool, slots)
        else:
            _write_cpu(src, pool, slots, num_threads)


def _write_cpu(src: Tensor, pool: Tensor, slots: Tensor, num_threads: int | None) -> None:
    if not src.is_cpu:
        raise InvalidParameterError("src", str(src.device), "must be on the CPU for backend 'cpu'")
    num_tokens, num_heads, head_size = src.shape
    item = src.element_size()
    failure = _C.write_kv(
        src.data_ptr(),
        src.stride(0) * item,
        src.stride(1) * item,
        pool.data_ptr(),
        pool.shape[0],
        slots.data_ptr(),
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
    _check_write("src", src, pool, slot_mapping)
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
