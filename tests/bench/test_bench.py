# SPDX-License-Identifier: Apache-2.0
"""The harness: records, turns, counters, the engine's bound, README's table; no times."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engine_cases
import numpy as np
import pytest
import torch
from baseline_cases import PROVIDERS

from bench import (
    attention,
    e2e,
    harness,
    kv,
    ops,
    plots,
    report,
    run,
    scheduler,
    suite,
    torch_samplers,
)
from bench import tables as tables_of_bench
from bench.baselines import ValueModel
from bench.imdb import Imdb, counted_tokens, engine_tokens
from bench.replay import Replay
from ivg_fast.engine import Engine
from ivg_fast.ops.guided_sample import guided_sample
from ivg_fast.params import SearchParams

ROOT = Path(__file__).resolve().parents[2]


def a_run(*argv: str, rounds: tuple[int, int] = (1, 1)) -> run.Run:
    options = run.parser_of(None).parse_args(argv)
    return run.Run("test", options, argv, num_rounds=rounds)


def test_records_survive_a_csv(tmp_path: Path) -> None:
    one = a_run("--threads", "1", "--out", "x/y.csv", "--plot=z")
    assert one.command == "python -m bench test --threads 1"
    one.add("k", "ivg_fast", "time", "us", {"B": 2, "V": 100}, [3.0, 1.0, 2.0, 4.0, 5.0], "a, b")
    one.add("k", "other", "time", "us", {"B": 2, "V": 100}, [9.0] * 2, "a, b")
    one.add("k", "ivg_fast", "KV", "B", {"B": 2, "V": 100}, [123456789], "a, b")
    harness.write_csv(tmp_path / "r.csv", one.records)
    assert harness.read_csv(tmp_path / "r.csv") == one.records
    first, _, exact = one.records
    assert (first.y_20, first.y_50, first.y_80) == pytest.approx((1.8, 3.0, 4.2))
    assert exact.y_20 == exact.y_50 == exact.y_80 == 123456789
    assert first.place == {"B": 2, "V": 100}
    assert one.ratios() == {"k B=2 V=100: other / ivg_fast": 3.0}
    header = (tmp_path / "r.csv").read_text().splitlines()[0]
    style = "kernel,provider,metric,unit,x,y_20,y_50,y_80,config,device,versions"
    assert header == f"{style},command"


def test_providers_take_turns() -> None:
    seen: list[str] = []
    calls = {name: lambda name=name: seen.append(name) for name in "abc"}
    times = harness.take_turns(harness.Stopwatch("cpu", is_cold=False), calls, 3, 1)
    assert "".join(seen) == "abc" + "abc" + "bca" + "cab"
    assert {name: len(each) for name, each in times.items()} == dict.fromkeys("abc", 3)


def test_shares_are_of_the_measured_limit(capsys: pytest.CaptureFixture[str]) -> None:
    one = a_run("--warm")
    one.limits = {"read": 2.0}
    (seconds,) = one.compare("k", {"B": 1}, {"p": lambda: None}, "c", num_bytes=10**6).values()
    records = {r.metric: r for r in one.records}
    share = records["share of read bandwidth"]
    assert share.y_50 == pytest.approx(10**6 / seconds[0] / 2e9 * 100, rel=1e-3)
    assert records["bytes"].y_50 == 10**6
    assert records["time"].config == "c, warm cache"
    one.finish(extra=1)
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["bench"] == "test"
    assert last["extra"] == 1


@pytest.mark.parametrize("shape", [(64, 3, 1), (32, 4, 5), (16, 1, 2)])
def test_all_of_attentions_providers_compute_the_same(shape: tuple[int, int, int]) -> None:
    rows = attention.Rows(*shape, heads=8, kv_heads=2)
    found = {name: call() for name, call in rows.providers().items()}
    ours = found.pop("ivg_fast").view(rows.rows, rows.queries, 8, attention.HEAD_SIZE)
    assert len(found) == 3
    for name, theirs in found.items():
        is_folded = name == "sdpa, rows folded"
        by_row = theirs[0].transpose(0, 1).reshape(ours.shape) if is_folded else None
        theirs = theirs.transpose(1, 2) if by_row is None else by_row
        torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(theirs.roll(1, dims=-1), ours, atol=1e-2)


@pytest.mark.parametrize("sampler", [torch_samplers.inverse_cdf, torch_samplers.hierarchical])
def test_plain_samplers_draw_the_same_tokens(sampler: Callable[..., Any]) -> None:
    batch = ops.Batch(64, 2500, torch.float32, "cpu")
    ours = guided_sample(
        *batch.logits, weight=ops.WEIGHT, temperature=ops.TEMPERATURE, **batch.index
    )
    token, *measures = batch.theirs(sampler, batch.u)()
    same = token == ours.token_ids
    assert same.float().mean() > 0.95  # float32 sums may differ at an edge
    for theirs, mine in zip(
        measures, (ours.logprob, ours.base_logprob, ours.implicit_reward), strict=True
    ):
        torch.testing.assert_close(theirs[same], mine[same], atol=1e-3, rtol=1e-4)
    other = batch.theirs(sampler, 1 - batch.u)()[0]
    assert (other == ours.token_ids).float().mean() < 0.8  # the law is peaked


def test_kv_providers_move_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bench's own calls, kept instead of timed."""
    kept: dict[str, dict[str, harness.Call]] = {}

    class Kept:
        device = "cpu"
        uses_graphs = False

        def compare(self, kernel: str, x: Any, providers: Any, *_: Any, **__: Any) -> None:
            kept[kernel] = dict(providers)

    pools: list[torch.Tensor] = []
    new_pool = kv.new_pool
    monkeypatch.setattr(kv, "new_pool", lambda *args: pools.append(new_pool(*args)) or pools[-1])
    shape = dataclasses.replace(kv.CPU_POOLS, num_blocks=64)
    kv.writing(Kept(), shape, 40)
    by_us, _ = pools
    before = by_us.clone()
    kept["write_kv"]["ivg_fast"]()
    written = by_us.clone()
    by_us.copy_(before)
    kept["write_kv"]["index_put, same pool"]()
    assert torch.equal(by_us, written)
    assert not torch.equal(written, before)
    kept["write_kv"]["index_copy, pool by slot"]()
    pools.clear()
    kv.copying(Kept(), shape, 8)
    before = [pool.clone() for pool in pools]
    kept["copy_blocks"]["ivg_fast"]()
    copied = [pool.clone() for pool in pools]
    for pool, old in zip(pools, before, strict=True):
        pool.copy_(old)
    kept["copy_blocks"]["index_copy, pool by pool"]()
    assert all(map(torch.equal, pools, copied))
    assert not any(map(torch.equal, copied, before))


FAMILY = engine_cases.Family("gpt2", seed=engine_cases.fresh_seed())


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with FAMILY.engine() as engine:
        yield engine


GRID = [(g, s) for g in ("none", "implicit", "explicit") for s in ("implicit", "explicit")]


@pytest.mark.parametrize(("guidance", "scorer"), GRID)
def test_a_replay_runs_the_forwards_of_the_engine(
    engine: Engine, guidance: str, scorer: str
) -> None:
    params = SearchParams.cbs(max_tokens=9, guidance=guidance, scorer=scorer, ignore_eos=True)
    prompts, seeds = [[1, 2, 3], [4] * 20], [1, 2]
    plain = engine.generate(prompts, params, seeds=seeds)
    replay = Replay(engine)
    with replay.recording():
        outputs = engine.generate(prompts, params, seeds=seeds)
    assert [o.outputs for o in outputs] == [o.outputs for o in plain]
    assert replay.num_tokens == engine_tokens(outputs)
    assert replay.num_forwards["base"] == 9  # a prefill and 4 steps, a settle and 3 steps
    assert "forward" not in vars(engine._runners["base"])

    called: Counter[str] = Counter()
    handles = []
    for role, runner in engine._runners.items():
        count = lambda *_, role=role: called.update([role])  # noqa: E731
        handles.append(runner.network.register_forward_hook(count))
        for pool in runner.pools:
            pool.fill_(7.0)
    replay()
    for handle in handles:
        handle.remove()
    assert called == replay.num_forwards
    for runner in engine._runners.values():
        assert all(bool((pool == 7.0).all()) for pool in runner.pools)
    # The batches are copies: another run in between does not change them.
    ids = [forward.batch.input_ids.clone() for forward in replay.forwards]
    assert [o.outputs for o in engine.generate(prompts, params, seeds=seeds)] == [
        o.outputs for o in plain
    ]
    assert all(map(torch.equal, ids, [f.batch.input_ids for f in replay.forwards]))


def test_counted_tokens_of_the_baselines() -> None:
    roles = FAMILY.roles()
    value = roles.pop("value")
    models = (*roles.values(), ValueModel(value.backbone, value.score_head.weight))
    params = SearchParams.ivg(
        max_tokens=6, beam_width=2, num_candidates=2, chunk_length=3, ignore_eos=True
    )
    counts = {}
    for name, make in PROVIDERS.items():
        provider = make(*models)
        with counted_tokens(provider) as counts[name]:
            provider.generate([[1, 2, 3, 4, 5]], params)
        with counted_tokens(provider) as nothing:
            pass
        assert not nothing
    steering, scoring = 4 * (5 + 5), 4 * (5 + 3) + 4 * (5 + 6)
    expected = dict.fromkeys(("base", "tuned", "untuned"), steering) | {"value": scoring}
    assert counts["reference_style"] == expected
    (output,) = FAMILY.engine().generate([[1, 2, 3, 4, 5]], params, seeds=[0])
    assert counts["tuned_pytorch"] == engine_tokens([output])


def test_end_to_end_parts(tmp_path: Path) -> None:
    one = a_run("--quick", "--threads", "1")
    family = Imdb("cpu")
    e2e.search(one, family, 6, (1, 2))
    e2e.prompt(one, family, 2, (16, 32))
    e2e.ablation(one, family, (5, 18))
    found = {(r.kernel, r.x, r.provider, r.metric): r.y_50 for r in one.records}
    (ids,) = family.prompts(1)
    rows = len(ids) + 4 * 16 + 4  # a prompt, 4 steps of 16 rows, a settle of 4
    assert found["IVG", "prompts=1", "ivg_fast", "forwarded tokens, base"] == rows
    assert found["IVG", "prompts=1", "ivg_fast", "num_selections"] == 2
    assert found["IVG", "prompts=2", "bound: forwards alone", "time"] > 0
    assert found["IVG, prompt", "P=32", "tuned_pytorch", "time per token"] > 0
    response = "methods, response"
    assert found[response, "T=18", "EFT", "forwarded tokens"] == 3 * (len(ids) + 17)
    assert found[response, "T=18", "EFT", "model calls"] == 3 * 18
    for method in ("base", "EFT", "CBS, implicit", "CBS, explicit", "IVG"):
        kv_bytes = [found[response, x, method, "KV"] for x in ("T=5", "T=18")]
        assert 0 < kv_bytes[0] < kv_bytes[1]
    summary = e2e.summary_of(one)
    assert set(summary) == {
        "prompts=1: ivg_fast / bound",
        "prompts=2: ivg_fast / bound",
        "per token, P=32 / P=16",
    }
    names = {path.name for path in plots.draw(one.records, tmp_path)}
    assert "methods_response_kv_by_response_tokens.png" in names
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in tmp_path.iterdir())


def test_the_command_line(tmp_path: Path) -> None:
    csv = tmp_path / "scheduler.csv"
    argv = ["scheduler", "--rounds", "1", "--quick", "--threads", "1"]
    command = [sys.executable, "-m", "bench", *argv, "--out", str(csv)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert json.loads(done.stdout.splitlines()[-1])["bench"] == "scheduler"
    records = harness.read_csv(csv)
    assert {r.command for r in records} == {"python -m bench " + " ".join(argv)}
    assert all(np.isfinite(r.y_50) and r.device and r.versions for r in records)
    wrong = subprocess.run([*command[:3], "nothing"], capture_output=True, text=True, cwd=ROOT)
    assert wrong.returncode
    assert "usage" in wrong.stderr
    usage = subprocess.run([*command[:3], "--help"], capture_output=True, text=True, cwd=ROOT)
    assert (usage.returncode, usage.stderr) == (0, "")
    assert "  scheduler  " in usage.stdout


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rounds", "0"], "argument --rounds: must be at least 1, got 0"),
        (["--threads", "-1"], "argument --threads: must be at least 1, got -1"),
        (["--warm"], "unrecognized arguments: --warm"),
        (["--seconds", "1"], "unrecognized arguments: --seconds"),
    ],
)
def test_options_that_would_change_nothing_are_refused(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.parser_of(None).parse_args(["--rounds", "1", "--warm", "--seconds", "1"]).warm
    with pytest.raises(SystemExit, match="2"):
        run.parser_of(None, has_cold=False, has_limit=False).parse_args(argv)
    assert message in capsys.readouterr().err


def test_a_device_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = run.parser_of(None, has_cuda=True)
    for has_cuda in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_cuda=has_cuda: has_cuda)
        if has_cuda:
            assert parser.parse_args(["--device", "cuda"]).device == "cuda"
        else:
            with pytest.raises(SystemExit, match="2"):
                parser.parse_args(["--device", "cuda"])
    assert "no CUDA is here" in capsys.readouterr().err


def test_a_suite_of_nothing_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench all", "--quick", "--only", "ops_warm"])
    with pytest.raises(SystemExit, match="2"):
        suite.main()
    assert "--quick leaves out ops_warm" in capsys.readouterr().err


def test_what_there_is_no_time_for_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench scheduler", "--quick", "--seconds", "1e-9"])
    scheduler.main()
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert next(iter(last["left_out"])) == "requests=1 W=16 K=16 L=16"
    assert len(last["left_out"]) == len(scheduler.SHAPES)
    one = a_run("--seconds", "1e-9")
    family: Any = SimpleNamespace(prompts=lambda *_: [[1]], reference=None, tuned=None)
    e2e.search(one, family, 6, (1,))
    e2e.prompt(one, family, 6, (16, 32))
    e2e.candidates(one, family, 6, (2,))
    e2e.ablation(one, family, (5,))
    assert set(one.left_out) == {
        *("IVG prompts=1", "IVG, prompt P=16", "IVG, prompt P=32"),
        *("methods, candidates WK=4", "methods, response T=5"),
    }
    assert not one.records
    assert e2e.summary_of(one) == {}


@pytest.mark.parametrize(
    ("argv", "shapes"),
    [
        (["--vocab", "100"], [(16, 100)]),
        (["--rows", "2", "3"], [(2, 32_000), (3, 32_000), (2, 128_256), (3, 128_256)]),
        (["--rows", "2", "--vocab", "100"], [(2, 100)]),
        (["--quick"], list(ops.QUICK)),
    ],
)
def test_shapes_on_the_command_line(
    argv: list[str], shapes: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(ops, "measure", lambda _, rows, vocab, __: seen.append((rows, vocab)))
    monkeypatch.setattr(run.Run, "measure_limits", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["bench ops", "--no-isas", *argv])
    ops.main()
    assert seen == shapes


def test_the_readmes_have_the_tables_of_the_stored_results() -> None:
    for path, tables in report.TABLES.items():
        text = path.read_text(encoding="utf-8")
        for table in tables:
            new = table(tables_of_bench.RESULTS)
            assert report.spliced(text, new) == text
            begin, end = new.splitlines()[0], new.splitlines()[-1]
            edited = text.replace(new, new.replace("| ", "| x", 1))
            assert edited != text
            assert report.spliced(edited, new) == text
            with pytest.raises(SystemExit, match="must hold each once"):
                report.spliced(text.replace(end, ""), new)
            with pytest.raises(SystemExit, match="must hold each once"):
                report.spliced(text + begin, new)


def test_bounds_are_quotients_of_stored_medians(tmp_path: Path) -> None:
    one = a_run("--threads", "1")
    for kernel, x, seconds in (
        ("IVG", {"prompts": 1}, {"ivg_fast": 2.0, e2e.BOUND: 1.6, "reference_style": 5.0}),
        ("IVG, prompt", {"P": 50}, {"ivg_fast": 3.0, e2e.BOUND: 2.0}),
    ):
        for provider, value in seconds.items():
            one.add(kernel, provider, "time", "s", x, [value], "c")
    harness.write_csv(tmp_path / "e2e_cpu.csv", one.records)
    lines = tables_of_bench.bounds(tmp_path).splitlines()
    assert lines[4] == "| prompts at once: 1 | 2.00 s | 1.60 s | 1.25 | 5.00 s | 2.50 | 3.12 |"
    assert lines[5] == "| prompt tokens: 50 | 3.00 s | 2.00 s | 1.50 | | | |"


def test_a_missing_record_is_named(tmp_path: Path) -> None:
    for name in {row.file for row in report.ROWS}:
        harness.write_csv(tmp_path / f"{name}.csv", [])
    with pytest.raises(SystemExit, match=r"e2e_cpu.csv: 0 records of \('IVG', 'prompts=1'"):
        report.table(tmp_path)
