# SPDX-License-Identifier: Apache-2.0
"""Paged logits against the stock model on the whole sequence, for random ragged batches."""

from __future__ import annotations

import threading

import pytest
import torch
from paged_driver import PagedDriver, stock_logits
from tiny_models import TINY_MODELS, tiny_model

from ivg_fast.models import attention
from ivg_fast.models.runner import ModelRunner
from ivg_fast.models.value_head import ValueHeadModel

# In units of the logits' spread; float32 attention in another order of summation makes about 1e-6.
TOLERANCE = 5e-5


def drive(runner: ModelRunner, driver: PagedDriver) -> list[tuple[int, int, torch.Tensor]]:
    runner.allocate(driver.num_blocks)
    results = []
    while not driver.is_done:
        batch, wanted = driver.next_batch()
        logits = runner.forward(batch)
        assert logits.shape == (len(wanted), runner.logits_width)
        results += [(row, position, x) for (row, position), x in zip(wanted, logits, strict=True)]
    return results


def worst_error(driver: PagedDriver, results: list, stock: torch.nn.Module) -> float:
    expected = [stock_logits(stock, row) for row in driver.rows]
    spread = torch.cat(expected).std()
    return max(float((x - expected[row][t]).abs().max() / spread) for row, t, x in results)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_ragged_batches_match_stock(name: str, seed: int) -> None:
    runner = ModelRunner(tiny_model(name, seed=seed), role="base", self_test=False)
    driver = PagedDriver(seed, num_rows=6, vocab_size=97)
    results = drive(runner, driver)
    assert len(results) > 100
    assert worst_error(driver, results, tiny_model(name, seed=seed)) < TOLERANCE


def test_a_wrong_position_is_seen() -> None:
    """The comparison above is no rubber stamp: one position off, and it fails."""
    runner = ModelRunner(tiny_model("llama"), role="base", self_test=False)
    driver = PagedDriver(1, num_rows=3, vocab_size=97)
    stock = runner.network.forward

    def shifted(**inputs):
        positions = inputs.pop("position_ids")
        return stock(**inputs, position_ids=positions + (positions > 9))

    runner.network.forward = shifted
    assert worst_error(driver, drive(runner, driver), tiny_model("llama")) > 100 * TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_good_as_stock(dtype: torch.dtype) -> None:
    """Against float64, the paged model errs at most twice as much as the stock one at its dtype."""
    driver = PagedDriver(3, num_rows=6, vocab_size=97)
    results = drive(ModelRunner(tiny_model("qwen3", dtype=dtype), role="base"), driver)
    # Rounded first, so that all three have the very same weights.
    exact = tiny_model("qwen3", dtype=dtype).double()
    half = tiny_model("qwen3", dtype=dtype)
    expected = [stock_logits(exact, row) for row in driver.rows]
    stock = [stock_logits(half, row) for row in driver.rows]
    paged_error = torch.stack([(x - expected[r][t]).square().mean() for r, t, x in results])
    stock_error = torch.stack(
        [(stock[r][t] - expected[r][t]).square().mean() for r, t, _ in results]
    )
    assert paged_error.mean().sqrt() < 2 * stock_error.mean().sqrt()


def test_value_head_gives_hidden_states_and_token_values() -> None:
    causal = tiny_model("gpt2", seed=4)
    head = torch.nn.Linear(32, 90, bias=False).requires_grad_(False)
    runner = ModelRunner(ValueHeadModel(causal.transformer, head), role="value")
    assert runner.vocab_size == 90
    driver = PagedDriver(5, num_rows=4, vocab_size=90)
    stock = ValueHeadModel(tiny_model("gpt2", seed=4).transformer, head)
    assert worst_error(driver, drive(runner, driver), stock) < TOLERANCE

    first, second = (PagedDriver(6, num_rows=4, vocab_size=90) for _ in range(2))
    runner.allocate(first.num_blocks)
    batch, wanted = first.next_batch()
    hidden = runner.hidden(batch)
    assert hidden.shape == (len(wanted), 32)
    torch.testing.assert_close(head(hidden), runner.forward(second.next_batch()[0]))


def test_two_roles_share_a_model_but_not_their_pools() -> None:
    model = tiny_model("llama")
    runners = [ModelRunner(model, role=role, self_test=False) for role in ("base", "untuned")]
    drivers = [PagedDriver(seed, num_rows=3, vocab_size=97) for seed in (7, 8)]
    stock = tiny_model("llama")
    results: list[list] = [[], []]
    for runner, driver in zip(runners, drivers, strict=True):
        runner.allocate(driver.num_blocks)
    while not all(driver.is_done for driver in drivers):
        for runner, driver, seen in zip(runners, drivers, results, strict=True):
            if not driver.is_done:
                batch, wanted = driver.next_batch()
                logits = runner.forward(batch)
                seen += [(r, t, x) for (r, t), x in zip(wanted, logits, strict=True)]
    for driver, seen in zip(drivers, results, strict=True):
        assert worst_error(driver, seen, stock) < TOLERANCE


def test_threads_do_not_see_each_others_batch() -> None:
    names = ("gpt2", "mistral")
    runners = [ModelRunner(tiny_model(name), role="base", self_test=False) for name in names]
    drivers = [PagedDriver(seed, num_rows=6, vocab_size=97) for seed in (9, 10)]
    results: list[list] = [[], []]
    barrier = threading.Barrier(2)

    def work(i: int) -> None:
        barrier.wait()
        results[i] = drive(runners[i], drivers[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, driver, seen in zip(names, drivers, results, strict=True):
        assert worst_error(driver, seen, tiny_model(name)) < TOLERANCE


def test_the_context_is_gone_after_a_forward_and_after_an_error() -> None:
    runner = ModelRunner(tiny_model("gpt2"), role="base", self_test=False)
    driver = PagedDriver(11, num_rows=2, vocab_size=97)
    runner.allocate(1)
    batch, _ = driver.next_batch()
    batch.slot_mapping.fill_(16)  # outside the pool
    with pytest.raises(ValueError, match="slot_mapping"):
        runner.forward(batch)
    assert attention._CURRENT.get() is None
    with pytest.raises(RuntimeError, match="only inside a ModelRunner"):
        runner.model(torch.zeros(1, 2, dtype=torch.int64))


def test_close_gives_the_model_back() -> None:
    model = tiny_model("gpt2")
    ids = torch.arange(12)[None]
    before = model(ids).logits
    runner = ModelRunner(model, role="base", num_blocks=4)
    assert runner.bytes_per_block == sum(pool[0].nbytes for pool in runner.pools)
    runner.close()
    assert runner.pools == []
    assert torch.equal(model(ids).logits, before)
