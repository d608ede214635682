# SPDX-License-Identifier: Apache-2.0
"""The forms of tuned_pytorch that are for a GPU, on the CPU.

A CUDA graph is stood in for by a recording of the operators that a forward runs: like the graph it
holds on to everything that Python decided, and like the graph it cannot be made where something
reads a tensor's value.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from baseline_cases import PROMPTS, Family
from tiny_models import tiny_model
from torch.fx.experimental.proxy_tensor import make_fx

from bench.baselines import TunedPyTorchIVG, ValueModel, cached_role, fused_modules, tree_search
from bench.baselines.common import private_view
from bench.baselines.step_graphs import Recorded, StepGraphs
from bench.imdb import counted_tokens
from ivg_fast.params import SearchParams

GRID = [("none", "explicit"), ("implicit", "implicit"), ("implicit", "explicit")]


class RecordedGraphs(StepGraphs):
    """Graphs whose operators run on the CPU."""

    num_recorded = 0

    def _record(self, inputs: tuple[torch.Tensor, ...]) -> Recorded:
        type(self).num_recorded += 1
        operators = make_fx(lambda *x: self._forward(*x))(*inputs)
        outputs = self._forward(*inputs)

        def run() -> None:
            for output, new in zip(outputs, operators(*inputs), strict=True):
                output.copy_(new)

        return Recorded(inputs, outputs, run)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def family(request: pytest.FixtureRequest) -> Family:
    return Family(37, request.param)


def provider(family: Family, value: Any = None, **options: Any) -> TunedPyTorchIVG:
    value = value or ValueModel(family.models["value"].base_model, family.head)
    roles = (family.models[role] for role in ("base", "tuned", "untuned"))
    return TunedPyTorchIVG(*roles, value, **options)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps run through recorded operators, with the modules and the attention for a GPU."""

    def attention_for(_: torch.device) -> str:
        return gpu_attention()

    gpu_attention = lambda: fused_modules.attention_for(torch.device("cuda"))  # noqa: E731
    monkeypatch.setattr("bench.baselines.tuned_pytorch.attention_for", attention_for)
    monkeypatch.setattr(cached_role, "can_pack", lambda *_: False)
    monkeypatch.setattr(RecordedGraphs, "num_recorded", 0)


def with_graphs(one: TunedPyTorchIVG) -> TunedPyTorchIVG:
    for role in one._roles.values():
        fused_modules.use_fused_modules(role.model)
        role._graphs = RecordedGraphs(role._at_slots)
    return one


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize(
    ("name", "guidance", "scorer", "tree_slots"),
    [
        ("llama", "implicit", "explicit", tree_search.MAX_TREE_SLOTS),
        ("gpt2", "implicit", "implicit", tree_search.MAX_TREE_SLOTS),
        ("gpt2", "none", "explicit", 0),  # each child in a row of its own
    ],
)
def test_recorded_steps_draw_the_same(
    name: str, guidance: str, scorer: str, tree_slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tree_search, "MAX_TREE_SLOTS", tree_slots)
    family = Family(37, name)
    graphed = with_graphs(provider(family, use_constant_shapes=True))
    params = SearchParams.cbs(
        max_tokens=8, guidance=guidance, scorer=scorer, temperature=0.7, chunk_length=3
    )
    expected = family.provider("tuned_pytorch", eos=False).generate(PROMPTS, params, seed=4)
    got = graphed.generate(PROMPTS, params, seed=4)
    assert [r.token_ids for r in got] == [r.token_ids for r in expected]
    assert [r.score for r in got] == pytest.approx([r.score for r in expected], abs=1e-4)
    before = RecordedGraphs.num_recorded
    assert before
    assert graphed.generate(PROMPTS, params, seed=4) == got
    assert RecordedGraphs.num_recorded == before  # replayed, not made again
    graphed.drop_caches()
    assert graphed.generate(PROMPTS, params, seed=4) == got
    assert RecordedGraphs.num_recorded > before


@pytest.mark.usefixtures("recorded")
def test_a_recording_notices_what_a_graph_would_bake_in() -> None:
    """The control: with the first slot as a number every replay writes where the first one did."""
    family = Family(37)
    one = with_graphs(provider(family, use_constant_shapes=True))

    def baked(role: Any, start: int) -> Any:
        def at_slots(ids: Any, positions: Any, mask: Any, slots: Any) -> Any:
            role.cache.slots = torch.arange(start, start + ids.shape[1])
            outputs = role.logits(ids, positions, mask)
            role.cache.slots = None
            return outputs

        return at_slots

    for role in one._roles.values():
        role._graphs = RecordedGraphs(baked(role, 5))
    params = SearchParams.ivg(max_tokens=8, temperature=0.7, chunk_length=4)
    expected = family.provider("tuned_pytorch", eos=False).generate(PROMPTS, params, seed=3)
    assert one.generate(PROMPTS, params, seed=3) != expected


def test_folded_attention_is_eager_attention() -> None:
    model = tiny_model("llama", seed=torch.seed() % 2**31)
    assert model.config.num_attention_heads != model.config.num_key_value_heads
    torch.manual_seed(torch.seed() % 2**31)
    ids = torch.randint(97, (3, 7))
    hidden = torch.rand(3, 1, 7, 7) < 0.4
    hidden[..., 0] = False
    mask = torch.zeros(hidden.shape).masked_fill_(hidden, torch.finfo(torch.float32).min)
    views = {
        name: private_view(model, name, torch.device("cpu"), torch.float32)
        for name in ("eager", fused_modules.attention_for(torch.device("cuda")))
    }
    fused_modules.use_fused_modules(views[fused_modules.FOLDED])
    kinds = {type(m).__name__ for m in views[fused_modules.FOLDED].modules()}
    assert "FusedRMSNorm" in kinds
    assert "LlamaRMSNorm" not in kinds
    expected, got = (view(ids, attention_mask=mask).logits for view in views.values())
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)
    other = views["eager"](ids, attention_mask=mask.roll(1, -1)).logits
    assert not torch.allclose(other, expected, atol=1e-2)
    assert fused_modules.attention_for(torch.device("cpu")) == "eager"


@pytest.mark.parametrize(("guidance", "scorer"), [*GRID, ("explicit", "explicit")])
def test_a_value_on_the_trunk_of_tuned_costs_it_nothing(
    family: Family, guidance: str, scorer: str
) -> None:
    trunk = family.models["tuned"].base_model
    apart = private_view(trunk, "eager", torch.device("cpu"), torch.float32)
    params = SearchParams.cbs(
        max_tokens=12, guidance=guidance, scorer=scorer, temperature=0.7, ignore_eos=True
    )
    results, counts = [], []
    for backbone in (trunk, apart):
        one = provider(family, ValueModel(backbone, family.head))
        with counted_tokens(one) as counted:
            results.append(one.generate(PROMPTS, params, seed=7))
        counts.append(counted)
    shared, expected = results
    assert [r.token_ids for r in shared] == [r.token_ids for r in expected]
    assert [r.score for r in shared] == pytest.approx([r.score for r in expected], abs=1e-4)
    rides = (guidance, scorer) == ("implicit", "explicit")
    assert ("value" in counts[0]) != (rides or scorer == "implicit")
    assert ("value" in counts[1]) == (scorer == "explicit")


def test_compiled_steps_draw_the_same_and_are_compiled_once_a_shape() -> None:
    family = Family(37)
    compiled = provider(family, use_constant_shapes=True)
    shapes: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        shapes.append(len(inputs))
        return graph.forward

    torch._dynamo.reset()
    for role in compiled._roles.values():
        role._forward = torch.compile(role.logits, backend=backend, dynamic=False)
        role._is_compiled = True
    params = SearchParams.ivg(max_tokens=13, temperature=0.7, chunk_length=4)
    expected = family.provider("tuned_pytorch", eos=False).generate(PROMPTS, params, seed=3)
    got = compiled.generate(PROMPTS, params, seed=3)
    assert [r.token_ids for r in got] == [r.token_ids for r in expected]
    # The first chunk, later chunks, a trunk's last token; models of one shape share the code.
    assert len(shapes) == 3
    compiled.generate(PROMPTS, params, seed=4)
    assert len(shapes) == 3
    torch._dynamo.reset()


def test_compiling_needs_constant_shapes(family: Family) -> None:
    with pytest.raises(ValueError, match="use_constant_shapes"):
        provider(family, compile=True)
