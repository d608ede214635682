# SPDX-License-Identifier: Apache-2.0
"""Decode steps under the rules of a CUDA graph: captured once, replayed for all bursts of a kind on
frozen addresses, numbers and branches."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_cases import Case, Family, compare, fresh_seed, random_prompt
from recorded_step import RecordedStep, WouldWait, recording
from test_static_burst import make_static
from tiny_models import TINY_MODELS, tiny_model

from ivg_fast.errors import NonFiniteLogitsError
from ivg_fast.models.batch import StepBatch
from ivg_fast.models.runner import ModelRunner
from ivg_fast.ops.paged_attention import PagedPlan
from ivg_fast.params import SearchParams
from ivg_fast.static_rows import StaticRows

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
SEED = fresh_seed()
# The interpreter takes milliseconds a program: one layer, one KV head.
SMALL = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}


def cases_of(rng: random.Random, family: Family) -> list[Case]:
    """Searches whose bursts have one key, but differ in all that may not be baked in."""
    params = SearchParams.ivg(
        max_tokens=6, beam_width=1, num_candidates=2, chunk_length=3, n=2, logprobs=True
    )
    cold = replace(params, guidance_weight=0.4, temperature=0.6, max_tokens=5)
    return [Case(random_prompt(rng, family, 14), p, rng.randrange(2**64)) for p in (params, cold)]


def run(family: Family, cases: list[Case]) -> list[Any]:
    with family.engine(max_burst_steps=4) as engine:
        return [
            engine.generate([case.input], [case.params], seeds=[case.seed])[0] for case in cases
        ]


def test_replays_return_what_the_naive_search_returns(monkeypatch) -> None:
    rng = random.Random(f"{SEED} replays")
    family = Family("llama", seed=SEED, overrides=SMALL)
    steps: list[RecordedStep] = []

    def make_step(rows: StaticRows) -> RecordedStep:
        steps.append(RecordedStep(rows.step))
        return steps[-1]

    make_static(monkeypatch, make_step=make_step, backend="triton")
    cases, models = cases_of(rng, family), family.naive()
    found, num_near_ties = compare(run(family, cases), [c.solve(models) for c in cases], cases)
    assert not found, f"seed {SEED}\n" + "\n".join(found)
    assert num_near_ties <= 1
    assert len(steps) == 1
    assert steps[0].num_replays >= 5  # of three bursts at least


def baked_in(self: StaticRows) -> None:
    """Takes the numbers of its first burst for everybody's."""
    temperature = float(self._packed.views["temperature"].mean())
    for segment in self.segments:
        segment.arguments["temperature"] = temperature


def made_anew(self: StaticRows) -> None:
    """Writes the slots into a tensor that the next replay does not read."""
    slots = self.state.slot_mapping
    for batch in self._batches.values():
        object.__setattr__(batch, "slot_mapping", slots.clone())


@pytest.mark.parametrize("bug", [baked_in, made_anew])
def test_planted_bugs_are_seen(monkeypatch, bug) -> None:
    """Without the rules of a graph the same code is right, or the test would show nothing."""
    rng = random.Random(f"{SEED} planted")
    family = Family("llama", seed=SEED, overrides=SMALL)

    def make_step(rows: StaticRows) -> RecordedStep:
        bug(rows)
        return RecordedStep(rows.step)

    make_static(monkeypatch, make_step=make_step, backend="triton")
    cases, models = cases_of(rng, family), family.naive()
    try:
        outputs = run(family, cases)
    except NonFiniteLogitsError:  # of keys that nobody has written
        return
    found, _ = compare(outputs, [case.solve(models) for case in cases], cases)
    assert found


@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_models_step_can_be_captured(name: str) -> None:
    """No operator of a forward reads the device, and a replay follows its buffers."""
    if name == "gpt_oss":
        pytest.skip("its experts are a loop over those in use, on the CPU alone")
    runner = ModelRunner(tiny_model(name, seed=1), role="base", num_blocks=8, self_test=False)
    lens = torch.tensor([3, 5, 4, 2], dtype=torch.int32)
    plan = PagedPlan("cpu", num_rows=4, num_tokens=4, table_width=2, tile_tokens=1)
    table = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]], dtype=torch.int32)
    rows = {"block_table": table.numpy(), "query_start_loc": torch.arange(5).int().numpy()}
    zeros = torch.zeros(4, dtype=torch.int32).numpy()
    for pool in runner.pools:
        pool.normal_()
    plan.update(
        **rows, prompt_lens=lens.numpy(), response_lens=zeros, response_block_start=zeros + 1
    )
    batch = StepBatch(
        input_ids=torch.tensor([[3, 1, 4, 1]]),
        position_ids=(lens.long() - 1)[None],
        slot_mapping=torch.tensor([2, 32 + 4, 64 + 3, 96 + 1], dtype=torch.int32),
        plan=plan,
        backend="triton",
    )
    out = torch.zeros(4, runner.logits_width)
    with torch.inference_mode():
        step = RecordedStep(lambda: out.copy_(runner.forward(batch)))
        for ids in ([3, 1, 4, 1], [2, 7, 1, 8]):
            batch.input_ids.copy_(torch.tensor([ids]))
            step.replay()
            torch.testing.assert_close(out, runner.forward(batch), rtol=1e-5, atol=1e-5)
    runner.close()


def test_a_step_that_waits_is_refused() -> None:
    lengths = torch.tensor([1, 2])
    with pytest.raises(WouldWait), recording([]):
        int(lengths.sum())
