# SPDX-License-Identifier: Apache-2.0
"""What the benches do on a GPU, at small shapes on the CPU: graphs become loops, the kernels run in
Triton's interpreter."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from interpreted import needs_loops

from bench import attention, crossover, harness, kv, ops, run
from ivg_fast.ops.kv_cache import BLOCK_SIZE


def a_run(*argv: str) -> run.Run:
    options = run.parser_of(None, has_cuda=True).parse_args(argv)
    one = run.Run("test", options, argv, num_rounds=(1, 1))
    one.limits = {"copy": 1.0, "read": 1.0}
    one.uses_graphs = True
    return one


def test_a_repeated_call_counts_once() -> None:
    seen: list[int] = []
    repeated = harness.Repeated([lambda i=i: seen.append(i) for i in range(4)], "cpu")
    watch = harness.Stopwatch("cpu", is_cold=False)
    assert watch.time(repeated) > 0
    assert seen == [0, 1, 2, 3]
    slow = harness.Repeated([lambda: sum(range(100_000))] * 5, "cpu")
    whole = harness.Stopwatch("cpu", is_cold=False).time(slow.__call__)
    assert watch.time(slow) < whole


@pytest.mark.parametrize("num_bytes", [1, 1000, 60_000, 10**6, 10**9])
def test_cold_sets_exceed_the_cache(num_bytes: int) -> None:
    cached = 1_000_000
    sets = harness.num_cold_sets(num_bytes, cached)
    if sets:
        assert 2 <= sets <= harness.MAX_SETS
        assert sets * num_bytes >= 2 * cached
        assert sets == 2 or (sets - 1) * num_bytes < 2 * cached
    else:
        assert harness.MAX_SETS * num_bytes < 2 * cached


def test_a_run_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(run.time, "monotonic", lambda: now[0])
    one = a_run("--seconds", "10")
    done = []
    for name in "abcdef":
        if one.has_time(name):
            done.append(name)
            now[0] += 3.0
    assert done == ["a", "b", "c"]
    assert set(one.left_out) == {"d", "e", "f"}
    endless = a_run()
    now[0] += 1e6
    assert endless.has_time("anything")


def test_graphs_give_device_times_of_warm_and_cold_inputs(capsys: Any) -> None:
    one = a_run()
    calls: list[tuple[int, str]] = []

    def fails() -> None:
        raise RuntimeError("not in a graph")

    sets = [
        {name: (lambda i=i, name=name: calls.append((i, name))) for name in ("ivg_fast", "other")}
        for i in range(3)
    ]
    found = one.compare_in_graphs("k", {"B": 2}, sets, "c", num_bytes=1000)
    assert set(found) == {"warm", "cold"}
    assert {i for i, _ in calls} == {0, 1, 2}
    per_round = [i for i, name in calls if name == "other"]
    # Two warm-ups and one round of at least 20 calls, each of its sets in turn.
    assert per_round[:60] == [0] * 60
    assert per_round[60:] == [0, 1, 2] * 21
    kernels = {r.kernel for r in one.records}
    assert kernels == {"k, graph, warm", "k, graph, cold"}
    times = [r for r in one.records if r.metric == "time"]
    assert {r.config for r in times} == {
        "c, warm cache: 1 sets of inputs in turn",
        "c, cold cache: 3 sets of inputs in turn",
    }
    share = next(r for r in one.records if "share" in r.metric)
    matching = next(r for r in times if (r.kernel, r.provider) == (share.kernel, share.provider))
    assert share.y_50 == pytest.approx(1000 / (matching.y_50 * 1e-6) / 1e9 * 100, rel=1e-2)
    cold = one.compare_in_graphs("k", {"B": 2}, sets, "c", num_bytes=1000, is_cold=True)
    assert set(cold) == {"cold"}


def test_every_op_is_measured_in_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    one = a_run()
    ops.measure(one, 2, 300, torch.float32)
    found = {(r.kernel, r.provider) for r in one.records if r.metric == "time"}
    kernels = {kernel for kernel, _ in found}
    for name in (
        "guided_sample",
        "pair_token_logprobs",
        *map("guided_sample, {}".format, ops.FILTERS),
    ):
        assert {name, f"{name}, graph, warm", f"{name}, graph, cold"} <= kernels
    for kernel, provider in found:
        assert not (", graph," in kernel and provider in ops.WAITING)
    assert not one.left_out


def test_forks_of_a_family_are_measured_in_graphs() -> None:
    one = a_run()
    kv.copying(one, kv.gpu_pools("tiny-llama", 32), 3)
    kv.writing(one, kv.gpu_pools("tiny-llama", 32), 5)
    found = {(r.kernel, r.provider): r for r in one.records if r.metric == "time"}
    cold = found["copy_blocks, tiny-llama, graph, cold", "ivg_fast"]
    assert cold.config.startswith("bfloat16, keys and values of tiny-llama, tiny-llama, tiny-llama")
    assert "12 pools" in cold.config
    least = next(r for r in one.records if r.kernel == cold.kernel and r.metric == "bytes")
    # read and written: 3 pairs, 3 models of 2 layers, K and V, blocks of 2 heads of 16
    assert least.y_50 == 2 * 3 * 3 * 2 * 2 * (2 * BLOCK_SIZE * 16) * 2
    assert ("write_kv, graph, warm", "ivg_fast") in found


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiled kernels refuse the CPU's tensors")
@needs_loops
def test_attention_with_and_without_sharing(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_flash(rows: attention.Rows, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return rows.attend(keys, values)

    monkeypatch.setattr(attention.Rows, "flash", no_flash)
    monkeypatch.setattr(run, "NUM_IN_A_GRAPH", 1)
    one = a_run()
    heads = (4, 2, 16)
    found = attention.on_gpu(
        one, [heads], ((32, 3, 1), (16, 1, 1), (32, 2, 2)), torch.float32, "triton"
    )
    assert set(found) == {"4/2 heads of 16"}
    switch = found["4/2 heads of 16"]
    assert set(switch["first rows that pay, by prompt"]) == {16, 32}
    providers = {r.provider for r in one.records if r.metric == "time"}
    assert providers == {
        *attention.WORK_LISTS,
        "sdpa, rows folded",
        "sdpa, gathered before",
        "flash, gathered before",
        "gather + sdpa",
    }
    rows = attention.Rows(32, 3, 1, *heads, num_layers=2)
    for layer in range(2):
        calls = rows.graph_providers(layer, "triton", can_gather=True)
        expected = rows.ours(layer)
        for name, call in calls.items():
            got = call()
            if got.dim() == 4:
                got = got[0].transpose(0, 1) if "folded" in name else got[:, :, 0]
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(rows.ours(0), rows.ours(1))
    assert "gather + sdpa" not in rows.graph_providers(0, "triton", can_gather=False)


def random_points(gain: Any) -> list[crossover.Point]:
    rng = random.Random(random.SystemRandom().random())
    return [
        crossover.Point(p, b, (alone := rng.uniform(1, 9)), alone / gain(p, b))
        for p in (64, 256, 1024)
        for b in (1, 4, 16, 64)
    ]


def test_the_switch_of_a_clean_crossover_is_found() -> None:
    points = random_points(lambda p, b: 2.0 if p >= 256 and b >= 16 else 0.5)
    best = crossover.best_switch(points)
    assert (best.min_shared_rows, best.min_shared_tokens) == (16, 256)
    assert best.regret == pytest.approx(0, abs=1e-12)
    assert crossover.first_rows(points) == {64: None, 256: 16, 1024: 16}
    # 6 of 12 places would share and lose by a factor of two, none would share and win.
    assert crossover.regret(points, 1, 1) == pytest.approx(2 ** (8 / 12) - 1)
    assert crossover.regret(points, crossover.NEVER, 1) == pytest.approx(2 ** (4 / 12) - 1)


def test_sharing_that_never_or_always_pays() -> None:
    never = crossover.best_switch(random_points(lambda p, b: 0.9))
    assert crossover.NEVER in (never.min_shared_rows, never.min_shared_tokens)
    always = crossover.best_switch(random_points(lambda p, b: 1.1))
    assert (always.min_shared_rows, always.min_shared_tokens) == (1, 64)
    with pytest.raises(ValueError, match="points"):
        crossover.best_switch([])
    assert math.isfinite(never.regret)
