# SPDX-License-Identifier: Apache-2.0
"""A forward at constant shapes as CUDA graphs: what torch.compile's "reduce-overhead" does, without
its minutes of compilation."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Forward = Callable[..., tuple[Tensor, ...]]


class Recorded(NamedTuple):
    """A forward at one set of shapes.

    Attributes:
        inputs: what it reads; written before each run.
        outputs: what a run leaves, until the next run of any shape.
        run: reads nothing else that may change.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    run: Callable[[], object]


class StepGraphs:
    """Calls `forward` through a CUDA graph for each set of input shapes.

    Args:
        forward: from tensors to tensors; whatever else it reads or writes stays in place until
            `clear`, and it never waits for the device.
    """

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._graphs: dict[tuple[torch.Size, ...], Recorded] = {}
        self._memory: tuple[int, int] | None = None

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The forward's outputs, which the next call overwrites."""
        shapes = tuple(x.shape for x in inputs)
        recorded = self._graphs.get(shapes)
        if recorded is None:
            recorded = self._graphs[shapes] = self._record(tuple(x.clone() for x in inputs))
        for static, x in zip(recorded.inputs, inputs, strict=True):
            static.copy_(x)
        recorded.run()
        return recorded.outputs

    def clear(self) -> None:
        """Forgets every graph, and gives their memory back."""
        self._graphs.clear()
        self._memory = None

    def _record(self, inputs: tuple[Tensor, ...]) -> Recorded:
        if self._memory is None:
            self._memory = torch.cuda.graph_pool_handle()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._forward(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            outputs = self._forward(*inputs)
        return Recorded(inputs, outputs, graph.replay)
