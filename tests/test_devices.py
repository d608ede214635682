# SPDX-License-Identifier: Apache-2.0
"""What fits a GPU, told by a GPU that is not there."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model

from ivg_fast import CapacityError, EngineConfig, InvalidParameterError
from ivg_fast.devices import check_placed, check_weights_fit, free_memory, pool_errors
from ivg_fast.kv_budget import affordable_blocks

CUDA = torch.device("cuda", 0)


def memory(monkeypatch: pytest.MonkeyPatch, free: int, total: int = 2**30) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (free, total))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _device: 5_000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _device: 2_000)


def test_torchs_own_cache_is_free_too(monkeypatch: pytest.MonkeyPatch) -> None:
    memory(monkeypatch, 10_000)
    assert free_memory(CUDA) == (13_000, 2**30)


def test_weights_that_do_not_fit_say_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    num_bytes = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    memory(monkeypatch, num_bytes - 3_000)
    check_weights_fit(model, "base", CUDA)
    memory(monkeypatch, num_bytes - 3_001)
    with pytest.raises(CapacityError, match=r"of base take .* in bfloat16 .*, which fits$"):
        check_weights_fit(model, "base", CUDA)
    memory(monkeypatch, 100)
    with pytest.raises(CapacityError, match=r"which does not fit either$"):
        check_weights_fit(model, "base", CUDA)
    with pytest.raises(CapacityError, match=r"are free$"):
        check_weights_fit(model.to(torch.bfloat16), "base", CUDA)
    check_weights_fit(model, "base", torch.device("cpu"))  # there already


def test_pools_that_do_not_fit_say_how_many_blocks_do(monkeypatch: pytest.MonkeyPatch) -> None:
    memory(monkeypatch, 97_000)
    with pool_errors(100, 1_000, CUDA):
        pass
    with (
        pytest.raises(CapacityError, match=r"num_blocks 101 take .* at most 100 fit"),
        pool_errors(101, 1_000, CUDA),
    ):
        raise AssertionError("nothing is allocated")
    with (
        pytest.raises(CapacityError, match="at most 100 fit") as caught,
        pool_errors(9, 1000, CUDA),
    ):
        raise torch.OutOfMemoryError("in pieces")
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    with pool_errors(2**40, 2**40, torch.device("cpu")):
        pass


class OnGpu:
    """What the budget asks of a runner."""

    device = CUDA
    bytes_per_block = 1_000
    max_position = None


def test_a_share_of_what_the_weights_left(monkeypatch: pytest.MonkeyPatch) -> None:
    memory(monkeypatch, 97_000)
    config = EngineConfig(kv_memory_fraction=0.9)
    assert affordable_blocks([OnGpu(), OnGpu()], config) == 45
    memory(monkeypatch, 0)
    with pytest.raises(CapacityError, match=r"takes 2000; .* of cuda:0 are free, a smaller dtype"):
        affordable_blocks([OnGpu(), OnGpu()], EngineConfig(kv_memory_fraction=0.1))


def test_models_stand_together() -> None:
    with pytest.raises(InvalidParameterError, match="tuned must be on cuda:0 throughout"):
        check_placed(tiny_model("llama"), "tuned", CUDA)
