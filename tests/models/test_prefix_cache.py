# SPDX-License-Identifier: Apache-2.0
"""The tree of cached prefixes on a naive pool, where a slot holds all the tokens up to its own."""

from __future__ import annotations

import random

import pytest
from engine_cases import fresh_seed

from ivg_fast.errors import CapacityError
from ivg_fast.models.prefix_cache import Placement, PrefixCache

BLOCK = 16


class Pool:
    """Writes a round at once, as a forward does, and says what a row then reads."""

    def __init__(self, num_blocks: int) -> None:
        self.slots: list[tuple[int, ...] | None] = [None] * (num_blocks * BLOCK)

    def run(self, texts: list[tuple[int, ...]], placed: list[Placement]) -> int:
        targets = [p.copy[1] for p in placed if p.copy]
        sources = {p.copy[0] for p in placed if p.copy}
        assert len(set(targets)) == len(targets)
        assert not sources.intersection(targets)
        for p in placed:
            if p.copy:
                source, target = (block * BLOCK for block in p.copy)
                self.slots[target : target + BLOCK] = self.slots[source : source + BLOCK]
        written = set()
        for ids, p in zip(texts, placed, strict=True):
            assert 0 <= p.num_cached < len(ids)
            assert len(p.table) == -(-len(ids) // BLOCK)
            for i in range(p.num_cached, len(ids)):
                slot = p.table[i // BLOCK] * BLOCK + i % BLOCK
                assert slot not in written, "a slot is written twice"
                written.add(slot)
                self.slots[slot] = ids[: i + 1]
        for ids, p in zip(texts, placed, strict=True):
            for i in range(len(ids)):
                assert self.slots[p.table[i // BLOCK] * BLOCK + i % BLOCK] == ids[: i + 1]
        return len(written)


def grown(rng: random.Random, texts: list[tuple[int, ...]]) -> tuple[int, ...]:
    """A text of two tokens' alphabet: an older one cut somewhere and continued, or a new one."""
    start = rng.choice(texts) if texts and rng.random() < 0.9 else ()
    start = start[: len(start) - rng.choice([0, 0, 0, 1, 3, 20])] if start else start
    return (start + tuple(rng.choices(range(2), k=rng.choice([1, 2, 5, 16, 17, 40]))))[:120]


@pytest.mark.parametrize("num_blocks", [9, 20, 60, 400])
def test_what_is_read_is_what_was_written(num_blocks: int) -> None:
    rng = random.Random(fresh_seed())
    cache, pool = PrefixCache(num_blocks), Pool(num_blocks)
    known: list[tuple[int, ...]] = []
    for _ in range(60):
        waiting = list(dict.fromkeys(grown(rng, known) for _ in range(rng.randint(1, 8))))
        known = (known + waiting)[-30:]
        while waiting:
            cache.begin_round()
            placed = []
            for ids in waiting:
                placement = cache.take(ids)
                if placement is None:
                    break
                placed.append(placement)
            assert placed, "a round of its own has room for any text that fits"
            pool.run(waiting[: len(placed)], placed)
            waiting = waiting[len(placed) :]


def test_the_longest_common_prefix_is_not_computed_again() -> None:
    cache, pool = PrefixCache(40), Pool(40)
    text = tuple(range(50))

    def cost(*texts: tuple[int, ...]) -> int:
        cache.begin_round()
        placed = [cache.take(ids) for ids in texts]
        return pool.run(list(texts), [p for p in placed if p is not None])

    assert cost(text) == 50
    assert cost((*text, 7, 8, 9)) == 3
    assert cost((*text[:48], 99, 98)) == 2  # the last tokens were tokenised otherwise
    assert cost(text) == 1  # the last token's output is wanted again
    assert cost((*text[:20], 5)) == 1
    # Texts of one round share the full blocks: 64 tokens here, 4 and 5 behind them.
    new = tuple(range(100, 164))
    assert cost((*new, 1, 2, 3, 4), (*new, 9, 8, 7, 6, 5)) == 64 + 4 + 5


def test_what_was_used_longest_ago_gives_way() -> None:
    cache, pool = PrefixCache(8), Pool(8)
    a, b, c = (tuple(range(i, i + 40)) for i in (0, 100, 200))
    # The ends of b go first, as far as room is needed: its first block is still there.
    for text, cost in ((a, 40), (b, 40), (a, 1), (c, 40), (a, 1), (b, 24)):
        cache.begin_round()
        placement = cache.take(text)
        assert placement is not None
        assert pool.run([text], [placement]) == cost


def test_a_text_that_cannot_fit() -> None:
    cache = PrefixCache(4)
    cache.begin_round()
    assert cache.take(range(48)) is not None
    with pytest.raises(CapacityError, match=r"49 tokens needs 5 KV blocks of 16, .* has 4"):
        cache.take(range(49))
