# SPDX-License-Identifier: Apache-2.0
"""The rows of a packed batch, checked once, and the quick check of what each layer adds to them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ivg_fast import _C
from ivg_fast.errors import InvalidParameterError
from ivg_fast.ops.kv_cache import BLOCK_SIZE
from ivg_fast.ops.paged_plan import PagedPlan, WorkListOptions, make_batch

# As csrc/cpu/kernels.h numbers them.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """The rows of one packed batch, checked once and then used by every layer of a forward.

    It holds copies, so the arrays that it was built from may be written again at once.
    Use `AttentionMetadata.build`.

    Attributes:
        num_rows: B.
        num_tokens: T, the queries of all rows.
        max_query_len: the most queries of a row.
        max_seq_len: the most keys of a row.
        max_block_id: the highest block id that is read, -1 without any.
    """

    num_rows: int
    num_tokens: int
    max_query_len: int
    max_seq_len: int
    max_block_id: int
    _batch: Any
    _plans: dict[Any, PagedPlan] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def build(
        cls,
        *,
        block_table: Tensor,
        query_start_loc: Tensor,
        prompt_lens: Tensor,
        response_lens: Tensor,
        response_block_start: Tensor,
    ) -> AttentionMetadata:
        """Check and copy the metadata; arguments as in `paged_attention`.

        Raises:
            InvalidParameterError: a shape or dtype, or an index that points outside the table.
        """
        if block_table.dim() != 2:
            raise InvalidParameterError(
                "block_table", tuple(block_table.shape), "must be [num_rows, width]"
            )
        num_rows, width = block_table.shape
        batch = make_batch(
            _int32("block_table", block_table, (num_rows, width)),
            _int32("query_start_loc", query_start_loc, (num_rows + 1,)),
            _int32("prompt_lens", prompt_lens, (num_rows,)),
            _int32("response_lens", response_lens, (num_rows,)),
            _int32("response_block_start", response_block_start, (num_rows,)),
        )
        return cls(
            batch.num_rows,
            batch.num_tokens,
            batch.max_query_len,
            batch.max_seq_len,
            batch.max_block_id,
            batch,
        )

    def plan(
        self, device: torch.device, tile_tokens: int, options: WorkListOptions | None = None
    ) -> PagedPlan:
        """These rows on a device with their work list, made once for all layers of a kind."""
        key = (device, tile_tokens, options)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = PagedPlan.of_batch(self._batch, device, tile_tokens, options)
        return plan


def _int32(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tensor.dtype != torch.int32 or tensor.shape != shape or not tensor.is_cpu:
        raise InvalidParameterError(
            name,
            (tuple(tensor.shape), tensor.dtype, str(tensor.device)),
            f"must be int32 {list(shape)} on the CPU",
        )
    return tensor.contiguous()


def check_layer(
    query: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    metadata: AttentionMetadata | PagedPlan,
    sliding_window: int | None,
    soft_cap: float | None,
    sinks: Tensor | None,
) -> None:
    """Refuse what does not fit; one expression, as every layer of every step pays for it."""
    num_tokens, num_heads, key_size = query.shape if query.dim() == 3 else (-1, -1, -1)
    key_shape, value_shape, dtype = key_pool.shape, value_pool.shape, query.dtype
    if (
        len(key_shape) == 4
        and len(value_shape) == 4
        and num_tokens == metadata.num_tokens
        and query.stride(2) == 1
        and dtype in DTYPE_CODES
        and key_pool.dtype == dtype
        and value_pool.dtype == dtype
        and query.device == key_pool.device == value_pool.device
        and key_shape[:3] == value_shape[:3]
        and key_shape[2] == BLOCK_SIZE
        and key_shape[3] == key_size
        and 0 < key_size <= _C.max_head_size
        and 0 < value_shape[3] <= _C.max_head_size
        and key_shape[1] > 0
        and num_heads % key_shape[1] == 0
        and metadata.max_block_id < key_shape[0]
        and key_pool.is_contiguous()
        and value_pool.is_contiguous()
        and (sliding_window is None or sliding_window > 0)
        and (soft_cap is None or soft_cap > 0)
        and (sinks is None or _are_sinks(sinks, num_heads))
    ):
        return
    _explain(query, key_pool, value_pool, metadata, sliding_window, soft_cap, sinks)


def _are_sinks(sinks: Tensor, num_heads: int) -> bool:
    return sinks.dtype == torch.float32 and sinks.shape == (num_heads,) and sinks.is_contiguous()


def _explain(
    query: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    metadata: AttentionMetadata | PagedPlan,
    sliding_window: int | None,
    soft_cap: float | None,
    sinks: Tensor | None,
) -> None:
    def describe(t: Tensor) -> tuple[Any, ...]:
        return tuple(t.shape), t.stride(), t.dtype, str(t.device)

    limit = _C.max_head_size
    if (
        query.dim() != 3
        or query.shape[0] != metadata.num_tokens
        or query.dtype not in DTYPE_CODES
        or query.stride(2) != 1
    ):
        raise InvalidParameterError(
            "query",
            describe(query),
            f"must be [{metadata.num_tokens}, num_heads, head_size] of float32, bfloat16 or "
            "float16, the last dimension contiguous",
        )
    for name, pool in (("key_pool", key_pool), ("value_pool", value_pool)):
        if (
            pool.dim() != 4
            or pool.shape[2] != BLOCK_SIZE
            or not 0 < pool.shape[3] <= limit
            or not pool.is_contiguous()
            or pool.dtype != query.dtype
            or pool.device != query.device
        ):
            raise InvalidParameterError(
                name,
                describe(pool),
                f"must be contiguous {query.dtype} [num_blocks, num_kv_heads, {BLOCK_SIZE}, up to "
                f"{limit}] on {query.device}",
            )
        if pool.shape[0] <= metadata.max_block_id:
            raise InvalidParameterError(
                "block_table",
                metadata.max_block_id,
                f"must hold block ids below {pool.shape[0]}, the size of {name}",
            )
    num_heads, num_kv_heads = query.shape[1], key_pool.shape[1]
    if key_pool.shape[3] != query.shape[2]:
        raise InvalidParameterError(
            "key_pool", describe(key_pool), f"must have head_size {query.shape[2]}, as query has"
        )
    if value_pool.shape[:2] != key_pool.shape[:2]:
        raise InvalidParameterError(
            "value_pool",
            describe(value_pool),
            f"must have the blocks and heads of key_pool, {tuple(key_pool.shape[:2])}",
        )
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise InvalidParameterError(
            "query", describe(query), f"must have a multiple of {num_kv_heads} heads"
        )
    if sliding_window is not None and sliding_window <= 0:
        raise InvalidParameterError("sliding_window", sliding_window, "must be None or positive")
    if soft_cap is not None and not soft_cap > 0:
        raise InvalidParameterError("soft_cap", soft_cap, "must be None or positive")
    raise InvalidParameterError(
        "sinks", None if sinks is None else describe(sinks), f"must be float32 [{num_heads}]"
    )


def output_for(query: Tensor, value_pool: Tensor, out: Tensor | None) -> Tensor:
    """`out` after a check of its shape and dtype, or a new tensor [T, Hq, Dv]."""
    shape = (query.shape[0], query.shape[1], value_pool.shape[3])
    if out is None:
        return query.new_empty(shape)
    if (
        out.shape != shape
        or out.dtype != query.dtype
        or out.device != query.device
        or not out.is_contiguous()
    ):
        raise InvalidParameterError(
            "out", (tuple(out.shape), out.dtype), f"must be contiguous {query.dtype} {list(shape)}"
        )
    return out
