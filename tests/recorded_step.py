# SPDX-License-Identifier: Apache-2.0
"""What a CUDA graph does to a decode step, without a GPU.

The step runs once while every operator of torch and every launch of a Triton kernel (in its
interpreter) is written down with the tensors and the numbers that it was given. A replay runs these
again, on the same memory, with the same numbers, whatever the Python code around them would do by
then; results go where they went the first time. So a buffer that was made anew, a number that was
baked in, a branch that was decided at the capture show as they would on a GPU. An operator that
would have the host wait is refused, as a capture does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction

WAITING = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "bincount"}
WAITING |= {"_unique2", "unique_dim", "unique_consecutive", "repeat_interleave"}

Call = Callable[[], None]


class WouldWait(RuntimeError):
    """The step has the host wait for the device."""


class _Recorder(TorchDispatchMode):
    def __init__(self, calls: list[Call]) -> None:
        super().__init__()
        self.calls = calls
        self.held: list[Any] = []
        self.is_paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self.is_paused:
            return result
        name = func.overloadpacket.__name__
        if name in WAITING:
            raise WouldWait(f"{func} would wait for the device")
        given = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if _is_tensor(leaf)}
        outputs = [leaf for leaf in tree_leaves(result) if _is_tensor(leaf)]
        fresh = [_storage(leaf) not in given for leaf in outputs]
        if "empty" not in name and (any(fresh) or name.endswith("_")):
            self.calls.append(_operator(func, args, kwargs, outputs, fresh))
        self.held.append((args, kwargs, result))  # not freed, as a graph's memory is not
        return result

    def launch(self, kernel: Any, args: Any, kwargs: Any) -> Any:
        held = self.held

        def run() -> None:
            assert held is not None
            _RUN(kernel, *args, **kwargs)

        self.calls.append(run)
        self.is_paused = True
        try:
            return _RUN(kernel, *args, **kwargs)
        finally:
            self.is_paused = False


_RUN = InterpretedFunction.run


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)


def _storage(tensor: torch.Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except NotImplementedError:  # packed weights have none
        return id(tensor)


def _operator(func: Any, args: Any, kwargs: Any, outputs: list[Any], fresh: list[bool]) -> Call:
    def run() -> None:
        results = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if _is_tensor(leaf)]
        for target, result, is_fresh in zip(outputs, results, fresh, strict=True):
            if is_fresh:
                target.copy_(result)

    return run


@contextmanager
def recording(calls: list[Call]) -> Iterator[None]:
    recorder = _Recorder(calls)
    launch = lambda kernel, *args, **kwargs: recorder.launch(kernel, args, kwargs)  # noqa: E731
    with patch.object(InterpretedFunction, "run", launch), recorder:
        yield


class RecordedStep:
    """A step as a list of calls with everything frozen in them."""

    num_syncs = 0

    def __init__(self, step: Callable[[], None]) -> None:
        self._calls: list[Call] = []
        self.num_replays = 0
        with recording(self._calls):
            step()

    def replay(self) -> None:
        self.num_replays += 1
        for call in self._calls:
            call()
