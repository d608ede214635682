# SPDX-License-Identifier: Apache-2.0
"""The engine on a GPU: what the naive search returns on the CPU, with graphs and without, and no
wait inside a burst."""

from __future__ import annotations

import asyncio
import io
import logging
import random
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import (
    SHAPES,
    Case,
    Family,
    cells_of,
    compare,
    fresh_seed,
    is_near_tie,
    random_case,
    random_cases,
    random_prompt,
    run_arrivals,
    run_engine,
)
from naive_search import NaiveResult

from ivg_fast import (
    AsyncEngine,
    CapacityError,
    Engine,
    EngineConfig,
    InvalidParameterError,
    SearchParams,
)
from ivg_fast.assets import imdb_path
from ivg_fast.burst import BurstRunner
from ivg_fast.graphs import EagerStep, GraphedStep
from ivg_fast.static_burst import StaticBursts
from ivg_fast.static_rows import StaticRows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SEED = fresh_seed()
EOS = {"gpt2": 28, "llama": 7, "mistral": 28, "qwen3": 13, "gemma2": 0}
EXAMPLES = Path(__file__).parents[1] / "examples"
BUNDLED = [str(imdb_path() / role) for role in ("base", "tuned", "untuned", "value")]


def family(shape: str, value: str = "vocabulary", **overrides: Any) -> Family:
    return Family(shape, seed=SEED, eos_token_id=EOS[shape], value=value, overrides=overrides)


def solved(of: Family) -> tuple[list[Case], list[NaiveResult]]:
    rng, models = random.Random(f"{SEED} {of.shape} {of.value}"), of.naive()
    cases = random_cases(rng, of, models, **cells_of(of.value))
    return cases, [case.solve(models) for case in cases]


def assert_same(outputs, results, cases, allowed_ties: int = 3) -> None:
    found, num_near_ties = compare(outputs, results, cases)
    assert not found, f"seed {SEED}, {len(found)} of {len(cases)} differ\n" + "\n".join(found)
    assert num_near_ties <= allowed_ties


def steps_of(engine: Engine) -> list[Any]:
    """What the engine replays."""
    bursts: Any = engine._loop._burst._make
    assert isinstance(bursts, StaticBursts)
    return [step for _, step in bursts._kept.values() if step is not None]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_whole_grid_with_graphs(shape: str) -> None:
    cases, results = solved(family(shape))
    with family(shape).engine(device="cuda", max_burst_steps=8) as engine:
        outputs = run_engine(engine, cases)
        assert_same(outputs, results, cases)
        steps = steps_of(engine)
    assert steps
    assert {type(step) for step in steps} == {GraphedStep}
    assert {output.stats.num_host_syncs for output in outputs} == {0}


@pytest.mark.parametrize("burst", [1, 3, 16])
def test_every_burst_length_gives_the_same(burst: int) -> None:
    cases, results = solved(family("llama"))
    with family("llama").engine(device="cuda", max_burst_steps=burst) as engine:
        assert_same(run_engine(engine, cases), results, cases)
        for case, result in zip(cases, results, strict=True):  # one at a time: other buckets
            assert_same(run_engine(engine, [case]), [result], [case])


@pytest.mark.parametrize("value", ["scalar", "trunk", "scalar trunk", "text"])
def test_other_values(value: str) -> None:
    cases, results = solved(family("llama", value))
    with family("llama", value).engine(device="cuda", max_burst_steps=4) as engine:
        assert_same(run_engine(engine, cases), results, cases)


def test_arrivals_in_between() -> None:
    cases, results = solved(family("gpt2"))
    rng = random.Random(f"{SEED} arrivals")
    with family("gpt2").engine(device="cuda", max_burst_steps=4, max_prefill_tokens=9) as engine:
        assert_same(run_arrivals(engine, cases, rng), results, cases)


def test_graphs_change_nothing() -> None:
    """Bit by bit: the same kernels on the same rows."""
    cases, _ = solved(family("llama"))
    outputs = []
    for cuda_graphs in (True, False):
        with family("llama").engine(device="cuda", cuda_graphs=cuda_graphs) as engine:
            outputs.append(run_engine(engine, cases))
            kind = GraphedStep if cuda_graphs else EagerStep
            assert {type(step) for step in steps_of(engine)} == {kind}
    for with_graphs, without in zip(*outputs, strict=True):
        assert with_graphs.outputs == without.outputs
        assert with_graphs.stats == without.stats


@pytest.mark.parametrize("value", ["vocabulary", "trunk"])
def test_no_wait_inside_a_burst(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """torch itself refuses every wait from a burst's first launch to the reading of its result."""
    cases, results = (some[:6] for some in solved(family("llama", value)))
    run, read = BurstRunner.run, StaticRows.read
    num_bursts = 0

    def guarded(self: BurstRunner, plan: Any, requests: Any, prefill: Any, history: Any) -> Any:
        nonlocal num_bursts
        if not requests:
            return run(self, plan, requests, prefill, history)
        num_bursts += 1
        torch.cuda.set_sync_debug_mode("error")
        try:
            return run(self, plan, requests, prefill, history)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def reading(self: StaticRows) -> Any:
        torch.cuda.set_sync_debug_mode("default")
        return read(self)

    with family("llama", value).engine(device="cuda", max_burst_steps=4) as engine:
        run_engine(engine, cases)  # compiles and captures
        monkeypatch.setattr(BurstRunner, "run", guarded)
        monkeypatch.setattr(StaticRows, "read", reading)
        assert_same(run_engine(engine, cases), results, cases)
    assert num_bursts > 5
    torch.cuda.set_sync_debug_mode("error")  # the control: it does refuse
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            torch.ones(1, device="cuda").item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_model_that_waits_runs_eagerly_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """Rotary embeddings of the "dynamic" kind look at the positions on the host."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    of = Family("llama", seed=SEED, overrides={"rope_parameters": rope})
    rng = random.Random(f"{SEED} waits")
    case = random_case(rng, of, "none", "none", max_tokens=9, chunk_length=None, ignore_eos=True)
    result = case.solve(of.naive())
    with caplog.at_level(logging.WARNING, "ivg_fast"), of.engine(device="cuda") as engine:
        (output,) = run_engine(engine, [case])
        assert {type(step) for step in steps_of(engine)} == {EagerStep}
    assert_same([output], [result], [case])
    assert "without a CUDA graph: the models wait for the GPU" in caplog.text
    assert output.stats.num_host_syncs >= 9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_plain_pytorch(dtype: torch.dtype) -> None:
    """log-probabilities of what was drawn against float64, beside transformers' own forward."""
    of, rng = family("llama"), random.Random(f"{SEED} half")
    prompts = [random_prompt(rng, of) for _ in range(8)]
    params = SearchParams(max_tokens=24, ignore_eos=True, seed=3)
    with of.engine(device="cuda", dtype=dtype) as engine:
        outputs = engine.generate(prompts, params)
    exact = of.roles()["base"].double()
    plain = of.roles()["base"].to("cuda", dtype)
    ours, theirs = [], []
    for prompt, output in zip(prompts, outputs, strict=True):
        response = output.outputs[0].token_ids
        ids = torch.tensor([prompt + response])
        wanted = logprobs(exact, ids, len(prompt))
        ours.append(output.outputs[0].base_logprob - wanted)
        theirs.append(logprobs(plain, ids.cuda(), len(prompt)) - wanted)
    error, allowed = (torch.tensor(e).square().mean().sqrt() for e in (ours, theirs))
    assert error <= 2 * allowed + 1e-3


@torch.inference_mode()
def logprobs(model: Any, ids: torch.Tensor, prompt_len: int) -> float:
    """log p of the tokens behind the prompt, summed in float64."""
    rows = model(ids, use_cache=False).logits[0, prompt_len - 1 : -1].double().log_softmax(-1)
    return float(rows.gather(1, ids[0, prompt_len:, None]).sum())


def test_an_async_engine() -> None:
    """The engine on a thread of its own, clients that come together."""
    cases, results = solved(family("llama"))
    kept = [i for i, case in enumerate(cases) if case.params.scorer != "callable"]

    async def serve(engine: Engine) -> list[Any]:
        served = AsyncEngine(engine)
        try:
            return await asyncio.gather(
                *(
                    served.generate(cases[i].input, cases[i].params, seed=cases[i].seed)
                    for i in kept
                )
            )
        finally:
            await served.shutdown()

    outputs = asyncio.run(serve(family("llama").engine(device="cuda", max_burst_steps=4)))
    assert_same(outputs, [results[i] for i in kept], [cases[i] for i in kept])


def test_nan_logits_fail_their_request_alone() -> None:
    of, rng = family("gpt2"), random.Random(f"{SEED} nan")
    cases = [random_case(rng, of, "implicit", "none", max_tokens=9) for _ in range(3)]
    poison = cases[1].prompt[-1]
    results = [case.solve(of.naive()) for case in cases]
    with of.engine(device="cuda") as engine:
        with torch.no_grad():
            engine._runners["tuned"].network.get_input_embeddings().weight[poison] = torch.nan
        outputs = run_arrivals(engine, cases, rng)
        assert type(outputs[1]).__name__ == "NonFiniteLogitsError"
        free = [
            i
            for i, case in enumerate(cases)
            if poison not in case.prompt
            and all(poison not in o.token_ids for o in results[i].outputs)
            and not is_near_tie(results[i])
        ]
        for i in free:
            assert_same([outputs[i]], [results[i]], [cases[i]])
        engine.check_integrity()


def test_from_pretrained_and_what_does_not_fit() -> None:
    params = SearchParams.ivg(max_tokens=20, seed=1)
    with Engine.from_pretrained(*BUNDLED) as engine:
        (expected,) = engine.generate("I saw this film", params)
    with Engine.from_pretrained(*BUNDLED, device="cuda") as engine:
        engine.warmup()
        assert engine._runners["base"].device == torch.device("cuda", torch.cuda.current_device())
        (output,) = engine.generate("I saw this film", params)
    assert output.outputs[0].token_ids == expected.outputs[0].token_ids
    assert output.stats == expected.stats
    with pytest.raises(CapacityError, match=r"are free: at most \d+ fit"):
        Engine.from_pretrained(
            BUNDLED[0], device="cuda", config=EngineConfig(num_blocks=2**31 // 16 - 1)
        )
    with pytest.raises(InvalidParameterError, match="device must be below cuda:"):
        Engine.from_pretrained(BUNDLED[0], device="cuda:63")


@pytest.mark.parametrize(
    ("name", "arguments", "text", "word"),
    [
        ("own_loop", BUNDLED, "I saw\nThe plot of\n", "The plot of"),
        ("custom_value", [BUNDLED[0], "I saw this film"], "", "selections"),
    ],
)
def test_examples(name, arguments, text, word, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--device", "cuda", *arguments])
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert word in capsys.readouterr().out
