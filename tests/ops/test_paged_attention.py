# SPDX-License-Identifier: Apache-2.0
"""Paged attention against plain PyTorch in float64 on each row's keys in order."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ivg_fast import _C
from ivg_fast.errors import InvalidParameterError
from ivg_fast.ops.paged_attention import (
    AttentionMetadata,
    paged_attention,
    paged_attention_prepared,
    paged_attention_ref,
)
from tests.ops.paged_batches import make_batch, plain_batch, random_lens

REPO = Path(__file__).parents[2]

# (query heads, KV heads), (key size, value size): one head, GQA, a group larger than a tile, sizes
# of every remainder modulo the vector widths.
SHAPES = [
    ((3, 3), (64, 64)),
    ((9, 3), (64, 64)),
    ((4, 1), (8, 8)),
    ((40, 1), (24, 40)),
    ((4, 2), (80, 96)),
    ((6, 2), (13, 7)),
    ((2, 1), (256, 128)),
]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"sliding_window": 1},
    {"sliding_window": 19},
    {"soft_cap": 3.0},
    {"sinks": True},
    {"sliding_window": 300, "soft_cap": 20.0, "sinks": True},
    {"sliding_window": 7, "sinks": True},
    {"sliding_window": 40, "soft_cap": 2.0},
]


def resolve(options: dict[str, Any], heads: tuple[int, int], seed: int) -> dict[str, Any]:
    options = {"scale": 0.3, **options}
    if options.get("sinks"):
        g = torch.Generator().manual_seed(seed)
        options["sinks"] = torch.randn(heads[0], generator=g)
    return options


def error(result: Tensor, exact: Tensor) -> float:
    return (result.double() - exact).abs().max().item()


def rms(result: Tensor, exact: Tensor) -> float:
    return (result.double() - exact).square().mean().sqrt().item()


# Every shape and every option with every dtype, half of the combinations.
GRID = [
    pytest.param(i, *shape, dtype, id=f"{i}-{shape}-{dtype}")
    for i in range(len(OPTIONS))
    for j, shape in enumerate(SHAPES)
    for k, dtype in enumerate([torch.float32, torch.bfloat16, torch.float16])
    if (i + j + k) % 2 == 0
]


@pytest.fixture(autouse=True)
def _one_torch_thread() -> Iterator[None]:
    """The tensors are small: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("option", "heads", "sizes", "dtype"), GRID)
def test_error_is_that_of_plain_pytorch(
    option: int, heads: tuple[int, int], sizes: tuple[int, int], dtype: torch.dtype
) -> None:
    seed = 1000 * option + sizes[0]
    batch = make_batch(random_lens(seed), heads=heads, sizes=sizes, dtype=dtype, seed=seed)
    options = resolve(OPTIONS[option], heads, seed)
    result = paged_attention(*batch.args, **batch.rows, **options)
    exact = plain_batch(batch, torch.float64, **options)
    plain = plain_batch(batch, dtype, **options)
    assert result.dtype == dtype
    assert result.shape == exact.shape
    # Where plain PyTorch happens to be exact, one rounding of the result is still due. The largest
    # error of all hangs on one near-tie of the softmax, so it gets more room than the mean.
    rounded = exact.to(dtype)
    assert rms(result, exact) <= 2 * max(rms(plain, exact), rms(rounded, exact))
    assert error(result, exact) <= 4 * max(error(plain, exact), error(rounded, exact))


@pytest.mark.parametrize("option", range(len(OPTIONS)))
def test_reference_is_exact(option: int) -> None:
    for heads, sizes in SHAPES[option % 2 :: 2]:
        batch = make_batch(random_lens(option), heads=heads, sizes=sizes, seed=option)
        options = resolve(OPTIONS[option], heads, option)
        exact = plain_batch(batch, torch.float64, **options)
        result = paged_attention_ref(*batch.args, **batch.rows, **options)
        assert error(result, exact) <= error(exact.float(), exact)
        chosen = paged_attention(*batch.args, **batch.rows, **options, backend="torch")
        assert torch.equal(chosen, result)


def planted(bug: str, batch: Any, options: dict[str, Any]) -> Tensor:
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
    return paged_attention(*batch.args, **rows, **options)


@pytest.mark.parametrize("bug", ["none", "window", "hole", "cap", "sinks", "table"])
def test_the_comparison_notices_planted_bugs(bug: str) -> None:
    heads = (4, 2)
    batch = make_batch([(37, 20, 3), (20, 33, 1)], heads=heads, seed=5)
    batch.key_pool.nan_to_num_(0.0)  # so that nothing but the values can tell
    batch.value_pool.nan_to_num_(0.0)
    options = resolve({"sliding_window": 30, "soft_cap": 4.0, "sinks": True}, heads, 5)
    exact = plain_batch(batch, torch.float64, **options)
    plain = plain_batch(batch, torch.float32, **options)
    is_right = rms(planted(bug, batch, options), exact) <= 2 * rms(plain, exact)
    assert is_right == (bug == "none")


def test_response_block_start_says_where_the_response_is() -> None:
    batch = make_batch([(20, 33, 1), (20, 33, 1)], seed=6)  # row 1 has a whole block as its hole
    exact = plain_batch(batch, torch.float64, scale=1.0)
    rows = dict(batch.rows)
    assert rows["response_block_start"].tolist() == [2, 3]
    assert error(paged_attention(*batch.args, **rows, scale=1.0), exact) < 1e-4
    rows["block_table"] = rows["block_table"].clone()
    rows["block_table"][1, 2] = rows["block_table"][
        1, 3
    ]  # the hole's entry is legal now, but wrong
    rows["response_block_start"] = torch.tensor([2, 2], dtype=torch.int32)
    assert not error(paged_attention(*batch.args, **rows, scale=1.0), exact) < 1e-2


def test_an_unwritten_slot_is_read_by_nobody_but_a_wrong_call() -> None:
    batch = make_batch([(37, 20, 3)], seed=7)
    assert paged_attention(*batch.args, **batch.rows, scale=1.0).isfinite().all()
    rows = {**batch.rows, "prompt_lens": batch.rows["prompt_lens"] + 1}
    assert paged_attention(*batch.args, **rows, scale=1.0).isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_threads_do_not_change_a_bit(seed: int, dtype: torch.dtype) -> None:
    batch = make_batch(random_lens(seed, 12), heads=(6, 2), sizes=(64, 64), dtype=dtype, seed=seed)
    one, two, three = (
        paged_attention(*batch.args, **batch.rows, scale=0.2, num_threads=n) for n in (1, 2, 3)
    )
    assert torch.equal(one, two)
    assert torch.equal(one, three)


# (prompt, response, queries). Of (300, 4, 5) one query stands in the prompt, which parts the group.
SHARED = [(300, n, q) for n, q in ((5, 1), (16, 5), (17, 1), (33, 1), (40, 7), (9, 9), (41, 2))]


@pytest.mark.parametrize("lens", [SHARED, [*SHARED[:3], (300, 4, 5), *SHARED[3:]], 3 * SHARED[:4]])
@pytest.mark.parametrize("heads", [(3, 3), (6, 2), (40, 1)])
@pytest.mark.parametrize("option", range(len(OPTIONS)))
def test_rows_that_share_their_prompt(option: int, heads: tuple[int, int], lens: list) -> None:
    dtype = (torch.float32, torch.bfloat16)[(option + heads[0]) % 2]
    batch = make_batch(
        lens, heads=heads, sizes=(64, 40), dtype=dtype, share_prompt=True, seed=option
    )
    options = resolve(OPTIONS[option], heads, option)
    result = paged_attention(*batch.args, **batch.rows, **options)
    exact = plain_batch(batch, torch.float64, **options)
    plain, rounded = plain_batch(batch, dtype, **options), exact.to(dtype)
    assert rms(result, exact) <= 2 * max(rms(plain, exact), rms(rounded, exact))


@pytest.mark.parametrize("queries", [1, 5])
def test_a_row_does_not_depend_on_other_requests(queries: int) -> None:
    """Rows with one prompt are computed together, and round together; others change no bit."""
    lens = [(300, n, queries) for n in (5, 16, 17, 33, 40, 41)]
    requests = [
        make_batch(lens, heads=(3, 1), sizes=(64, 64), share_prompt=True, seed=i) for i in (3, 4)
    ]
    first, second = requests
    num_blocks = first.key_pool.shape[0]
    rows = {name: torch.cat([first.rows[name], second.rows[name]]) for name in first.rows}
    rows["block_table"] = torch.cat(
        [
            first.rows["block_table"].clamp(0, num_blocks - 1),
            second.rows["block_table"].clamp(0, num_blocks - 1) + num_blocks,
        ]
    )
    rows["query_start_loc"] = torch.arange(13, dtype=torch.int32) * queries
    together = paged_attention(
        *(torch.cat(pair) for pair in zip(first.args, second.args, strict=True)), **rows, scale=0.2
    )
    for request, part in zip(requests, together.chunk(2), strict=True):
        assert torch.equal(paged_attention(*request.args, **request.rows, scale=0.2), part)
        by_row = zip(request.queries(), part.split(queries), strict=True)
        for i, (query, output) in enumerate(by_row):
            row = {name: value[i : i + 1] for name, value in request.rows.items()}
            row["query_start_loc"] = torch.tensor([0, queries], dtype=torch.int32)
            alone = paged_attention(query, *request.args[1:], **row, scale=0.2)
            torch.testing.assert_close(alone, output, rtol=1e-5, atol=1e-6)


def test_queries_may_be_strided() -> None:
    batch = make_batch(random_lens(2), heads=(4, 2), seed=2)
    expected = paged_attention(*batch.args, **batch.rows, scale=0.2)
    packed = torch.zeros(batch.query.shape[0], 7, 40)  # a slice of a fused projection
    packed[:, 1:5, 3:19] = batch.query
    by_head = batch.query.transpose(0, 1).contiguous().transpose(0, 1)  # as transformers has it
    for query in (packed[:, 1:5, 3:19], by_head):
        assert not query.is_contiguous()
        assert torch.equal(
            paged_attention(query, *batch.args[1:], **batch.rows, scale=0.2), expected
        )


def test_out_and_prepared_metadata() -> None:
    batch = make_batch([(30, 4, 2), (3, 0, 3), (8, 8, 0)], seed=1)
    metadata = AttentionMetadata.build(**batch.rows)
    assert (metadata.num_rows, metadata.num_tokens) == (3, 5)
    assert (metadata.max_query_len, metadata.max_seq_len) == (3, 34)
    expected = paged_attention(*batch.args, **batch.rows, scale=0.2)
    for value in batch.rows.values():
        value.fill_(2**30)  # the metadata has its own copy
    out = torch.full_like(expected, float("nan"))
    assert paged_attention_prepared(*batch.args, metadata, scale=0.2, out=out) is out
    assert torch.equal(out, expected)


def test_an_empty_batch() -> None:
    batch = make_batch([(30, 4, 0)], seed=1)
    assert paged_attention(*batch.args, **batch.rows, scale=0.2).shape == (0, 4, 16)
    rows = {name: value[:0] for name, value in batch.rows.items()}
    rows["query_start_loc"] = torch.zeros(1, dtype=torch.int32)
    assert paged_attention(*batch.args, **rows, scale=0.2).shape == (0, 4, 16)


def test_large_scores_and_sinks_do_not_overflow() -> None:
    batch = make_batch([(600, 40, 3)], heads=(4, 2), seed=4, spread=30.0)
    options: dict[str, Any] = {"scale": 1.0, "sinks": torch.tensor([500.0, -500.0, 0.0, -1e30])}
    exact = plain_batch(batch, torch.float64, **options)
    result = paged_attention(*batch.args, **batch.rows, **options)
    # Scores reach 5000, where a float32 is 2.4e-4 off at best, and values 100.
    assert error(result, exact) < 0.2


@pytest.mark.parametrize("window", [None, 1, 9])
@pytest.mark.parametrize("model", ["gemma2", "gpt_oss"])
def test_means_what_transformers_means(model: str, window: int | None) -> None:
    """Soft cap, sinks and the window's edge as the eager code and the masks of transformers."""
    from transformers import LlamaConfig, masking_utils
    from transformers.models.gemma2 import modeling_gemma2
    from transformers.models.gpt_oss import modeling_gpt_oss

    heads, total = (4, 2), 40
    batch = make_batch([(total, 0, total)], heads=heads, seed=8)
    sinks = torch.randn(heads[0])
    module = SimpleNamespace(num_key_value_groups=2, sinks=sinks, training=False, head_dim=16)
    config = LlamaConfig(sliding_window=window, attn_implementation="eager")
    make_mask = masking_utils.create_sliding_window_causal_mask
    if window is None:
        make_mask = masking_utils.create_causal_mask
    mask = make_mask(
        config=config,
        inputs_embeds=torch.zeros(1, total, 1),
        attention_mask=None,
        past_key_values=None,
        position_ids=torch.arange(total)[None],
    )
    query, key, value = (
        t.transpose(0, 1)[None] for t in (batch.query, batch.keys[0], batch.values[0])
    )
    options: dict[str, Any] = {"scale": 0.3}
    if model == "gemma2":
        options["soft_cap"] = 2.0
        stock, _ = modeling_gemma2.eager_attention_forward(
            module, query, key, value, mask, scaling=0.3, softcap=2.0
        )
    else:
        options["sinks"] = sinks
        stock, _ = modeling_gpt_oss.eager_attention_forward(
            module, query, key, value, mask, scaling=0.3
        )
    result = paged_attention(*batch.args, **batch.rows, **options, sliding_window=window)
    torch.testing.assert_close(result, stock[0], atol=2e-6, rtol=1e-5)
    if window is not None:
        other = paged_attention(*batch.args, **batch.rows, **options, sliding_window=window + 1)
        assert error(other, stock[0].double()) > 1e-2


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_other_instruction_sets(isa: str) -> None:
    """The tests above once more with the instruction set forced, where the processor has it."""
    if os.environ.get("IVG_FAST_CPU_ISA"):
        pytest.skip("an instruction set is forced already")
    environment = {**os.environ, "IVG_FAST_CPU_ISA": isa}
    check = "from ivg_fast import _C; print(_C.cpu_isa())"
    chosen = subprocess.run(
        [sys.executable, "-c", check], cwd=REPO, env=environment, capture_output=True, text=True
    )
    if "lacks that instruction set" in chosen.stderr:
        pytest.skip(f"this processor lacks {isa}")
    if chosen.stdout.strip() == _C.cpu_isa():
        pytest.skip(f"{isa} is what the tests above ran on")
    assert chosen.stdout.strip() == isa, chosen.stderr
    tests = "plain_pytorch or threads or requests or overflow or share"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", tests, str(Path(__file__))]
    run = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


def replace(name: str, value: Any) -> Any:
    def change(arguments: dict[str, Any]) -> None:
        arguments[name] = value(arguments[name]) if callable(value) else value

    return change


def put(name: str, index: Any, value: int) -> Any:
    def change(arguments: dict[str, Any]) -> None:
        arguments[name] = arguments[name].clone()
        arguments[name][index] = value

    return change


REFUSED = {
    "block id below 0": ("block_table", put("block_table", (0, 0), -1)),
    "block id past the pool": ("block_table", put("block_table", (0, 2), 10_000)),
    "table dtype": ("block_table", replace("block_table", Tensor.long)),
    "table dimensions": ("block_table", replace("block_table", torch.flatten)),
    "prompt past the table": ("prompt_lens", put("prompt_lens", 0, 10_000)),
    "negative prompt": ("prompt_lens", put("prompt_lens", 0, -1)),
    "response past the table": ("response_lens", put("response_lens", 0, 10_000)),
    "negative response": ("response_lens", put("response_lens", 0, -1)),
    "response inside the prompt": ("response_block_start", put("response_block_start", 0, 1)),
    "response before the table": ("response_block_start", put("response_block_start", 0, -1)),
    "starts not from 0": ("query_start_loc", put("query_start_loc", 0, 1)),
    "starts decrease": ("query_start_loc", put("query_start_loc", 1, -2)),
    "more queries than keys": ("query_start_loc", put("query_start_loc", 2, 100)),
    "starts too short": ("query_start_loc", replace("query_start_loc", lambda t: t[:-1])),
    "lens too long": ("prompt_lens", replace("prompt_lens", lambda t: t.repeat(2))),
    "query tokens": ("query", replace("query", lambda t: t[1:])),
    "query head size": ("key_pool", replace("query", lambda t: t[..., :8])),
    "query stride": ("query", replace("query", lambda t: t.repeat(1, 1, 2)[..., ::2])),
    "query heads": ("query", replace("query", lambda t: t[:, :3])),
    "query dtype": ("query", replace("query", Tensor.double)),
    "pool dtype": ("key_pool", replace("key_pool", Tensor.bfloat16)),
    "pool heads": ("value_pool", replace("value_pool", lambda t: t[:, :1].contiguous())),
    "pool stride": ("value_pool", replace("value_pool", lambda t: t.mT.contiguous().mT)),
    "block size": ("key_pool", replace("key_pool", lambda t: t.repeat(1, 1, 2, 1))),
    "window 0": ("sliding_window", replace("sliding_window", 0)),
    "soft cap 0": ("soft_cap", replace("soft_cap", 0.0)),
    "soft cap NaN": ("soft_cap", replace("soft_cap", float("nan"))),
    "sinks": ("sinks", replace("sinks", torch.zeros(3))),
    "out": ("out", replace("out", torch.zeros(1))),
    "threads": ("num_threads", replace("num_threads", 0)),
    "backend": ("backend", replace("backend", "gpu")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str) -> None:
    batch = make_batch([(37, 20, 3), (20, 33, 1)], seed=5)
    arguments: dict[str, Any] = {
        "query": batch.query,
        "key_pool": batch.key_pool,
        "value_pool": batch.value_pool,
        "scale": 0.2,
        "sliding_window": None,
        "soft_cap": None,
        "sinks": None,
        "out": None,
        "num_threads": None,
        "backend": "cpu",
        **batch.rows,
    }
    paged_attention(**arguments)
    parameter, change = REFUSED[case]
    change(arguments)
    with pytest.raises(InvalidParameterError) as caught:
        paged_attention(**arguments)
    assert caught.value.parameter == parameter
    assert str(caught.value).startswith(parameter)
