# SPDX-License-Identifier: Apache-2.0
"""Where models run, and what fits there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from ivg_fast.errors import CapacityError, InvalidParameterError


def checked_device(device: torch.device | str | None) -> torch.device:
    """The CPU (also for None) or a CUDA device that is there, by its index.

    Raises:
        InvalidParameterError: another one.
    """
    try:
        wanted = torch.device("cpu" if device is None else device)
    except RuntimeError as error:
        raise InvalidParameterError("device", device, "must be 'cpu' or 'cuda'") from error
    if wanted.type == "cpu":
        return wanted
    if wanted.type != "cuda":
        raise InvalidParameterError("device", str(device), "must be the CPU or a CUDA device")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise InvalidParameterError("device", str(device), "must be the CPU, as no CUDA is here")
    index = torch.cuda.current_device() if wanted.index is None else wanted.index
    if index >= count:
        requirement = f"must be below cuda:{count}"
        raise InvalidParameterError("device", str(device), requirement)
    return torch.device("cuda", index)


def check_placed(model: nn.Module, role: str, device: torch.device) -> None:
    """InvalidParameterError unless all weights are on `device`, the CPU or a GPU: the base's."""
    if not isinstance(model, nn.Module):
        requirement = "must be a torch module; Engine.from_pretrained takes paths"
        raise InvalidParameterError(role, model, requirement)
    for parameter in model.parameters():
        if parameter.device.type not in ("cpu", "cuda"):
            requirement = "must be on the CPU or a CUDA device"
        elif parameter.device != device:
            requirement = f"must be on {device} throughout, as base is"
        else:
            continue
        raise InvalidParameterError(role, str(parameter.device), requirement)


def device_of(model: Any) -> torch.device:
    """Of its first weight; the CPU for what has none."""
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    return next((parameter.device for parameter in parameters), torch.device("cpu"))


def on_device(device: torch.device) -> Any:
    """A context in which kernels are launched on this device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def free_memory(device: torch.device) -> tuple[int, int]:
    """Bytes of a CUDA device: what can be allocated, torch's own cache included; all there is."""
    free, total = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + cached, total


def check_weights_fit(model: nn.Module, name: str, device: torch.device) -> None:
    """CapacityError where the weights that are not on the CUDA device yet do not fit there; says
    what would."""
    tensors = [*model.parameters(), *model.buffers()]
    moved = [tensor for tensor in tensors if tensor.device != device]
    needed = sum(tensor.nbytes for tensor in moved)
    free, total = free_memory(device)
    if needed <= free:
        return
    floating = [tensor for tensor in moved if tensor.is_floating_point()]
    rest = needed - sum(tensor.nbytes for tensor in floating)
    widest = max(tensor.dtype.itemsize for tensor in floating) if floating else 0
    halved = rest + sum(tensor.numel() * 2 for tensor in floating)
    hint = ""
    if widest > 2:
        verdict = "which fits" if halved <= free else "which does not fit either"
        hint = f"; in bfloat16 they take {gib(halved)}, {verdict}"
    raise CapacityError(
        f"the weights of {name} take {gib(needed)}, but of the {gib(total)} of {device} only "
        f"{gib(free)} are free{hint}"
    )


@contextmanager
def pool_errors(num_blocks: int, block_bytes: int, device: torch.device) -> Iterator[None]:
    """Allocations of KV pools: CapacityError where they do not fit a CUDA device; says how many
    blocks do."""
    if device.type != "cuda":
        yield
        return
    needed = num_blocks * block_bytes
    free, total = free_memory(device)
    message = (
        f"num_blocks {num_blocks} take {gib(needed)} in the pools of all roles, but of the "
        f"{gib(total)} of {device} only {gib(free)} are free: at most {free // block_bytes} fit "
        f"({block_bytes} bytes each), fewer with room for logits"
    )
    if needed > free:
        raise CapacityError(message)
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise CapacityError(message) from error


def gib(num_bytes: int) -> str:
    """For messages."""
    return f"{num_bytes / 2**30:.2f} GiB"


@contextmanager
def torch_threads(num_threads: int | None) -> Iterator[None]:
    """Models and kernels of this thread run on `num_threads` threads; None: leaves it as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
