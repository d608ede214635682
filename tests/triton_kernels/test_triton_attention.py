# SPDX-License-Identifier: Apache-2.0
"""The Triton attention kernels against plain PyTorch in float64 on each row's keys in order."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from interpreted import needs_loops
from ops.paged_batches import PagedBatch, make_batch, plain_attention, plain_batch
from torch import Tensor

from ivg_fast.errors import InvalidParameterError
from ivg_fast.ops.paged_attention import (
    AttentionMetadata,
    PagedPlan,
    WorkListOptions,
    paged_attention,
    paged_attention_prepared,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
    needs_loops,
]

# Splits of two blocks and sharing from two rows on: what takes long texts otherwise.
SMALL = WorkListOptions(run_blocks=2, min_shared_rows=2, min_shared_tokens=32)
ALONE = WorkListOptions(run_blocks=2, min_shared_rows=1000, min_shared_tokens=32)

# (query heads, KV heads), (key size, value size), dtype: one head, groups of several sizes, one
# larger than a tile, sizes that fill no vector.
SHAPES = [
    ((2, 2), (16, 16), torch.float32),
    ((6, 2), (13, 7), torch.float32),
    ((18, 1), (24, 40), torch.float32),
    ((8, 2), (64, 64), torch.bfloat16),
    ((3, 1), (80, 96), torch.float16),
    ((4, 1), (256, 128), torch.bfloat16),
]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"sliding_window": 1},
    {"sliding_window": 19, "sinks": True},
    {"soft_cap": 3.0},
    {"sinks": True},
    {"sliding_window": 40, "soft_cap": 20.0, "sinks": True},
]


def random_lens(rng: random.Random, num_rows: int = 4) -> list[tuple[int, int, int]]:
    """(prompt, response, queries) a row: decodes, extensions, prompts, rows without a query."""
    lens = []
    for _ in range(num_rows):
        prompt = rng.choice([rng.randint(1, 40), 16 * rng.randint(1, 3), rng.randint(60, 90), 0])
        response = rng.choice([0, 16, rng.randint(1, 40)]) if prompt else rng.randint(1, 40)
        total = prompt + response
        queries = rng.choice([1, 1, 0, rng.randint(2, 9)]) if lens else rng.randint(1, 5)
        lens.append((prompt, response, min(total, queries)))
    return lens


def resolve(options: dict[str, Any], num_heads: int, seed: int) -> dict[str, Any]:
    options = {"scale": 0.3, **options}
    if options.get("sinks"):
        options["sinks"] = torch.randn(num_heads, generator=torch.Generator().manual_seed(seed))
    return options


def attend(
    batch: PagedBatch, device: str, work_list: WorkListOptions = SMALL, **options: Any
) -> Tensor:
    sinks = options.pop("sinks", None)
    return paged_attention(
        *(tensor.to(device) for tensor in batch.args),
        **batch.rows,
        **options,
        sinks=None if sinks is None else sinks.to(device),
        backend="triton",
        work_list=work_list,
    ).cpu()


def is_close(batch: PagedBatch, got: Tensor, options: dict[str, Any]) -> bool:
    """No further from the exact result than plain PyTorch of the same dtype comes, twice over."""
    dtype = batch.query.dtype
    exact = plain_batch(batch, torch.float64, **options)
    bound = max(
        (plain_batch(batch, dtype, **options).double() - exact).square().mean().item(),
        (exact.to(dtype).double() - exact).square().mean().item(),
    )
    return (got.double() - exact).square().mean().item() <= 4 * bound


@pytest.mark.parametrize(
    ("option", "shape"),
    [(i, j) for i in range(len(OPTIONS)) for j in range(len(SHAPES)) if (i + j) % 2 == 0],
)
def test_error_is_that_of_plain_pytorch(option: int, shape: int, device: str) -> None:
    heads, sizes, dtype = SHAPES[shape]
    seed = 10 * option + shape
    lens = random_lens(random.Random(seed))
    batch = make_batch(lens, heads=heads, sizes=sizes, dtype=dtype, seed=seed)
    options = resolve(OPTIONS[option], heads[0], seed)
    got = attend(batch, device, **options)
    assert got.dtype == dtype
    assert is_close(batch, got, options)


def planted(bug: str, batch: PagedBatch, device: str, options: dict[str, Any]) -> Tensor:
    rows = {name: value.clone() for name, value in batch.rows.items()}
    if bug == "window":
        options = {**options, "sliding_window": options["sliding_window"] + 1}
    elif bug == "hole":  # one slot of the hole counts as a key
        rows["prompt_lens"][0] += 1
    elif bug == "cap":
        options = {**options, "soft_cap": options["soft_cap"] * 1.05}
    elif bug == "sinks":
        options = {**options, "sinks": options["sinks"].roll(1)}
    elif bug == "table":
        rows["block_table"][0, :2] = rows["block_table"][0, [1, 0]]
    return attend(PagedBatch(*batch.args, rows), device, **options)


@pytest.mark.parametrize("bug", ["none", "window", "hole", "cap", "sinks", "table"])
def test_the_comparison_notices_planted_bugs(bug: str, device: str) -> None:
    batch = make_batch([(37, 20, 3), (20, 33, 1)], heads=(4, 2), seed=5)
    batch.key_pool.nan_to_num_(0.0)  # so that nothing but the values can tell
    batch.value_pool.nan_to_num_(0.0)
    options = resolve({"sliding_window": 30, "soft_cap": 4.0, "sinks": True}, 4, 5)
    assert is_close(batch, planted(bug, batch, device, options), options) == (bug == "none")


@pytest.mark.parametrize("queries", [1, 3])
def test_sharing_changes_who_fetches_and_nothing_else(queries: int, device: str) -> None:
    lens = [(70, n, queries) for n in (5, 16, 17, 33, 9, 40)]
    batch = make_batch(lens, heads=(4, 1), sizes=(16, 16), share_prompt=True, seed=3)
    options = {"scale": 0.3, "sliding_window": 60}
    shared, alone = (attend(batch, device, how, **options) for how in (SMALL, ALONE))
    metadata = AttentionMetadata.build(**batch.rows)
    items = [len(metadata.plan(torch.device("cpu"), 4, how).items) for how in (SMALL, ALONE)]
    assert items[0] < items[1]
    torch.testing.assert_close(shared, alone, rtol=0, atol=1e-6)
    assert is_close(batch, shared, options)


def test_default_work_list(device: str) -> None:
    batch = make_batch([(530, 20, 1)] * 8, heads=(2, 1), share_prompt=True, seed=9)
    assert is_close(batch, attend(batch, device, WorkListOptions(), scale=0.3), {"scale": 0.3})


def test_large_scores_and_sinks_do_not_overflow(device: str) -> None:
    batch = make_batch([(100, 40, 3)], heads=(4, 2), seed=4, spread=30.0)
    options: dict[str, Any] = {"scale": 1.0, "sinks": torch.tensor([500.0, -500.0, 0.0, -1e30])}
    exact = plain_batch(batch, torch.float64, **options)
    # Scores reach 5000, where a float32 is 2.4e-4 off at best, and values 100.
    assert (attend(batch, device, **options).double() - exact).abs().max() < 0.2


def test_small_scores_under_a_soft_cap(device: str) -> None:
    """tanh(x) of a small x is x, not what is left of 1 - 1."""
    batch = make_batch([(40, 0, 4)], heads=(2, 1), seed=11)
    options = {"scale": 1e-3, "soft_cap": 50.0}
    exact = plain_batch(batch, torch.float64, **options)
    assert (attend(batch, device, **options).double() - exact).abs().max() < 1e-6


def test_offsets_beyond_two_to_the_31(device: str) -> None:
    num_blocks = 2**20 + 8  # of 16 x 128 elements each; only the touched pages become memory
    pools = [torch.empty(num_blocks, 1, 16, 128, dtype=torch.bfloat16, device=device) for _ in "kv"]
    ids = torch.tensor([[num_blocks - 1, 3, num_blocks - 5]], dtype=torch.int32)
    small = make_batch([(32, 9, 1)], heads=(2, 1), sizes=(128, 128), dtype=torch.bfloat16, seed=1)
    keys, values = small.keys[0], small.values[0]
    for t in range(41):
        block, offset = int(ids[0, t // 16]), t % 16
        pools[0][block, :, offset] = keys[t].to(device)
        pools[1][block, :, offset] = values[t].to(device)
    rows = {**small.rows, "block_table": ids, "response_block_start": torch.tensor([2]).int()}
    got = attend(PagedBatch(small.query, *pools, rows), device, scale=0.1)
    assert is_close(small, got, {"scale": 0.1})


def test_a_plan_is_filled_again_and_responses_grow_in_place(device: str) -> None:
    """As a graph is replayed: same addresses, same launches, lengths that only the device knows."""
    heads, sizes = (4, 2), (16, 16)
    options = resolve({"sliding_window": 50, "sinks": True}, 4, 0)
    plan = PagedPlan(
        device, num_rows=4, num_tokens=4, table_width=9, tile_tokens=4, run_blocks=2, options=SMALL
    )
    addresses = [getattr(plan, name).data_ptr() for name in ("items", "block_table")]
    sinks = options.pop("sinks")
    for seed, responses in enumerate([(14, 3, 30), (1, 16), (15,) * 4]):
        steps = 3
        lens = [(40, n + steps, 1) for n in responses]  # the tables hold what is to come
        batch = make_batch(lens, heads=heads, sizes=sizes, share_prompt=True, seed=seed)
        rows = {name: value.numpy() for name, value in batch.rows.items()}
        longest = rows.pop("response_lens")
        table = np.where((rows["block_table"] < 0) | (rows["block_table"] > 99), 0, -1)
        rows["block_table"] = np.where(table == 0, 0, rows["block_table"])
        plan.update(**rows, response_lens=longest - steps, longest_response_lens=longest)
        num_rows = len(responses)
        for step in range(steps + 1):
            query = torch.randn(4, 4, 16)
            got = paged_attention_prepared(
                *(query.to(device), batch.key_pool.to(device), batch.value_pool.to(device), plan),
                **options,
                sinks=sinks.to(device),
                backend="triton",
            ).cpu()
            for i, response in enumerate(responses):
                keys, values = (t[i][: 40 + response + step] for t in (batch.keys, batch.values))
                row = (query[i : i + 1].double(), keys.double(), values.double())
                expected = plain_attention(*row, **options, sinks=sinks)
                torch.testing.assert_close(got[i : i + 1].double(), expected, rtol=0, atol=3e-6)
            assert not got[num_rows:].any()  # queries of no row
            plan.response_lens[:num_rows] += 1
    assert addresses == [getattr(plan, name).data_ptr() for name in ("items", "block_table")]


def test_a_plan_refuses_what_does_not_fit() -> None:
    batch = make_batch([(40, 5, 1), (40, 5, 1)], seed=1)
    rows = {name: np.maximum(value.numpy(), 0) for name, value in batch.rows.items()}
    rows["block_table"] %= 20
    width = rows["block_table"].shape[1]
    sizes = {"num_rows": 2, "num_tokens": 2, "table_width": width, "tile_tokens": 1}

    def refused(sizes: dict[str, int], **changed: Any) -> str:
        with pytest.raises(InvalidParameterError) as caught:
            PagedPlan("cpu", **sizes).update(**{**rows, **changed})
        return caught.value.parameter

    PagedPlan("cpu", **sizes).update(**rows)
    assert refused({**sizes, "num_rows": 1}) == "block_table"
    assert refused({**sizes, "table_width": width - 1}) == "block_table"
    assert refused({**sizes, "num_tokens": 1}) == "query_start_loc"
    assert refused({**sizes, "num_items": 1}) == "num_items"
    assert refused({**sizes, "num_partials": 1}) == "num_partials"
    short = rows["response_lens"] - 1
    assert refused(sizes, longest_response_lens=short) == "longest_response_lens"
    assert refused(sizes, prompt_lens=rows["prompt_lens"] + 100) == "prompt_lens"
    for name in ("run_blocks", "min_shared_rows", "min_shared_tokens"):
        with pytest.raises(InvalidParameterError, match=name):
            WorkListOptions(**{name: 0})
    # The CPU kernels take no plan, and a plan's size counts as the batch's.
    plan = PagedPlan("cpu", **sizes)
    for query, backend in ((batch.query, "cpu"), (batch.query[:1], "triton")):
        with pytest.raises(InvalidParameterError, match="query"):
            paged_attention_prepared(
                query, batch.key_pool, batch.value_pool, plan, scale=1.0, backend=backend
            )


def test_empty_batches(device: str) -> None:
    batch = make_batch([(30, 4, 0)], seed=1)
    assert attend(batch, device, scale=1.0).shape == (0, 4, 16)


def test_compiled_kernels_refuse_the_cpu(monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    batch = make_batch([(30, 4, 1)], seed=1)
    with pytest.raises(InvalidParameterError, match="query must be on a GPU"):
        paged_attention(*batch.args, **batch.rows, scale=1.0, backend="triton")
