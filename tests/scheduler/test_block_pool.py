# SPDX-License-Identifier: Apache-2.0
"""BlockPool against a naive allocator, with rows of tokens that must survive every fork."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from ivg_fast import _C
from ivg_fast.errors import CapacityError, InvalidParameterError, IVGError

BLOCK_SIZE = _C.BLOCK_SIZE

# Around the edges of a block, each as likely as the others.
ROW_LENGTHS = st.sampled_from([0, 1, 5, 15, 16, 17, 20, 31, 32, 33, 47])
SETTINGS = settings(
    max_examples=100,
    stateful_step_count=50,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow],
)


class Row:
    """A sequence of tokens and the blocks that hold them."""

    def __init__(self, blocks: list[int], tokens: list[int]) -> None:
        self.blocks = blocks
        self.tokens = tokens


class BlockPoolMachine(RuleBasedStateMachine):
    """The pool next to a Counter of references and a dict of what is stored where."""

    make_pool: Any = _C.BlockPool

    @initialize(num_blocks=st.integers(1, 16))
    def start(self, num_blocks: int) -> None:
        self.pool = self.make_pool(num_blocks)
        self.num_blocks = num_blocks
        self.references: Counter[int] = Counter()
        self.loose: list[int] = []  # references that no row holds
        self.rows: list[Row] = []
        self.memory: dict[tuple[int, int], int] = {}
        self.next_token = 0

    def allocate(self) -> int | None:
        if len(+self.references) == self.num_blocks:
            with pytest.raises(CapacityError):
                self.pool.allocate()
            return None
        block = self.pool.allocate()
        assert 0 <= block < self.num_blocks
        assert self.references[block] == 0
        self.references[block] = 1
        return block

    def release(self, block: int) -> None:
        self.references[block] -= 1
        assert self.pool.free(block) == (self.references[block] == 0)

    @rule()
    def allocate_loose(self) -> None:
        block = self.allocate()
        if block is not None:
            self.loose.append(block)

    @precondition(lambda self: len(+self.references) > 0)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(+self.references)))
        self.pool.share(block)
        self.references[block] += 1
        self.loose.append(block)

    @precondition(lambda self: self.loose)
    @rule(data=st.data())
    def free_loose(self, data: st.DataObject) -> None:
        self.release(self.loose.pop(data.draw(st.integers(0, len(self.loose) - 1))))

    @rule(num_tokens=ROW_LENGTHS)
    def add_row(self, num_tokens: int) -> None:
        self.rows.append(Row([], []))
        self.append(self.rows[-1], num_tokens)

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), num_tokens=ROW_LENGTHS)
    def grow_row(self, data: st.DataObject, num_tokens: int) -> None:
        self.append(data.draw(st.sampled_from(self.rows)), num_tokens)

    def append(self, row: Row, num_tokens: int) -> None:
        for _ in range(num_tokens):
            index, offset = divmod(len(row.tokens), BLOCK_SIZE)
            if index == len(row.blocks):
                block = self.allocate()
                if block is None:
                    return
                row.blocks.append(block)
            if self.pool.ref_count(row.blocks[index]) > 1:
                return  # a loose reference holds it: it must not be written
            self.memory[row.blocks[index], offset] = self.next_token
            row.tokens.append(self.next_token)
            self.next_token += 1

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        row = data.draw(st.sampled_from(self.rows))
        num_tokens = len(row.tokens)
        is_partial = num_tokens % BLOCK_SIZE != 0
        if is_partial and len(+self.references) == self.num_blocks:
            with pytest.raises(CapacityError):
                self.pool.fork(row.blocks, num_tokens)
            return
        table, copies = self.pool.fork(row.blocks, num_tokens)
        num_full = num_tokens // BLOCK_SIZE
        assert len(table) == num_full + is_partial
        assert table[:num_full] == row.blocks[:num_full]
        self.references.update(table)
        if is_partial:
            assert copies == [(row.blocks[num_full], table[num_full])]
            assert self.references[table[num_full]] == 1
            for offset in range(num_tokens % BLOCK_SIZE):
                self.memory[table[num_full], offset] = self.memory[row.blocks[num_full], offset]
        else:
            assert copies == []
        self.rows.append(Row(table, list(row.tokens)))

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def drop_row(self, data: st.DataObject) -> None:
        row = self.rows.pop(data.draw(st.integers(0, len(self.rows) - 1)))
        for block in row.blocks:
            self.release(block)

    @rule(block=st.integers(-2, 17), num_tokens=st.integers(-1, 40))
    def misuse(self, block: int, num_tokens: int) -> None:
        if self.references[block] > 0:
            return
        calls = [
            lambda: self.pool.share(block),
            lambda: self.pool.free(block),
            lambda: self.pool.fork([], num_tokens or 1),
        ]
        for used in list(+self.references)[:1]:
            calls.append(lambda: self.pool.fork([used, block], BLOCK_SIZE + 1))  # noqa: B023
        for call in calls:
            with pytest.raises(InvalidParameterError):
                call()

    @invariant()
    def agrees(self) -> None:
        self.pool.check_integrity()
        assert self.pool.num_blocks == self.num_blocks
        assert self.pool.num_used == len(+self.references)
        assert self.pool.num_free == self.num_blocks - len(+self.references)
        for block in range(self.num_blocks):
            assert self.pool.ref_count(block) == self.references[block]

    @invariant()
    def rows_read_back(self) -> None:
        for row in self.rows:
            slots = [divmod(t, BLOCK_SIZE) for t in range(len(row.tokens))]
            assert [self.memory[row.blocks[i], offset] for i, offset in slots] == row.tokens


TestBlockPool = BlockPoolMachine.TestCase
TestBlockPool.settings = SETTINGS


class Wrapper:
    """A pool with room for a mistake."""

    def __init__(self, num_blocks: int) -> None:
        self.pool = _C.BlockPool(num_blocks)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pool, name)


class ForkForgetsReference(Wrapper):
    def fork(self, table: list[int], num_tokens: int) -> tuple[list[int], list[tuple[int, int]]]:
        child, copies = self.pool.fork(table, num_tokens)
        if num_tokens >= BLOCK_SIZE:
            self.pool.free(table[num_tokens // BLOCK_SIZE - 1])
        return child, copies


class ForkSharesPartialBlock(Wrapper):
    def fork(self, table: list[int], num_tokens: int) -> tuple[list[int], list[tuple[int, int]]]:
        child, copies = self.pool.fork(table, num_tokens)
        for src, dst in copies:
            self.pool.free(dst)
            self.pool.share(src)
            child[-1] = src
        return child, []


class FreeLeaks(Wrapper):
    def free(self, block: int) -> bool:
        is_last = self.pool.free(block)
        if is_last:
            self.pool.allocate()
        return is_last


@pytest.mark.parametrize("bug", [ForkForgetsReference, ForkSharesPartialBlock, FreeLeaks])
def test_planted_bug_is_caught(bug: type[Wrapper]) -> None:
    class Planted(BlockPoolMachine):
        make_pool = bug

    quick = settings(
        SETTINGS, database=None, max_examples=300, phases=[Phase.generate], derandomize=True
    )
    with pytest.raises((AssertionError, IVGError)):
        run_state_machine_as_test(Planted, settings=quick)


def test_a_pool_that_cannot_be() -> None:
    for num_blocks in (0, -1, 2**31 // BLOCK_SIZE):
        with pytest.raises(InvalidParameterError, match=f"num_blocks.*got {num_blocks}"):
            _C.BlockPool(num_blocks)
