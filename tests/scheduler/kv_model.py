# SPDX-License-Identifier: Apache-2.0
"""A device that runs plans on a naive KV memory: one integer a slot, the token written there.

A row attends by reading its history back through its block table, and what it draws depends on what
it reads: a wrong block, slot, copy or order shows up as a read of what was never written, or as
other tokens than the search model's. `bug` plants a mistake.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from search_model import (
    BASE,
    EOS,
    NONE,
    NUM_ROLES,
    STOP,
    STOP_INDEX,
    STOP_TEXT_FOUND,
    Request,
    completes_stop_text,
    draw_token,
    reward_of,
    score_of,
)

from ivg_fast import _C

BLOCK_SIZE = _C.BLOCK_SIZE
NEVER_WRITTEN = -1


def snapshot(plan: Any) -> SimpleNamespace:
    """A copy: the views are valid until the next plan only."""
    names = [name for name in dir(plan) if not name.startswith("_")]
    values = {name: getattr(plan, name) for name in names}
    return SimpleNamespace(
        **{k: v.copy() if isinstance(v, np.ndarray) else v for k, v in values.items()}
    )


def blocks_for(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_SIZE)


class Device:
    def __init__(self, num_blocks: int, requests: dict[int, Request], bug: str = "") -> None:
        self.memory = np.full((NUM_ROLES, num_blocks, BLOCK_SIZE), NEVER_WRITTEN, dtype=np.int64)
        self.slots = self.memory.reshape(NUM_ROLES, -1)
        self.requests = requests
        self.bug = bug

    # Memory

    def forget(self, block: int) -> None:
        self.memory[:, block] = NEVER_WRITTEN

    def prompt_token(self, request_id: int, role: int, position: int) -> int:
        return 1000 + 10_000 * (request_id * NUM_ROLES + role) + position

    def write(self, role: int, slot: int, token: int) -> None:
        assert self.slots[role, slot] == NEVER_WRITTEN, "a slot is written twice"
        self.slots[role, slot] = token

    def read(self, request_id: int, role: int, table: np.ndarray, n: int) -> tuple[int, ...]:
        """The first n response tokens that a row of this table attends to; checks its prompt."""
        request = self.requests[request_id]
        num_prompt_blocks = blocks_for(max(request.prompt_lens))
        assert ((table >= 0) & (table < self.memory.shape[1])).all()
        prompt = self.memory[role, table[:num_prompt_blocks]].reshape(-1)
        first = self.prompt_token(request_id, role, 0)
        num_prompt = request.prompt_lens[role]
        assert (prompt[:num_prompt] == np.arange(first, first + num_prompt)).all()
        response = self.memory[role, table[num_prompt_blocks:]].reshape(-1)[:n]
        assert len(response) == n
        assert (response != NEVER_WRITTEN).all(), "a slot is read that was never written"
        return tuple(response.tolist())

    def slot(self, request_id: int, table: np.ndarray, position: int) -> int:
        offset = blocks_for(max(self.requests[request_id].prompt_lens))
        return int(table[offset + position // BLOCK_SIZE]) * BLOCK_SIZE + position % BLOCK_SIZE

    # One burst

    def run(self, view: Any) -> dict[str, np.ndarray]:
        """Runs a plan; the arguments of commit_tokens."""
        plan = snapshot(view)
        self.check_plan(plan)
        prefill = (plan.prefill_request_ids, plan.prefill_tables, plan.prefill_begin)
        for request_id, table, begin, end in zip(*prefill, plan.prefill_end, strict=True):
            if self.bug != "first_piece_only" or begin == 0:
                self.prefill(int(request_id), table, int(begin), int(end))
        self.take_fresh_blocks(plan)
        if self.bug == "copy_before_settle":
            self.copy_blocks(plan)
        logits = [self.forward_row(plan, i) for i in range(len(plan.row_request))]
        if self.bug not in ("copy_before_settle", "skip_copies"):
            self.copy_blocks(plan)
        return self.sample(plan, logits)

    def prefill(self, request_id: int, table: np.ndarray, begin: int, end: int) -> None:
        lens = self.requests[request_id].prompt_lens
        if begin == 0:
            for block in table[: blocks_for(max(lens))]:
                self.forget(int(block))
        for role, num_tokens in enumerate(lens):
            for i in range(begin, min(end, num_tokens)):
                slot = int(table[i // BLOCK_SIZE]) * BLOCK_SIZE + i % BLOCK_SIZE
                self.write(role, slot, self.prompt_token(request_id, role, i))

    def valid_blocks(self, plan: SimpleNamespace, b: int) -> np.ndarray:
        """The response blocks that sample b may touch in this burst."""
        first = plan.prompt_blocks[plan.sample_request[b]]
        end = int(plan.sample_position[b] + plan.sample_steps[b])
        return plan.sample_tables[b, first : first + blocks_for(end)]

    def check_plan(self, plan: SimpleNamespace) -> None:
        """What a burst may do to blocks that others hold: nothing."""
        num_samples = len(plan.sample_request)
        assert len(plan.copies) <= num_samples
        assert plan.num_samples.sum() == num_samples
        holders = np.zeros(self.memory.shape[1], dtype=np.int64)
        for i, request_id in enumerate(plan.request_ids):
            of_request = np.flatnonzero(plan.sample_request == i)
            ids = plan.sample_candidate[of_request]
            assert (np.diff(of_request) == 1).all()
            assert (np.diff(ids) > 0).all()
            request = self.requests[int(request_id)]
            assert len(ids) <= request.beam_width * request.num_candidates
            assert plan.prompt_blocks[i] == blocks_for(max(request.prompt_lens))
            rows = np.flatnonzero(plan.row_request == i)
            assert len(rows) in (0, len(of_request)) or len(rows) <= request.beam_width
            # The request's prompt is held by all its rows: it is never to be written.
            holders[plan.sample_tables[of_request[0], : plan.prompt_blocks[i]]] += 2
        for b in range(num_samples):
            holders[self.valid_blocks(plan, b)] += 1
        sources, targets = plan.copies[:, 0], plan.copies[:, 1]
        assert len(np.unique(targets)) == len(targets)
        assert not np.isin(sources, targets).any()
        assert (holders[targets] == 1).all()
        for b in range(num_samples):
            slots = plan.sample_slots[:, b]
            steps = int(plan.sample_steps[b])
            request_id = int(plan.request_ids[plan.sample_request[b]])
            position = int(plan.sample_position[b])
            expected = [
                self.slot(request_id, plan.sample_tables[b], position + s) for s in range(steps)
            ]
            assert slots[:steps].tolist() == expected
            assert (slots[steps:] == -1).all()
            assert (holders[slots[:steps] // BLOCK_SIZE] == 1).all(), "a shared block is written"
            assert int(plan.sample_seed[b]) % 2**64 == self.requests[request_id].seed

    def take_fresh_blocks(self, plan: SimpleNamespace) -> None:
        """Blocks that a sample did not have from its row hold nothing yet."""
        for b in range(len(plan.sample_request)):
            blocks = self.valid_blocks(plan, b)
            row = plan.sample_row[b]
            written = blocks_for(int(plan.sample_position[b]))
            first = plan.prompt_blocks[plan.sample_request[b]]
            for i, block in enumerate(blocks):
                if row < 0 or i >= written or block != plan.row_tables[row, first + i]:
                    self.forget(int(block))

    def copy_blocks(self, plan: SimpleNamespace) -> None:
        for src, dst in plan.copies:
            self.memory[:, dst] = self.memory[:, src]

    def forward_row(self, plan: SimpleNamespace, i: int) -> tuple[int, ...]:
        request_id = int(plan.request_ids[plan.row_request[i]])
        position, token = int(plan.row_position[i]), int(plan.row_token[i])
        table = plan.row_tables[i]
        roles = int(plan.row_roles[i])
        if self.bug == "settle_step_roles_only":
            roles &= self.requests[request_id].step_roles
        assert plan.row_slot[i] == self.slot(request_id, table, position)
        return self.forward(request_id, roles, table, position, token, int(plan.row_slot[i]))

    def forward(
        self, request_id: int, roles: int, table: np.ndarray, position: int, token: int, slot: int
    ) -> tuple[int, ...]:
        """Writes a token in some roles; what the base then knows of the response."""
        histories = []
        for role in range(NUM_ROLES):
            if roles >> role & 1:
                self.write(role, slot, token)
                histories.append(self.read(request_id, role, table, position + 1))
        assert all(history == histories[0] for history in histories)
        assert roles >> BASE & 1
        return histories[0]

    def sample(self, plan: SimpleNamespace, logits: list[tuple[int, ...]]) -> dict[str, np.ndarray]:
        n, num_samples = plan.num_steps, len(plan.sample_request)
        out = {
            "tokens": np.full((n, num_samples), -1, dtype=np.int32),
            "logprobs": np.zeros((n, num_samples), dtype=np.float32),
            "base_logprobs": np.zeros((n, num_samples), dtype=np.float32),
            "rewards": np.zeros((n, num_samples), dtype=np.float32),
            "num_tokens": plan.sample_steps.copy(),
            "finish": np.zeros(num_samples, dtype=np.uint8),
            "stop_index": np.full(num_samples, -1, dtype=np.int32),
        }
        for b in range(num_samples):
            request_id = int(plan.request_ids[plan.sample_request[b]])
            request = self.requests[request_id]
            row = int(plan.sample_row[b])
            if self.bug == "neighbours_row" and row > 0:
                row -= 1
            history = logits[row] if row >= 0 else ()
            candidate_id = int(plan.sample_candidate[b])
            cut = None
            for step in range(int(plan.sample_steps[b])):
                if step > 0:
                    history = self.forward(
                        request_id,
                        request.step_roles,
                        plan.sample_tables[b],
                        len(history) - 1,
                        history[-1],
                        int(plan.sample_slots[step - 1, b]),
                    )
                assert len(history) == plan.sample_position[b] + step
                token = draw_token(request, candidate_id, history)
                history += (token,)
                out["tokens"][step, b] = token
                out["logprobs"][step, b] = -len(history)
                if request.scorer == "in_hand":
                    out["rewards"][step, b] = reward_of(request, history)
                # A device does not see texts: it decodes on, the cut is made at the burst's end.
                if cut is None and completes_stop_text(history):
                    cut = step + 1
                if token == EOS:
                    if cut is None:
                        out["finish"][b] = STOP
                        out["num_tokens"][b] = step + 1
                    break
            if cut is not None:
                out["finish"][b] = STOP_TEXT_FOUND
                out["num_tokens"][b] = cut
                out["stop_index"][b] = STOP_INDEX
        return out

    # Scores

    def score(self, view: Any) -> dict[int, tuple[np.ndarray, np.ndarray | None]]:
        """Scores and, where the scorer measures them, rewards of every request in a score plan."""
        plan = snapshot(view)
        results = {}
        row = 0
        for i, request_id in enumerate(plan.request_ids.tolist()):
            request = self.requests[request_id]
            scores, rewards = [], []
            for _ in range(plan.num_rows[i]):
                assert plan.row_request[row] == i
                tokens, measured = self.read_new_tokens(plan, row, request_id)
                reward = float(plan.row_reward[row])
                if request.scorer == "measured":
                    base = sum(self.settled_rewards(request, tokens, int(plan.row_start[row])))
                    assert reward == base
                    reward += sum(measured)
                scores.append(score_of(request, tokens, reward, bool(plan.row_adds_eos[row])))
                rewards.append(measured + [0.0] * (plan.max_new_tokens - len(measured)))
                row += 1
            measured_rewards = np.array(rewards, dtype=np.float32)
            results[request_id] = (
                np.array(scores),
                measured_rewards if request.scorer == "measured" else None,
            )
        assert row == len(plan.row_request)
        return results

    def settled_rewards(self, request: Request, tokens: tuple[int, ...], n: int) -> list[float]:
        return [reward_of(request, tokens[: t + 1]) for t in range(n)]

    def read_new_tokens(
        self, plan: SimpleNamespace, row: int, request_id: int
    ) -> tuple[tuple[int, ...], list[float]]:
        """The whole response as the scoring roles know it, and the rewards of its new tokens."""
        request = self.requests[request_id]
        start, length = int(plan.row_start[row]), int(plan.row_length[row])
        table = plan.row_tables[row]
        new = plan.row_tokens[row].tolist()
        assert all(token == -1 for token in new[length - start :])
        new = new[: length - start]
        # A vocabulary head knows y_t's value before it has read y_t; a scalar head must read it.
        last = length if request.scorer == "scalar_head" else length - 1
        known = None
        for role in request.score_roles:
            for position in range(start, last):
                slot = self.slot(request_id, table, position)
                self.write(role, slot, new[position - start])
            if request.scorer == "scalar_head" and plan.row_adds_eos[row]:
                slot = self.slot(request_id, table, length)
                if slot % BLOCK_SIZE == 0:  # a block that nobody else may have written
                    self.forget(slot // BLOCK_SIZE)
                self.write(role, slot, EOS)
                assert self.read(request_id, role, table, length + 1)[-1] == EOS
            history = self.read(request_id, role, table, last) + tuple(new[last - start :])
            assert known is None or known == history
            known = history
        if known is None:  # from what the base has written: all but the last token
            known = (*self.read(request_id, BASE, table, length - 1), new[-1])
        assert known[start:] == tuple(new)
        is_finished = plan.row_finish[row] != NONE
        assert is_finished or length == start + len(new)
        measured = [reward_of(request, known[: t + 1]) for t in range(start, length)]
        return known, measured
