# SPDX-License-Identifier: Apache-2.0
"""Which blocks of a KV pool hold the keys and values of which token prefixes.

A tree of blocks: a node is a block of 1 to 16 tokens behind those of its ancestors. A text takes
the full blocks that it has in common with older texts, copies the one that it has in part, and adds
its own. Unlike the engine's beams, texts that are tokenised again each time have no ancestry to
follow: equal tokens are found by the tokens themselves.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from ivg_fast.errors import CapacityError
from ivg_fast.models.batch import BLOCK_SIZE


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a text's keys and values stand.

    Attributes:
        table: its block ids, in order.
        num_cached: tokens whose keys and values are there already; fewer than the text has.
        copy: (source, target) blocks to copy before anything is written; None: nothing.
    """

    table: list[int]
    num_cached: int
    copy: tuple[int, int] | None


@dataclass(slots=True, eq=False)
class _Node:
    tokens: tuple[int, ...]
    block: int
    parent: _Node | None
    created: int  # the round in which its keys and values are computed
    used: int  # the last round that needs it
    children: dict[tuple[int, ...], _Node] = field(default_factory=dict)


class PrefixCache:
    """The books of a pool of `num_blocks` blocks; what was used longest ago gives way."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.clear()

    def clear(self) -> None:
        """Forgets every text."""
        self._free = list(range(self.num_blocks))
        self._root = _Node((), -1, None, 0, 0)
        # Oldest use first. A node is used whenever one behind it is, and stands after it: so the
        # first has no children.
        self._nodes: OrderedDict[int, _Node] = OrderedDict()
        self._temporary: list[int] = []
        self._round = 0
        self._num_in_use = 0

    def begin_round(self) -> None:
        """A round is one forward: what it takes stays until the next begins."""
        self._free += self._temporary
        self._temporary = []
        self._round += 1
        self._num_in_use = 0

    def take(self, token_ids: Sequence[int]) -> Placement | None:
        """Places a text of one token or more; None where this round has no room left for it.

        At least its last token is left to compute. Full blocks that another text of the round
        writes are shared at once: a forward writes all keys of a layer before it reads any.

        Raises:
            CapacityError: it would not fit in a round of its own.
        """
        ids, size = tuple(token_ids), len(token_ids)
        needed = -(-size // BLOCK_SIZE)
        if needed >= self.num_blocks:  # one more may be pinned as the source of a copy
            raise CapacityError(
                f"a text of {size} tokens needs {needed + 1} KV blocks of {BLOCK_SIZE}, the value "
                f"model has {self.num_blocks}"
            )
        path = self._walk(ids)
        start = len(path) * BLOCK_SIZE
        parent = path[-1] if path else self._root
        source, num_common = self._closest_child(parent, ids[start : size - 1])
        for node in reversed((*path, *([source] if source else []))):
            self._pin(node)
        num_new = needed - len(path)
        if num_new > len(self._free) + len(self._nodes) - self._num_in_use:
            return None
        blocks = [self._allocate() for _ in range(num_new)]
        new: list[_Node] = []
        for block in blocks:
            begin = (len(path) + len(new)) * BLOCK_SIZE
            tokens = ids[begin : begin + BLOCK_SIZE]
            if tokens in parent.children:  # only the last block can be there already
                self._temporary.append(block)
                break
            parent.children[tokens] = _Node(tokens, block, parent, self._round, self._round)
            parent = parent.children[tokens]
            self._nodes[block] = parent
            self._num_in_use += 1
            new.append(parent)
        for node in reversed((*path, *new)):
            self._nodes.move_to_end(node.block)
        return Placement(
            table=[*(node.block for node in path), *blocks],
            num_cached=start + num_common,
            copy=(source.block, blocks[0]) if source else None,
        )

    def _walk(self, ids: tuple[int, ...]) -> list[_Node]:
        """The nodes that hold the text's first full blocks, the last token's block left out."""
        path: list[_Node] = []
        node = self._root
        for begin in range(0, len(ids) - BLOCK_SIZE, BLOCK_SIZE):
            child = node.children.get(ids[begin : begin + BLOCK_SIZE])
            if child is None:
                break
            path.append(child)
            node = child
        return path

    def _closest_child(self, parent: _Node, ids: tuple[int, ...]) -> tuple[_Node | None, int]:
        """The computed child with the longest common prefix with `ids`, and its length."""
        best, longest = None, 0
        for child in parent.children.values():
            if child.created < self._round:
                common = _common_prefix(child.tokens, ids)
                if common > longest:
                    best, longest = child, common
        return best, longest

    def _pin(self, node: _Node) -> None:
        self._nodes.move_to_end(node.block)
        if node.used < self._round:
            node.used = self._round
            self._num_in_use += 1

    def _allocate(self) -> int:
        if self._free:
            return self._free.pop()
        block, node = self._nodes.popitem(last=False)
        assert node.used < self._round
        assert node.parent is not None
        assert not node.children
        del node.parent.children[node.tokens]
        return block


def _common_prefix(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))
