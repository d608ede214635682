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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ivg_fast.errors import NonFiniteLogitsError
from ivg_fast.graphs import EagerStep
from ivg_fast.models.attention import PagedContext
from ivg_fast.models.batch import StepBatch
from ivg_fast.models.runner import ModelRunner
from ivg_fast.ops.paged_attention import PagedPlan
from ivg_fast.params import SearchParams
from ivg_fast.static_forward import StaticForward
from ivg_fast.static_rows import StaticRows

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
    pytest.mark.skipif(
        torch.cuda.is_available(),
        reason="Triton's interpreter is off there",
    ),
]
SEED = fresh_seed()
# The interpreter takes milliseconds a program: one layer, one KV head.
SMALL = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}


def cases_of(rng: random.Random, family: Family) -> list[Case]:
    """Searches whose bursts have one key, but differ in all that may not be baked in. None ends
    early, so that the number of replays is known."""
    params = SearchParams.ivg(
        max_tokens=6,
        beam_width=1,
        num_candidates=2,
        chunk_length=3,
        n=2,
        logprobs=True,
        ignore_eos=True,
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
    forwards: list[RecordedStep] = []

    def make_step(static: StaticRows | StaticForward) -> RecordedStep:
        static.step()  # as before a capture
        step = RecordedStep(static.step)
        (steps if isinstance(static, StaticRows) else forwards).append(step)
        return step

    make_static(monkeypatch, make_step=make_step, backend="triton")
    cases, models = cases_of(rng, family), family.naive()
    found, num_near_ties = compare(run(family, cases), [c.solve(models) for c in cases], cases)
    assert not found, f"seed {SEED}\n" + "\n".join(found)
    assert num_near_ties <= 1
    assert len(steps) == 1
    assert steps[0].num_replays >= 5  # of three bursts at least
    assert len(forwards) == 4  # a role; the value settles too
    assert all(forward.num_replays >= 2 for forward in forwards)  # of two requests


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

    def make_step(static: StaticRows | StaticForward) -> EagerStep | RecordedStep:
        if isinstance(static, StaticForward):
            return EagerStep(static.step)
        bug(static)
        return RecordedStep(static.step)

    make_static(monkeypatch, make_step=make_step, backend="triton")
    cases, models = cases_of(rng, family), family.naive()
    try:
        outputs = run(family, cases)
    except NonFiniteLogitsError:  # of keys that nobody has written
        return
    found, _ = compare(outputs, [case.solve(models) for case in cases], cases)
    assert found


def values_alone(self, _layer, query, _key, value, **_options) -> torch.Tensor:
    """In attention's place, whose kernels are replayed above: each head's own value."""
    group = query.shape[1] // value.shape[1]
    return value[:, :, None].expand(-1, -1, group, -1).flatten(1, 2)


# On the CPU, and only there, the experts of gpt_oss are a loop over those in use.
@pytest.mark.parametrize("name", [name for name in TINY_MODELS if name != "gpt_oss"])
def test_a_models_step_can_be_captured(monkeypatch, name: str) -> None:
    """No operator of a forward reads the device, and a replay follows its buffers."""
    runner = ModelRunner(tiny_model(name, seed=1), role="base", self_test=False)
    monkeypatch.setattr(PagedContext, "attend_tokens", values_alone)
    batch = StepBatch(
        input_ids=torch.tensor([[3, 1, 4, 1]]),
        position_ids=torch.tensor([[2, 4, 3, 1]]),
        slot_mapping=torch.arange(4, dtype=torch.int32),
        plan=PagedPlan("cpu", num_rows=4, num_tokens=4, table_width=2, tile_tokens=1),
        backend="triton",
    )
    out = torch.zeros(4, runner.logits_width)
    with torch.inference_mode():
        step = RecordedStep(lambda: out.copy_(runner.forward(batch)))
        for ids, positions in (([3, 1, 4, 1], [2, 4, 3, 1]), ([2, 7, 1, 8], [9, 3, 1, 40])):
            batch.input_ids.copy_(torch.tensor([ids]))
            batch.position_ids.copy_(torch.tensor([positions]))
            step.replay()
            torch.testing.assert_close(out, runner.forward(batch), rtol=1e-5, atol=1e-5)
    runner.close()


def test_a_model_that_looks_at_its_positions_cannot(monkeypatch) -> None:
    """The control: what keeps rotary embeddings of the "dynamic" kind from being captured."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = tiny_model("llama", seed=1, rope_parameters=rope)
    runner = ModelRunner(model, role="base", self_test=False)
    monkeypatch.setattr(PagedContext, "attend_tokens", values_alone)
    plan = PagedPlan("cpu", num_rows=2, num_tokens=2, table_width=2, tile_tokens=1)
    ids, slots = torch.tensor([[3, 1]]), torch.arange(2, dtype=torch.int32)
    batch = StepBatch(ids, ids, slots, plan, backend="triton")
    with torch.inference_mode(), pytest.raises(WouldWait):
        RecordedStep(lambda: runner.forward(batch))
    runner.close()


class _Strangers(TorchDispatchMode):
    """Operators that make or read a tensor of the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        leaves = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        if any(leaf.is_cpu for leaf in leaves):
            self.found.append(str(func))
        return result


@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_models_step_stays_on_its_device(monkeypatch, name: str) -> None:
    """A tensor that is made on the host would be copied to the GPU in each step, and waited for. On
    the meta device no operator can read a value either."""
    monkeypatch.setattr(PagedContext, "attend_tokens", values_alone)
    model = tiny_model(name, dtype=torch.bfloat16)  # in float32 experts have another form there
    runner = ModelRunner(model.to("meta"), role="base", self_test=False)
    ids = torch.zeros(1, 4, dtype=torch.int64, device="meta")
    plan = PagedPlan("cpu", num_rows=4, num_tokens=4, table_width=2, tile_tokens=1)
    batch = StepBatch(ids, ids, ids[0].int(), plan, backend="triton")
    with torch.inference_mode(), _Strangers() as strangers:
        assert runner.forward(batch).shape == (4, runner.logits_width)
        assert strangers.found == []
        torch.zeros(2).to("meta")  # the control
        assert strangers.found


def test_a_step_that_waits_is_refused() -> None:
    lengths = torch.tensor([1, 2])
    with pytest.raises(WouldWait), recording([]):
        int(lengths.sum())
