# SPDX-License-Identifier: Apache-2.0
"""The engine's own bound: the packed forwards of a run again, with free attention and sampling.

What is left is what the models' other layers take at the shapes that the scheduler chose: no
attention, no KV writes, no draws, no scoring, no scheduler, no batch building.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ivg_fast.engine import Engine
from ivg_fast.models import runner as runner_module
from ivg_fast.models.batch import ForwardBatch


class FreeAttention:
    """An attention context that computes nothing: zeros, remembered by shape."""

    _zeros: dict[tuple[Any, ...], Tensor]

    def __init__(self) -> None:
        self._zeros = {}

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
    ) -> Tensor:
        """[1, T, Hq, Dv] for query [1, Hq, T, D] and value [1, Hkv, T, Dv]."""
        shape = (1, query.shape[2], query.shape[1], value.shape[3])
        address = (*shape, query.dtype, query.device)
        if address not in self._zeros:
            self._zeros[address] = query.new_zeros(shape)
        return self._zeros[address]


@dataclass(frozen=True, slots=True)
class Forward:
    """One packed forward: of which role, by which method of its runner, and how it is called."""

    role: str
    method: Callable[[ForwardBatch], Tensor]
    batch: ForwardBatch


class Replay:
    """Records an engine's forwards, and runs them again.

    Attributes:
        forwards: in the order of the run.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.forwards: list[Forward] = []
        self._attention = FreeAttention()

    @property
    def num_forwards(self) -> Counter[str]:
        """Calls of each role's model."""
        return Counter(forward.role for forward in self.forwards)

    @property
    def num_tokens(self) -> Counter[str]:
        """Tokens that each role forwarded."""
        counts: Counter[str] = Counter()
        for forward in self.forwards:
            counts[forward.role] += forward.batch.input_ids.numel()
        return counts

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Forwards of the engine inside this block are recorded."""
        runners = self._engine._runners
        is_inside = [False]  # `forward` of a value model calls its `hidden`

        def recorded(role: str, method: Callable[[ForwardBatch], Tensor]) -> Any:
            def call(batch: ForwardBatch) -> Tensor:
                if is_inside[0]:
                    return method(batch)
                self.forwards.append(Forward(role, method, _own(batch)))
                is_inside[0] = True
                try:
                    return method(batch)
                finally:
                    is_inside[0] = False

            return call

        for role, runner in runners.items():
            for name in ("forward", "hidden"):
                setattr(runner, name, recorded(role, getattr(runner, name)))
        try:
            yield
        finally:
            for runner in runners.values():
                del runner.forward, runner.hidden

    def __call__(self) -> None:
        with mock.patch.object(runner_module, "PagedContext", return_value=self._attention):
            for forward in self.forwards:
                forward.method(forward.batch)


def _own(batch: ForwardBatch) -> ForwardBatch:
    """A copy: the plan's arrays behind a batch are written again by the next burst."""
    names = [field.name for field in fields(batch)]
    tensors = {n: t for n in names if isinstance(t := getattr(batch, n), Tensor)}
    return replace(batch, **{name: torch.clone(tensor) for name, tensor in tensors.items()})
