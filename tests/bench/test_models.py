# SPDX-License-Identifier: Apache-2.0
"""`python -m bench models`: its shapes, bounds and providers, and how it reads a profile."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from tiny_models import tiny_model

from bench import model_shapes, models, run, step_profile
from bench.model_family import SEARCHES, ModelFamily, needed_blocks, request
from bench.model_shapes import FAMILIES, KVShape
from ivg_fast import _C

BFLOAT16 = torch.bfloat16


def a_run(*argv: str) -> run.Run:
    options = run.parser_of(None, has_cuda=True).parse_args(argv)
    one = run.Run("models", options, argv)
    one.limits = {"copy": 2.0, "read": 2.0}
    return one


# As their authors and the released checkpoints have them.
PARAMETERS = {
    "llama-2-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "gpt2-large": 774_030_080,
    "gpt2": 124_439_808,
}


@pytest.mark.parametrize("shape", PARAMETERS)
def test_shapes_have_the_parameters_of_the_real_models(shape: str) -> None:
    assert model_shapes.num_parameters(shape) == PARAMETERS[shape]


def test_streamed_weights_are_all_but_the_tables() -> None:
    hidden, vocab = 4096, 32_000
    assert model_shapes.streamed_bytes("llama-2-7b") == 2 * (
        PARAMETERS["llama-2-7b"] - hidden * vocab
    )
    # Tied: the embedding is the head. GPT-2's positions are a table.
    assert model_shapes.streamed_bytes("llama-3.2-1b") == 2 * PARAMETERS["llama-3.2-1b"]
    assert model_shapes.streamed_bytes("gpt2") == 2 * (PARAMETERS["gpt2"] - 1024 * 768)
    assert model_shapes.streamed_bytes("gpt2", torch.float32) == 4 * (
        PARAMETERS["gpt2"] - 1024 * 768
    )


def test_keys_and_values() -> None:
    kib = {shape: model_shapes.kv_shape(shape).bytes_per_token() / 1024 for shape in PARAMETERS}
    assert (kib["llama-2-7b"], kib["llama-3-8b"], kib["gpt2"]) == (512, 128, 36)
    assert model_shapes.kv_shape("llama-3.2-1b") == KVShape(16, 8, 64)


def test_the_bound_of_a_step() -> None:
    common = {"prompt": 256, "response": 48}
    weights, alone = model_shapes.step_bytes(
        FAMILIES["llama2"], **common, beam_width=1, num_candidates=1
    )
    assert weights == 3 * model_shapes.streamed_bytes("llama-2-7b")
    per_token = 3 * 512 * 1024
    assert alone == per_token * (256 + 24 + 8)
    _, searched = model_shapes.step_bytes(
        FAMILIES["llama2"], **common, beam_width=4, num_candidates=4
    )
    assert searched == per_token * (256 + 4 * 24 + 16 * 8)
    # performance.md: 13.5 ms at 3 TB/s, tables included.
    assert weights / 3e12 * 1e3 == pytest.approx(13.2, abs=0.1)


def test_a_request_needs_what_the_scheduler_reserves() -> None:
    for wk, (width, children) in SEARCHES.items():
        params = request("llama2", wk, 48)
        assert params.pool_size == wk == width * children
        num_blocks = needed_blocks(params, 250)
        for size, fits in ((num_blocks, True), (num_blocks - 1, False)):
            scheduler = _C.Scheduler(
                num_blocks=size, num_roles=4, max_num_rows=64, max_burst_steps=16
            )
            add = {
                "prompt_lens": [250] * 4,
                "step_roles": 0b0111,
                "settle_roles": 0b0111,
                "beam_width": width,
                "num_candidates": children,
                "chunk_length": params.chunk_length or 0,
                "max_tokens": 48,
                "has_scorer": params.scorer != "none",
            }
            if params.chunk_length is None:
                del add["chunk_length"]
            if fits:
                scheduler.add_request(**add)
            else:
                with pytest.raises(Exception, match="block"):
                    scheduler.add_request(**add)


@pytest.fixture(scope="module", params=["tiny-llama", "tiny-gpt2"])
def family(request: pytest.FixtureRequest) -> ModelFamily:
    return ModelFamily(request.param, "cpu", torch.float32)


def test_providers_share_weights_and_leave_the_models_alone(family: ModelFamily) -> None:
    before = {role: model.config._attn_implementation for role, model in family.models.items()}
    with family.engine(4, 20, 9) as engine:
        runners = engine._runners
        pools = sum(pool.nbytes for runner in runners.values() for pool in runner.pools)
        addresses = {p.data_ptr() for model in family.models.values() for p in model.parameters()}
        for role, model in family.models.items():
            own = {p.data_ptr() for p in runners[role].model.parameters()}
            assert own == {p.data_ptr() for p in model.parameters()}
        assert not runners["value"].pools  # it rides on the tuned guide
        assert pools == sum(
            2 * runner.num_blocks * shape.num_layers * shape.num_heads * 16 * shape.head_size * 4
            for role, runner in runners.items()
            if role != "value"
            for shape in [model_shapes.kv_shape(FAMILIES[family.name].roles[role])]
        )
        for name in ("tuned_pytorch", "reference_style"):
            baseline = family.baseline(name)
            views = getattr(baseline, "_models", None) or {
                role: cached.model for role, cached in baseline._roles.items()
            }
            for view in views.values():
                assert {p.data_ptr() for p in view.parameters()} <= addresses
    assert before == {r: m.config._attn_implementation for r, m in family.models.items()}
    logits = [model(torch.tensor([[5, 6, 7]])).logits for model in family.models.values()]
    assert not torch.allclose(logits[0], logits[1])
    assert not torch.allclose(logits[1], logits[2])


def test_every_provider_at_every_number_of_candidates(
    family: ModelFamily, capsys: pytest.CaptureFixture[str]
) -> None:
    one = a_run()
    places = models.Places(one, family, num_prompt=20, num_tokens=9)
    models.compare(places, (4, 1), can_compile=False)
    assert not one.failed
    assert not one.left_out
    providers = {models.OURS, models.TUNED, models.REFERENCE, models.BOUND, models.BOUND_KV}
    for wk in ("WK=4", "WK=1"):
        assert providers <= set(places.steps_ms[wk])
        found = {r.metric: r for r in one.records if (r.x, r.provider) == (wk, models.OURS)}
        assert {"time", "time per step", "tokens", "num_host_syncs"} <= set(found)
        num_chunks = 1 if wk == "WK=1" else -(-9 // places.chunk_length)
        assert found["num_selections"].y_50 == num_chunks
    weights = sum(
        model_shapes.streamed_bytes(shape, torch.float32)
        for shape in FAMILIES[family.name].roles.values()
    )
    assert places.steps_ms["WK=1"][models.BOUND] == pytest.approx(weights / 2e9 * 1e3)
    ratios = models.ratios(places.steps_ms)
    own = places.steps_ms["WK=4"][models.OURS]
    assert ratios["WK=4"]["tokens/s a sequence"] == pytest.approx(1e3 / own, abs=0.1)
    assert "tuned_pytorch / ivg_fast" in ratios["WK=1"]


def test_a_provider_that_fails_is_named_and_the_others_run(
    family: ModelFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory, wanted 3 GiB\nmore")

    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("of the engine")

    monkeypatch.setattr(models.ReferenceStyleIVG, "generate", no_memory)
    monkeypatch.setattr(ModelFamily, "engine", broken)
    one = a_run()
    places = models.Places(one, family, num_prompt=8, num_tokens=6)
    models.compare(places, (1,), can_compile=False)
    kernel = f"IVG, {family.name}"
    assert one.failed == {f"{kernel}: ivg_fast": "ZeroDivisionError: of the engine"}
    why = "OutOfMemoryError: out of memory, wanted 3 GiB"
    assert one.left_out == {f"{kernel} WK=1: reference_style": why}
    assert models.TUNED in places.steps_ms["WK=1"]
    assert models.ratios(places.steps_ms) == {}


def test_what_would_take_too_long_is_left_out(family: ModelFamily) -> None:
    one = a_run("--seconds", "1e-3")
    places = models.Places(one, family, num_prompt=8, num_tokens=6)
    places.measure(models.OURS, 1, lambda: pytest.fail("begun without time"), 1)
    assert list(one.left_out) == [f"IVG, {family.name} WK=1: ivg_fast"]
    with pytest.raises(ValueError, match="num_tokens must exceed"):
        models.Places(one, family, num_prompt=8, num_tokens=places.chunk_length)


def kernel(name: str, start: float, length: float, category: str = "kernel") -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": length}


STEP = [
    ("nvjet_tst_64x8", 10.0),
    ("void cutlass::Kernel2<cutlass_80_wmma_tensorop>", 5.0),
    ("_attend", 4.0),
    ("_merge", 1.0),
    ("_measure", 2.0),
    ("triton_poi_fused_add_mul", 3.0),
    ("vectorized_layer_norm_kernel", 1.0),
]


def trace(num_steps: int) -> list[dict[str, Any]]:
    """A prefill of 100 us, then steps of 26 us device time on one stream and 2 us between."""
    events = [kernel("ampere_bf16_s16816gemm", 0.0, 100.0)]
    now = 100.0
    for _ in range(num_steps):
        now += 2.0
        events.append(kernel("cudaGraphLaunch", now - 2.0, 1.0, "cuda_runtime"))
        for name, length in STEP:
            events.append(kernel(name, now, length))
            now += length
        events.append(kernel("a guide's gemm", now - 6.0, 4.0))  # on a stream of its own
    events.append(kernel("cudaStreamSynchronize", 1.0, 5.0, "cuda_runtime"))
    events.append(kernel("cudaLaunchKernel", 0.0, 1.0, "cuda_runtime"))
    events.append({"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": -50.0, "dur": 1e6})
    events.append({"ph": "M", "name": "process_name"})
    return events


def test_a_step_is_the_difference_of_two_profiles() -> None:
    longer, shorter = (step_profile.read_trace(trace(n)) for n in (7, 3))
    found = step_profile.per_step(longer, shorter, 4)
    assert found["span_us"] == 28.0
    assert found["busy_us"] == 26.0
    assert found["gaps_us"] == 2.0
    assert found["device_us_by_kind"] == {
        "matrix products": 19.0,
        "attention": 5.0,
        "element-wise and other": 3.0,
        "sampling": 2.0,
        "norms": 1.0,
    }
    assert found["counts"]["graph launches"] == 1.0
    assert found["counts"]["waits"] == found["counts"]["launches"] == 0.0
    assert found["counts"]["kernels"] == len(STEP) + 1
    assert found["longest_kernels_us"]["nvjet_tst_64x8"] == 10.0
    assert json.loads(json.dumps(found)) == found


def test_kinds_of_our_kernels() -> None:
    for name, kind in {
        "_draw": "sampling",
        "_narrow": "sampling",
        "_write": "kv",
        "copy_blocks_kernel(long const*)": "kv",
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80": "attention",
        "pytorch_flash::flash_fwd_splitkv_kernel": "attention",
        "void at::native::tensor_kernel_scan_innermost_dim": "sampling",
        "gemvx::kernel<int>": "matrix products",
        "void at::native::elementwise_kernel<128, 4>": step_profile.OTHER,
    }.items():
        assert step_profile.kind_of(name) == kind, name


def test_an_empty_trace_and_a_real_profile() -> None:
    assert step_profile.read_trace([]).span_us == 0
    model = tiny_model("llama")
    profile = step_profile.profiled(lambda: model(torch.tensor([[1, 2, 3]])), "cpu")
    assert profile.counts["kernels"] == 0


def test_busy_time_is_a_union() -> None:
    assert step_profile.busy_time([(0, 4), (2, 3), (3, 6), (10, 11)]) == 7
    assert step_profile.busy_time([]) == 0
