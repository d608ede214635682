# SPDX-License-Identifier: Apache-2.0
"""Attention of packed queries over the paged KV cache.

Row i of a batch has P_i prompt keys in the slots [0, P_i) of its first blocks, and R_i response
keys from the start of its block number `response_block_start[i]` on (the slots between are never
read). Its q_i queries are the last q_i of its P_i + R_i positions, so decoding (q = 1), extension
by a chunk and a whole prompt (R = 0) are the same operation::

    for head, query at position p:
        s[k] = scale * query . key[k]               for keys k <= p and k > p - sliding_window
        s = soft_cap * tanh(s / soft_cap)           (with a soft cap)
        out = sum_k exp(s[k]) value[k] / (sum_k exp(s[k]) + exp(sink[head]))     (no sinks: + 0)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ivg_fast.errors import InvalidParameterError
from ivg_fast.ops._backend import Backend, choose_backend
from ivg_fast.ops._triton import check_device
from ivg_fast.ops.attention_metadata import (
    DTYPE_CODES,
    AttentionMetadata,
    check_layer,
    output_for,
)
from ivg_fast.ops.kv_cache import BLOCK_SIZE, thread_count
from ivg_fast.ops.paged_plan import PagedPlan, WorkListOptions

__all__ = [
    "AttentionMetadata",
    "PagedPlan",
    "WorkListOptions",
    "paged_attention",
    "paged_attention_prepared",
    "paged_attention_ref",
]


def paged_attention(
    query: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    *,
    block_table: Tensor,
    query_start_loc: Tensor,
    prompt_lens: Tensor,
    response_lens: Tensor,
    response_block_start: Tensor,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
    num_threads: int | None = None,
    backend: Backend = "auto",
    work_list: WorkListOptions | None = None,
) -> Tensor:
    """Attend through block tables; the module's docstring has the formula.

    A forward of many layers builds `AttentionMetadata` once and calls `paged_attention_prepared`.

    Args:
        query: [T, Hq, D] float32, bfloat16 or float16; any strides with the last dimension
            contiguous.
        key_pool: [num_blocks, Hkv, 16, D], contiguous, dtype of `query`; Hkv divides Hq, D <= 512.
        value_pool: [num_blocks, Hkv, 16, Dv], likewise, Dv <= 512.
        block_table: int32 [B, width] block ids; entries that no key lives in are not looked at.
        query_start_loc: int32 [B + 1] from 0 to T; the queries of row i are [qsl[i], qsl[i + 1]),
            possibly none.
        prompt_lens: int32 [B].
        response_lens: int32 [B], this call's keys included.
        response_block_start: int32 [B], at least ceil(prompt_len / 16) where there is a response.
        scale: factor of the scores.
        sliding_window: a query sees this many positions, itself included; None: all.
        soft_cap: None: no cap.
        sinks: float32 [Hq], one more logit a head in the denominator.
        out: [T, Hq, Dv], contiguous, dtype of `query`; allocated where None.
        num_threads: default `torch.get_num_threads()`; does not change the result.
        backend: "cpu" (C++), "triton", "torch" (`paged_attention_ref`), "auto" picks by the device
            of `query`. The arrays of the rows are on the CPU for all of them.
        work_list: how the Triton kernels share the work; None: WorkListOptions().

    Returns:
        [T, Hq, Dv], contiguous, dtype of `query`.

    Raises:
        InvalidParameterError: a shape, dtype, block id or option that cannot be.
    """
    rows: dict[str, Any] = {
        "block_table": block_table,
        "query_start_loc": query_start_loc,
        "prompt_lens": prompt_lens,
        "response_lens": response_lens,
        "response_block_start": response_block_start,
    }
    options: dict[str, Any] = {
        "scale": scale,
        "sliding_window": sliding_window,
        "soft_cap": soft_cap,
        "sinks": sinks,
        "out": out,
        "num_threads": num_threads,
    }
    chosen = choose_backend(backend, query)
    if chosen == "torch":
        return paged_attention_ref(query, key_pool, value_pool, **rows, **options)
    metadata = AttentionMetadata.build(**rows)
    return paged_attention_prepared(
        query, key_pool, value_pool, metadata, **options, backend=chosen, work_list=work_list
    )


def paged_attention_prepared(
    query: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    rows: AttentionMetadata | PagedPlan,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
    num_threads: int | None = None,
    backend: str = "auto",
    work_list: WorkListOptions | None = None,
) -> Tensor:
    """`paged_attention` with its rows checked beforehand: the call a layer makes.

    Args:
        rows: AttentionMetadata, or for Triton alone a PagedPlan, whose call never waits for the
            device and may be captured in a graph.
        backend: as in `paged_attention`, but for "torch".
    """
    check_layer(query, key_pool, value_pool, rows, sliding_window, soft_cap, sinks)
    out = output_for(query, value_pool, out)
    if choose_backend(backend, query) == "triton":
        check_device("query", query)
        from ivg_fast.triton_kernels import paged_attention as kernels

        if isinstance(rows, AttentionMetadata):
            tiles = kernels.Tiles.of_layer(query, key_pool, value_pool)
            rows = rows.plan(query.device, tiles.tile_tokens, work_list)
        kernels.paged_attention(
            *(query, key_pool, value_pool, rows, out),
            scale=scale,
            sliding_window=sliding_window,
            soft_cap=soft_cap,
            sinks=sinks,
        )
        return out
    if not query.is_cpu or not isinstance(rows, AttentionMetadata):
        requirement = "must be on the CPU, with AttentionMetadata, for backend 'cpu'"
        raise InvalidParameterError("query", str(query.device), requirement)
    rows._batch.run(
        query.data_ptr(),
        query.stride(0),
        query.stride(1),
        key_pool.data_ptr(),
        value_pool.data_ptr(),
        out.data_ptr(),
        query.shape[1],
        key_pool.shape[1],
        query.shape[2],
        value_pool.shape[3],
        DTYPE_CODES[query.dtype],
        scale,
        sliding_window or 0,
        soft_cap or 0.0,
        0 if sinks is None else sinks.data_ptr(),
        thread_count(num_threads),
    )
    return out


def paged_attention_ref(
    query: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    *,
    block_table: Tensor,
    query_start_loc: Tensor,
    prompt_lens: Tensor,
    response_lens: Tensor,
    response_block_start: Tensor,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
    num_threads: int | None = None,
    compute_dtype: torch.dtype = torch.float64,
) -> Tensor:
    """`paged_attention` in plain PyTorch, on any device, row by row and in `compute_dtype`."""
    metadata = AttentionMetadata.build(
        block_table=block_table,
        query_start_loc=query_start_loc,
        prompt_lens=prompt_lens,
        response_lens=response_lens,
        response_block_start=response_block_start,
    )
    check_layer(query, key_pool, value_pool, metadata, sliding_window, soft_cap, sinks)
    out = output_for(query, value_pool, out)
    group = query.shape[1] // key_pool.shape[1]
    starts = query_start_loc.tolist()
    for i, (prompt, response) in enumerate(
        zip(prompt_lens.tolist(), response_lens.tolist(), strict=True)
    ):
        begin, end = starts[i], starts[i + 1]
        if begin == end:
            continue
        first = int(response_block_start[i]) * BLOCK_SIZE
        slots = torch.cat([torch.arange(prompt), first + torch.arange(response)])
        blocks = block_table[i].long()[slots // BLOCK_SIZE].to(query.device)
        offsets = (slots % BLOCK_SIZE).to(query.device)
        keys = key_pool[blocks, :, offsets].to(compute_dtype).repeat_interleave(group, dim=1)
        values = value_pool[blocks, :, offsets].to(compute_dtype).repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", query[begin:end].to(compute_dtype), keys) * scale
        if soft_cap is not None:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        total = prompt + response
        key_positions = torch.arange(total, device=query.device)
        distance = key_positions[total - (end - begin) :, None] - key_positions
        hidden = distance < 0
        if sliding_window is not None:
            hidden |= distance >= sliding_window
        scores = scores.masked_fill(hidden, float("-inf"))
        if sinks is not None:
            column = sinks.to(compute_dtype)[:, None, None].expand(-1, end - begin, 1)
            scores = torch.cat([scores, column], dim=-1)
        weights = torch.softmax(scores, dim=-1)[..., :total]
        out[begin:end] = torch.einsum("hqk,khd->qhd", weights, values).to(query.dtype)
    return out
