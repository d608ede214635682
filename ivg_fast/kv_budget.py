# SPDX-License-Identifier: Apache-2.0
"""How many KV blocks an engine takes where nobody has said."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ivg_fast import _C
from ivg_fast.devices import free_memory, gib, pool_errors
from ivg_fast.errors import CapacityError
from ivg_fast.models.runner import ModelRunner
from ivg_fast.models.text_value import TextValueModel
from ivg_fast.models.values import ValueFunction
from ivg_fast.params import EngineConfig


def allocate_pools(
    runners: Sequence[ModelRunner], config: EngineConfig, value: ValueFunction | None
) -> int:
    """Makes the pools of all roles, and of a value that reads texts and has none yet: as many
    blocks as the config says, else as can be afforded; how many that is.

    Raises:
        CapacityError: they do not fit.
    """
    others = []
    if isinstance(value, TextValueModel) and value.num_blocks is None:
        others = [value]
    of_others = [text.runner for text in others]
    num_blocks = config.num_blocks or affordable_blocks(runners, config, of_others)
    block_bytes = sum(runner.bytes_per_block for runner in (*runners, *of_others))
    with pool_errors(num_blocks, block_bytes, runners[0].device):
        for runner in runners:
            runner.allocate(num_blocks)
        for text in others:
            text.allocate(num_blocks)
    return num_blocks


def affordable_blocks(
    runners: Sequence[ModelRunner], config: EngineConfig, others: Sequence[ModelRunner] = ()
) -> int:
    """As many blocks as `kv_memory_fraction` of the free memory holds in the pools of all roles,
    but no more than `max_num_rows` rows could fill. `others` get as many, but hold no rows. The
    memory is the GPU's where the models are on one; they have been loaded by then.

    Raises:
        CapacityError: not even one.
    """
    block_bytes = sum(runner.bytes_per_block for runner in (*runners, *others))
    device = runners[0].device
    is_gpu = device.type == "cuda"
    free = free_memory(device)[0] if is_gpu else _available_memory()
    budget = int(config.kv_memory_fraction * free)
    num_blocks = min(budget // block_bytes, 2**31 // _C.BLOCK_SIZE - 1)  # slots are int32
    limits = [runner.max_position for runner in runners if runner.max_position is not None]
    if limits:
        # A prompt and a response round up to whole blocks each.
        num_blocks = min(num_blocks, config.max_num_rows * (min(limits) // _C.BLOCK_SIZE + 2))
    if num_blocks < 1:
        raise CapacityError(
            f"kv_memory_fraction {config.kv_memory_fraction} of the free memory is {budget} bytes, "
            f"a KV block of all roles takes {block_bytes}"
            + (f"; {gib(free)} of {device} are free, a smaller dtype leaves more" if is_gpu else "")
        )
    return num_blocks


def _available_memory() -> int:
    """Bytes that can be had without swapping."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
