# SPDX-License-Identifier: Apache-2.0
"""Types of the compiled core; semantics in csrc/scheduler/*.h and csrc/cpu/kernels.h."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

_I8 = NDArray[np.uint8]
_I32 = NDArray[np.int32]
_I64 = NDArray[np.int64]
_F32 = NDArray[np.float32]
_F64 = NDArray[np.float64]

BLOCK_SIZE: int
cuda_built: bool
cuda_architectures: str  # "80 90 ...", empty where not built

def cpu_isa() -> str: ...
def __getattr__(name: str) -> Any: ...  # the kernels' entry points, called from ivg_fast.ops alone

class BlockPool:
    num_blocks: int
    num_free: int
    num_used: int
    def __init__(self, num_blocks: int) -> None: ...
    def allocate(self) -> int: ...
    def share(self, block: int) -> None: ...
    def free(self, block: int) -> bool: ...
    def fork(
        self, table: list[int], num_tokens: int
    ) -> tuple[list[int], list[tuple[int, int]]]: ...
    def ref_count(self, block: int) -> int: ...
    def check_integrity(self) -> None: ...

class BurstPlan:
    num_steps: int
    table_width: int
    request_ids: _I64
    prompt_blocks: _I32
    num_samples: _I32
    prefill_request_ids: _I64
    prefill_begin: _I32
    prefill_end: _I32
    prefill_tables: _I32
    row_request: _I32
    row_token: _I32
    row_position: _I32
    row_slot: _I32
    row_roles: NDArray[np.uint32]
    row_tables: _I32
    copies: _I32
    sample_request: _I32
    sample_row: _I32
    sample_candidate: _I32
    sample_position: _I32
    sample_steps: _I32
    sample_seed: _I64
    sample_slots: _I32
    sample_tables: _I32

class ScorePlan:
    table_width: int
    max_new_tokens: int
    request_ids: _I64
    num_rows: _I32
    prompt_blocks: _I32
    row_request: _I32
    row_candidate: _I32
    row_start: _I32
    row_length: _I32
    row_finish: _I8
    row_adds_eos: _I8
    row_twin: _I32
    row_reward: _F64
    row_tokens: _I32
    row_tables: _I32

class Scheduler:
    has_unfinished: bool
    def __init__(
        self,
        *,
        num_blocks: int,
        num_roles: int,
        max_num_rows: int,
        max_burst_steps: int,
        max_join_steps: int = -1,
        max_queued_requests: int = -1,
        max_prefill_tokens: int = -1,
    ) -> None: ...
    def add_request(
        self,
        *,
        prompt_lens: list[int],
        max_tokens: int,
        step_roles: int = 1,
        settle_roles: int = 0,
        guidance: int = 0,
        beam_width: int = 1,
        num_candidates: int = 1,
        chunk_length: int = 0,
        num_outputs: int = 1,
        seed: int = 0,
        has_scorer: bool = False,
        dedup_finished: bool = False,
        score_eos_on_truncation: bool = False,
        reads_eos: bool = False,
        is_scored_late: bool = False,
        max_burst_steps: int = 0,
        only_check: bool = False,
    ) -> int: ...
    def abort(self, request_id: int, *, is_deadline: bool = False) -> bool: ...
    def plan(self) -> BurstPlan: ...
    def commit_tokens(
        self,
        tokens: _I32,
        logprobs: _F32,
        base_logprobs: _F32,
        rewards: _F32,
        num_tokens: _I32,
        finish: _I8,
        stop_index: _I32,
    ) -> None: ...
    def give_up(self) -> list[int]: ...
    def plan_scores(self) -> ScorePlan: ...
    def commit_scores(self, request_id: int, scores: _F64, rewards: _F32 | None = None) -> bool: ...
    def history(self, request_id: int, candidate_id: int) -> _I32: ...
    def take_decided(self, request_id: int) -> _I32: ...
    def take_finished(self) -> list[int]: ...
    def take_result(self, request_id: int) -> dict[str, Any]: ...
    def stats(self) -> dict[str, int]: ...
    def check_integrity(self) -> None: ...
