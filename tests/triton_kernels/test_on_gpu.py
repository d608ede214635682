# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can tell: graphs, streams, tensor cores, launches that do not wait."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ops.paged_batches import make_batch, plain_batch

from ivg_fast.ops.block_copy import BlockCopier
from ivg_fast.ops.kv_cache import write_key_value
from ivg_fast.ops.paged_attention import (
    PagedPlan,
    WorkListOptions,
    paged_attention,
    paged_attention_prepared,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("heads", [(32, 8), (32, 32), (8, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tensor_cores_and_sharing(heads, dtype):
    lens = [(1030, 5 + 7 * i, 1) for i in range(12)]
    batch = make_batch(lens, heads=heads, sizes=(128, 128), dtype=dtype, share_prompt=True)
    exact = plain_batch(batch, torch.float64, scale=0.09)
    plain = plain_batch(batch, dtype, scale=0.09)
    tensors = [tensor.cuda() for tensor in batch.args]
    for min_shared_rows in (2, 1000):
        how = WorkListOptions(min_shared_rows=min_shared_rows)
        got = paged_attention(*tensors, **batch.rows, scale=0.09, work_list=how).cpu()
        error, allowed = (
            (result.double() - exact).square().mean().sqrt() for result in (got, plain)
        )
        assert error <= 2 * allowed


def test_a_graph_replays_while_responses_grow():
    steps = 20
    batch = make_batch([(300, 10 + steps, 1)] * 9, heads=(8, 2), share_prompt=True)
    query, key_pool, value_pool = (tensor.cuda() for tensor in batch.args)
    width = batch.rows["block_table"].shape[1]
    plan = PagedPlan("cuda", num_rows=9, num_tokens=9, table_width=width, tile_tokens=4)
    rows = {name: value.numpy() for name, value in batch.rows.items()}
    used = (rows["block_table"] >= 0) & (rows["block_table"] < len(key_pool))
    rows["block_table"] = np.where(used, rows["block_table"], 0)
    longest = rows.pop("response_lens")
    plan.update(**rows, response_lens=longest - steps, longest_response_lens=longest)
    out = torch.empty(9, 8, 16, device="cuda")

    def step() -> None:
        paged_attention_prepared(query, key_pool, value_pool, plan, scale=0.3, out=out)
        plan.response_lens.add_(1)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        paged_attention_prepared(query, key_pool, value_pool, plan, scale=0.3, out=out)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for taken in range(steps + 1):
        graph.replay()
        lens = torch.from_numpy(longest - steps + taken)
        now = {**batch.rows, "response_lens": lens}
        expected = paged_attention(*batch.args, **now, scale=0.3)
        torch.testing.assert_close(out.cpu(), expected, rtol=0, atol=3e-6)


def test_a_fork_and_a_step_wait_for_nothing():
    pools = [torch.randn(64, 2, 16, 64, device="cuda") for _ in range(8)]
    copier = BlockCopier(pools)
    batch = make_batch([(40, 5, 1)] * 4, heads=(4, 2), sizes=(64, 64))
    query = batch.query.cuda()
    new = torch.randn(4, 2, 64, device="cuda")
    slots = torch.tensor([1, 17, -1, 40], dtype=torch.int32, device="cuda")
    plan = PagedPlan("cuda", num_rows=4, num_tokens=4, table_width=9, tile_tokens=4)
    rows = {name: value.numpy() for name, value in batch.rows.items()}
    rows["block_table"] = np.clip(rows["block_table"], 0, 63)

    def work() -> None:
        plan.update(**rows)
        copier.copy(np.array([[1, 2], [3, 4]], dtype=np.int32))
        write_key_value(new, new, pools[0], pools[1], slots)
        paged_attention_prepared(query, pools[0], pools[1], plan, scale=0.1)

    work()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
