# SPDX-License-Identifier: Apache-2.0
"""The scheduler against a model of the search (search_model) on a naive KV memory (kv_model)."""

from __future__ import annotations

import random

import numpy as np
import pytest
from kv_model import Device
from search_model import (
    ABORT,
    DEADLINE,
    NUM_ROLES,
    STOP_INDEX,
    STOP_TEXT_FOUND,
    VALUE,
    Candidate,
    Request,
    search,
)

from ivg_fast import _C
from ivg_fast.errors import CapacityError, InvalidParameterError, QueueFullError


def random_request(rng: random.Random) -> Request:
    scorer = rng.choice(["none", "in_hand", "measured", "vocab_head", "scalar_head"])
    W, K = rng.randint(1, 4), rng.randint(1, 4)
    lens = [rng.randint(1, 40) for _ in range(NUM_ROLES)]
    if scorer not in ("vocab_head", "scalar_head") and rng.random() < 0.5:
        lens[VALUE] = 0
    return Request(
        prompt_lens=lens,
        beam_width=W,
        num_candidates=K,
        chunk_length=0 if scorer == "none" else rng.choice([0, 1, 2, 3, 5, 8, 16, 20, 50]),
        max_tokens=rng.choice([1, 3, 12, 16, 33, 48]),
        num_outputs=rng.randint(1, W * K),
        seed=rng.getrandbits(64),
        scorer=scorer,
        eos_rate=rng.choice([0, 2, 10, 30]),
        dedup_finished=rng.random() < 0.5,
        score_eos_on_truncation=rng.random() < 0.5,
        guidance=rng.randint(0, 2),
    )


def make_scheduler(
    num_blocks: int = 1000, num_roles: int = NUM_ROLES, **overrides: int
) -> _C.Scheduler:
    settings = {"max_num_rows": 48, "max_burst_steps": 8, **overrides}
    return _C.Scheduler(num_blocks=num_blocks, num_roles=num_roles, **settings)


class Run:
    """Drives a scheduler and a device until all requests have ended."""

    def __init__(self, scheduler: _C.Scheduler, num_blocks: int = 1000, bug: str = "") -> None:
        self.scheduler = scheduler
        self.requests: dict[int, Request] = {}
        self.device = Device(num_blocks, self.requests, bug)
        self.results: dict[int, dict] = {}

    def add(self, request: Request) -> int:
        request_id = self.scheduler.add_request(**request.kwargs())
        self.requests[request_id] = request
        return request_id

    def check(self) -> None:
        self.scheduler.check_integrity()
        for request_id in self.scheduler.take_finished():
            assert request_id not in self.results
            self.results[request_id] = self.scheduler.take_result(request_id)

    def burst(self) -> None:
        plan = self.scheduler.plan()
        self.scheduler.check_integrity()
        self.in_flight()
        committed = self.device.run(plan)
        if committed["num_tokens"].size > 0:
            self.scheduler.commit_tokens(**committed)
        self.check()

    def in_flight(self) -> None:
        """What else happens while the device runs."""

    def scores(self) -> None:
        for request_id, (scores, rewards) in self.device.score(
            self.scheduler.plan_scores()
        ).items():
            assert self.scheduler.commit_scores(request_id, scores, rewards)
            self.check()

    def to_the_end(self) -> dict[int, dict]:
        while self.scheduler.has_unfinished:
            self.burst()
            self.scores()
        assert self.scheduler.stats()["num_blocks_used"] == 0
        return self.results


def assert_same(result: dict, request: Request) -> None:
    expected = search(request)
    assert result["num_selections"] == expected.num_selections
    assert len(result["candidates"]) == len(expected.candidates)
    for got, want in zip(result["candidates"], expected.candidates, strict=True):
        assert_same_candidate(got, want)


def assert_same_candidate(got: dict, want: Candidate) -> None:
    assert tuple(got["token_ids"].tolist()) == want.tokens
    assert got["candidate_id"] == want.id
    assert got["finish"] == want.finish
    assert got["stop_index"] == (STOP_INDEX if want.finish == STOP_TEXT_FOUND else -1)
    assert got["score"] == want.score
    assert tuple(got["rewards"].tolist()) == want.rewards
    assert got["logprobs"].tolist() == [-t - 1.0 for t in range(len(want.tokens))]


@pytest.mark.parametrize("max_burst_steps", [1, 8])
@pytest.mark.parametrize("seed", range(20))
def test_several_requests_match_the_search_model(seed: int, max_burst_steps: int) -> None:
    """In any order of arrival, whoever else is in the batch, whatever the bursts."""
    rng = random.Random(seed)
    requests = [random_request(rng) for _ in range(8)]
    arrival = random.Random(1000 * seed + max_burst_steps)  # differs between the burst lengths
    arrival.shuffle(requests)
    scheduler = make_scheduler(
        max_burst_steps=max_burst_steps,
        max_join_steps=arrival.randint(-1, 3),
        max_prefill_tokens=arrival.choice([-1, 1, 7, 16, 40]),
    )
    run = Run(scheduler)
    waiting = list(requests)
    while waiting or scheduler.has_unfinished:
        while waiting and arrival.random() < 0.4:
            run.add(waiting.pop())
        run.burst()
        run.scores()
    assert len(run.results) == len(requests)
    for request_id, result in run.to_the_end().items():
        assert_same(result, run.requests[request_id])


def test_the_random_requests_cover_what_they_should() -> None:
    """The oracle is worth something only if its cases are not all easy."""
    rng = random.Random(0)
    names = ["unfinished", "stop", "stop_text", "length", "abort"]
    seen = dict.fromkeys(["selections", "clones", *names[1:]], 0)
    for _ in range(400):
        result = search(random_request(rng))
        seen["selections"] += result.num_selections > 2
        for candidate in result.candidates:
            seen["clones"] += candidate.origin >= 0
            seen[names[candidate.finish]] += 1
    assert min(seen.values()) >= 10, seen


@pytest.mark.parametrize("seed", range(10))
def test_aborts_and_late_scores_harm_no_neighbour(seed: int) -> None:
    rng = random.Random(seed)
    scheduler = make_scheduler(
        num_blocks=300,
        max_burst_steps=rng.randint(1, 8),
        max_join_steps=2,
        max_prefill_tokens=rng.choice([-1, 5, 20]),
    )
    aborted: dict[int, int] = {}

    class Disturbed(Run):
        def in_flight(self) -> None:
            self.disturb()
            for request_id in [r for r in late if rng.random() < 0.5]:
                scores, rewards = late.pop(request_id)
                is_live = scheduler.commit_scores(request_id, scores, rewards)
                assert is_live or request_id in aborted
                self.check()
                self.disturb()

        def disturb(self) -> None:
            if rng.random() < 0.15:
                request_id = rng.choice(list(self.requests))
                reason = rng.choice([ABORT, DEADLINE])
                if scheduler.abort(request_id, is_deadline=reason == DEADLINE):
                    aborted.setdefault(request_id, reason)
            self.check()

    run = Disturbed(scheduler, num_blocks=300)
    late: dict[int, tuple] = {}
    for _ in range(25):
        run.add(random_request(rng))
    while scheduler.has_unfinished:
        run.burst()
        run.disturb()
        late.update(run.device.score(scheduler.plan_scores()))
    assert len(run.results) == 25
    assert aborted
    assert len(aborted) < 20
    for request_id, result in run.results.items():
        request = run.requests[request_id]
        if request_id not in aborted:
            assert_same(result, request)
            continue
        histories = search(request).histories
        assert len(result["candidates"]) >= 1
        for candidate in result["candidates"]:
            tokens = tuple(candidate["token_ids"].tolist())
            assert any(history[: len(tokens)] == tokens for history in histories)
        reasons = {candidate["finish"] for candidate in result["candidates"]}
        assert reasons & {ABORT, DEADLINE} <= {aborted[request_id]}


# Unfinished to the end, and three selections of four inside a block: every mistake has its chance.
PRESSING = Request(
    prompt_lens=[20, 7, 33, 16],
    beam_width=2,
    num_candidates=3,
    chunk_length=5,
    max_tokens=40,
    num_outputs=3,
    seed=2**64 - 3,
    scorer="vocab_head",
    eos_rate=0,
)


@pytest.mark.parametrize(
    "bug",
    [
        "skip_copies",
        "copy_before_settle",
        "settle_step_roles_only",
        "neighbours_row",
        "first_piece_only",
    ],
)
def test_planted_bug_is_caught(bug: str) -> None:
    def run(planted: str) -> None:
        run = Run(make_scheduler(max_prefill_tokens=10), bug=planted)
        run.add(PRESSING)
        for result in run.to_the_end().values():
            assert_same(result, PRESSING)

    run("")
    with pytest.raises(AssertionError):
        run(bug)


def filled_slots(plan: _C.BurstPlan) -> int:
    """Slots of the response's blocks that hold a token when the burst is over."""
    filled: dict[int, int] = {}
    for b, table in enumerate(plan.sample_tables[:, plan.prompt_blocks[0] :]):
        rest = (
            int(plan.sample_position[b] + plan.sample_steps[b]) - 1
        )  # the last is not written yet
        for block in table[: -(-rest // _C.BLOCK_SIZE)].tolist():
            filled[block] = max(filled.get(block, 0), min(rest, _C.BLOCK_SIZE))
            rest -= _C.BLOCK_SIZE
    return sum(filled.values())


def test_counters_of_a_search() -> None:
    """Blocks copied <= rows a selection; memory far below that of W*K private caches."""
    request = Request(
        prompt_lens=[400],
        beam_width=8,
        num_candidates=8,
        chunk_length=5,
        max_tokens=50,
        num_outputs=1,
        seed=1,
        scorer="in_hand",
        eos_rate=0,
    )
    scheduler = make_scheduler(num_roles=1, max_num_rows=64)
    kwargs = {**request.kwargs(), "step_roles": 1}
    request_id = scheduler.add_request(**kwargs)
    rows = num_slots = 0
    while scheduler.has_unfinished:
        plan = scheduler.plan()
        num_steps, num_samples = plan.sample_slots.shape
        rows += len(plan.row_request) + (num_steps - 1) * num_samples
        assert len(plan.copies) <= num_samples
        num_slots = max(num_slots, 400 + filled_slots(plan))
        zeros = np.zeros((num_steps, num_samples), dtype=np.float32)
        scheduler.commit_tokens(
            tokens=zeros.astype(np.int32),
            logprobs=zeros,
            base_logprobs=zeros,
            rewards=zeros,
            num_tokens=plan.sample_steps.copy(),
            finish=np.zeros(num_samples, dtype=np.uint8),
            stop_index=np.full(num_samples, -1, dtype=np.int32),
        )
        if scheduler.plan_scores().request_ids.size:
            scheduler.commit_scores(request_id, np.random.default_rng(rows).normal(size=64))
        scheduler.check_integrity()
    result = scheduler.take_result(request_id)
    assert result["num_selections"] == 10
    assert rows == 9 * 8 + 10 * 4 * 64
    assert result["num_blocks_copied"] <= 9 * 64
    assert num_slots * 15 <= 64 * 450
    assert (
        result["peak_blocks"] * _C.BLOCK_SIZE * 10 <= 64 * 450
    )  # partly filled blocks count whole


def test_errors_are_typed_and_change_nothing() -> None:
    scheduler = make_scheduler(num_blocks=100, num_roles=1, max_queued_requests=1)
    with pytest.raises(InvalidParameterError, match=r"max_tokens .* got 0"):
        scheduler.add_request(prompt_lens=[3], max_tokens=0)
    with pytest.raises(InvalidParameterError, match="prompt_lens"):
        scheduler.add_request(prompt_lens=[3, 3], max_tokens=5)
    with pytest.raises(InvalidParameterError, match="num_candidates"):
        scheduler.add_request(prompt_lens=[3], max_tokens=5, num_candidates=0)
    with pytest.raises(CapacityError, match="rows"):
        scheduler.add_request(prompt_lens=[3], max_tokens=5, num_candidates=49)
    with pytest.raises(CapacityError, match="blocks"):
        scheduler.add_request(prompt_lens=[3], max_tokens=1600)
    with pytest.raises(TypeError):
        scheduler.add_request(prompt_lens=[3], max_tokens=5, seed=-1)
    assert not scheduler.has_unfinished
    assert scheduler.plan().sample_tables.shape == (0, 0)
    request_id = scheduler.add_request(
        prompt_lens=[3], max_tokens=2, num_candidates=2, has_scorer=True
    )
    with pytest.raises(QueueFullError):
        scheduler.add_request(prompt_lens=[3], max_tokens=2)
    plan = scheduler.plan()
    good = {
        "tokens": np.ones((2, 2), dtype=np.int32),
        "logprobs": np.zeros((2, 2), dtype=np.float32),
        "base_logprobs": np.zeros((2, 2), dtype=np.float32),
        "rewards": np.zeros((2, 2), dtype=np.float32),
        "num_tokens": plan.sample_steps.copy(),
        "finish": np.zeros(2, dtype=np.uint8),
        "stop_index": np.full(2, -1, dtype=np.int32),
    }
    with pytest.raises(ValueError, match=r"logprobs must have shape \(2,2,\), got \(1,2,\)"):
        scheduler.commit_tokens(**{**good, "logprobs": good["logprobs"][:1]})
    with pytest.raises(InvalidParameterError, match="num_tokens"):
        scheduler.commit_tokens(**{**good, "num_tokens": np.array([1, 2], dtype=np.int32)})
    with pytest.raises(InvalidParameterError, match=r"tokens .* got -1"):
        scheduler.commit_tokens(**{**good, "tokens": -good["tokens"]})
    with pytest.raises(RuntimeError, match="in flight"):
        scheduler.plan()
    scheduler.commit_tokens(**good)
    scheduler.plan_scores()
    with pytest.raises(InvalidParameterError, match=r"num_scores .* got 1"):
        scheduler.commit_scores(request_id, np.zeros(1))
    with pytest.raises(InvalidParameterError, match=r"scores .* got 1"):
        scheduler.commit_scores(request_id, np.array([0.0, np.nan]))
    with pytest.raises(InvalidParameterError, match="rewards"):
        scheduler.commit_scores(request_id, np.zeros(2), np.zeros((2, 1), dtype=np.float32))
    with pytest.raises(InvalidParameterError, match="request_id"):
        scheduler.commit_scores(request_id + 1, np.zeros(2))
    scheduler.check_integrity()
    assert scheduler.commit_scores(request_id, np.zeros(2))
    assert scheduler.take_finished() == [request_id]
    assert len(scheduler.take_result(request_id)["candidates"]) == 1
