# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of decode steps: captured once, replayed without the host's doing."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

logger = logging.getLogger("ivg_fast")

_SYNC_WARNING = "called a synchronizing"


class Step(Protocol):
    """A decode step over static buffers.

    Attributes:
        num_syncs: times that the host waits for the device in one replay.
    """

    num_syncs: int

    def replay(self) -> None:
        """Runs it on what the buffers hold now."""
        ...


class EagerStep:
    """A step whose operators the host launches each time."""

    def __init__(self, step: Callable[[], None], num_syncs: int = 0) -> None:
        self.replay = step
        self.num_syncs = num_syncs


class GraphedStep:
    """A step as a CUDA graph: one launch.

    Args:
        step: reads and writes buffers that keep their addresses, and never waits for the device.
        stream: where it is captured; it must have run there before, or what is made when first used
            (compiled kernels, workspaces of cuBLAS) would be made inside the capture.
        pool: memory that graphs share, none of which runs beside another.
    """

    num_syncs = 0

    def __init__(self, step: Callable[[], None], stream: torch.cuda.Stream, pool: Any) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # Other threads (scorers) may use CUDA meanwhile.
        capture = torch.cuda.graph(
            self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"
        )
        with capture:
            step()

    def replay(self) -> None:
        self._graph.replay()


class StepMaker:
    """Makes the steps of an engine, whose graphs share memory and streams.

    Args:
        device: a CUDA device.
        roles: each but the first gets a stream of its own, so that models run side by side.
        can_capture: False: every step stays eager.
    """

    def __init__(self, device: torch.device, roles: Sequence[str], *, can_capture: bool) -> None:
        self._can_capture = can_capture
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self.streams = {role: torch.cuda.Stream(device) for role in roles[1:]}

    def __call__(self, step: Callable[[], None]) -> Step:
        """A graph of the step, or an eager one, and why in the log, where there can be none.

        The step runs twice here; its buffers hold pads alone.
        """
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                step()  # compiles, and makes what is made when first used
                num_syncs = count_syncs(step)
                if not self._can_capture:
                    return EagerStep(step, num_syncs)
                if num_syncs == 0:
                    return GraphedStep(step, self._stream, self._pool)
                reason = f"the models wait for the GPU {num_syncs} times a step"
        except torch.OutOfMemoryError as error:
            reason = f"no memory for a graph: {_first_line(error)}"
        except RuntimeError as error:
            reason = f"the capture failed: {_first_line(error)}"
            num_syncs = 0
        finally:
            current.wait_stream(self._stream)
        # A capture that failed may have left the pool in no state to be used.
        self._pool = torch.cuda.graph_pool_handle()
        logger.warning("decode steps run without a CUDA graph: %s", reason)
        return EagerStep(step, num_syncs)


def count_syncs(step: Callable[[], None]) -> int:
    """Runs the step; how many times torch saw the host wait for the device in it."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum(_SYNC_WARNING in str(warning.message) for warning in caught)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
