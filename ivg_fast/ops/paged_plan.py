# SPDX-License-Identifier: Apache-2.0
"""What the GPU kernels of paged attention work on: a batch's rows and its work list, on a device.

The list is made by the C++ core (csrc/scheduler/work_list.h) and holds for as long as the block
tables do: a response may grow, up to the length that the list was made for, by nothing but its
entry of `response_lens` on the device. That is what lets a captured graph be replayed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ivg_fast import _C
from ivg_fast.errors import InvalidParameterError
from ivg_fast.ops.packed import PackedArrays

Ints = NDArray[np.int32]

_ITEM_FIELDS = 6
_ROW_ARRAYS = (
    "block_table",
    "query_start_loc",
    "prompt_lens",
    "response_lens",
    "response_block_start",
)
RUN_BLOCKS = 16
# Prompts and long extensions have queries enough to fill a GPU, and should not leave a partial
# result behind for every 256 keys.
_LONG_QUERY = 64
_LONG_RUN_BLOCKS = 128


@dataclass(frozen=True, slots=True)
class WorkListOptions:
    """How keys are cut into splits, and from when on rows share them.

    Attributes:
        run_blocks: the most blocks of 16 keys in a split; None: 16, or 128 where a row has more
            than 64 queries.
        min_shared_rows: neighbouring rows that share a split's keys at the least.
        min_shared_tokens: keys that they have to share at the least. A prompt of this length is cut
            off from the response whether its row has such neighbours or not, so that a result is
            put together from the same parts with sharing and without.
    """

    run_blocks: int | None = None
    min_shared_rows: int = 8
    min_shared_tokens: int = 256

    def __post_init__(self) -> None:
        for name in ("run_blocks", "min_shared_rows", "min_shared_tokens"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 2**31:
                raise InvalidParameterError(name, value, "must be positive and below 2**31")

    def run_blocks_for(self, max_query_len: int) -> int:
        """The most blocks in a split where the longest row has `max_query_len` queries."""
        if self.run_blocks is not None:
            return self.run_blocks
        return _LONG_RUN_BLOCKS if max_query_len > _LONG_QUERY else RUN_BLOCKS


class PagedPlan:
    """A batch's rows and work list in device buffers that keep their addresses.

    Args:
        device: where attention runs.
        num_rows: B; fewer may be filled in.
        num_tokens: T, likewise; queries behind the last row's attend to nothing and get zeros.
        table_width: columns of the block tables.
        tile_tokens: the most queries of an item; `Tiles` of the kernels knows what suits a layer.
        run_blocks: the most blocks of a split.
        options: see WorkListOptions; its `run_blocks` does not count here.
        num_items: room for items, which is also what every launch looks at; None: enough for any
            rows that fit.
        num_partials: room for partial results, likewise.
        response_lens: int32 [B] on the device that takes the place of the plan's own; whoever gives
            it fills it in.

    Attributes:
        block_table, query_start_loc, prompt_lens, response_block_start: int32 on the device, as
            paged_attention takes them.
        response_lens: int32 [B] on the device, this step's keys included; the caller makes it grow.
        items, token_rows, partial_starts: the work list, int32.
        max_block_id: the highest block id that is read, -1 without any.
    """

    def __init__(
        self,
        device: torch.device | str,
        *,
        num_rows: int,
        num_tokens: int,
        table_width: int,
        tile_tokens: int,
        run_blocks: int = RUN_BLOCKS,
        options: WorkListOptions | None = None,
        num_items: int | None = None,
        num_partials: int | None = None,
        response_lens: Tensor | None = None,
    ) -> None:
        self.options = options or WorkListOptions()
        self.num_rows, self.num_tokens, self.table_width = num_rows, num_tokens, table_width
        self.tile_tokens, self.run_blocks = tile_tokens, run_blocks
        self.max_block_id = -1
        # One more split than the blocks need where a prompt is cut off from its response.
        num_splits = -(-table_width // run_blocks) + 1
        if num_items is None:
            num_items = num_splits * (num_rows + num_tokens // tile_tokens)
        if num_partials is None:
            num_partials = num_splits * num_tokens
        self.num_items, self.num_partials = num_items, num_partials
        shapes: dict[str, tuple[int, ...]] = {
            "items": (num_items, _ITEM_FIELDS),
            "token_rows": (num_tokens,),
            "partial_starts": (num_tokens + 1,),
            "query_start_loc": (num_rows + 1,),
            "prompt_lens": (num_rows,),
            "response_lens": (num_rows,),
            "response_block_start": (num_rows,),
            "block_table": (num_rows, table_width),
        }
        self._packed = PackedArrays(
            device, {name: (shape, torch.int32) for name, shape in shapes.items()}
        )
        views = self._packed.views.values()
        self.items, self.token_rows, self.partial_starts, self.query_start_loc, *rows = views
        self.prompt_lens, self.response_lens, self.response_block_start, self.block_table = rows
        if response_lens is not None:
            self.response_lens = response_lens

    @classmethod
    def of_batch(
        cls,
        batch: Any,
        device: torch.device,
        tile_tokens: int,
        options: WorkListOptions | None = None,
    ) -> PagedPlan:
        """The plan of one forward, no larger than its rows need.

        Args:
            batch: a checked `_C.AttentionBatch`.
        """
        options = options or WorkListOptions()
        rows = dict(zip(_ROW_ARRAYS, batch.arrays(), strict=True))
        num_rows, table_width = rows["block_table"].shape
        run_blocks = options.run_blocks_for(batch.max_query_len)
        if batch.max_query_len <= 1 and num_rows < options.min_shared_rows:
            tile_tokens = 1  # nobody to share with: no code for large tiles
        lists, num_partials = _build_lists(rows, batch.num_tokens, tile_tokens, run_blocks, options)
        plan = cls(
            device,
            num_rows=num_rows,
            num_tokens=batch.num_tokens,
            table_width=table_width,
            tile_tokens=tile_tokens,
            run_blocks=run_blocks,
            options=options,
            num_items=len(lists["items"]),
            num_partials=num_partials,
        )
        plan.max_block_id = batch.max_block_id
        plan._packed.fill({**rows, **lists})
        return plan

    def update(
        self,
        *,
        block_table: Ints,
        query_start_loc: Ints,
        prompt_lens: Ints,
        response_lens: Ints,
        response_block_start: Ints,
        longest_response_lens: Ints | None = None,
    ) -> None:
        """Puts other rows in, at the same addresses, without waiting for the device.

        Arguments as in `paged_attention`, int32 NumPy arrays of at most B rows.

        Args:
            longest_response_lens: how long the responses may grow until the next update; the tables
                hold the blocks for that already. None: they do not grow.

        Raises:
            InvalidParameterError: something that cannot be, or does not fit the buffers.
        """
        num_rows, width = block_table.shape
        if num_rows > self.num_rows or width > self.table_width:
            raise InvalidParameterError(
                "block_table",
                (num_rows, width),
                f"must be at most ({self.num_rows}, {self.table_width}), as planned",
            )
        longest = response_lens if longest_response_lens is None else longest_response_lens
        if np.any(longest < response_lens):
            requirement = f"must reach response_lens, {response_lens.tolist()}"
            raise InvalidParameterError("longest_response_lens", longest.tolist(), requirement)
        missing = self.num_rows - num_rows
        rows = {
            "block_table": np.pad(block_table, ((0, missing), (0, self.table_width - width))),
            "query_start_loc": np.pad(query_start_loc, (0, missing), mode="edge"),
            "prompt_lens": np.pad(prompt_lens, (0, missing)),
            "response_lens": np.pad(longest, (0, missing)),
            "response_block_start": np.pad(response_block_start, (0, missing)),
        }
        batch = make_batch(*(rows[name] for name in _ROW_ARRAYS))
        lists, num_partials = _build_lists(
            rows, self.num_tokens, self.tile_tokens, self.run_blocks, self.options
        )
        for name, needed in (("num_items", len(lists["items"])), ("num_partials", num_partials)):
            if needed > getattr(self, name):
                raise InvalidParameterError(name, getattr(self, name), f"must be at least {needed}")
        rows["response_lens"] = np.pad(response_lens, (0, missing))
        self.max_block_id = batch.max_block_id
        self._packed.fill({**rows, **lists})


def make_batch(table: Any, *others: Any) -> Any:
    """The checked `_C.AttentionBatch` of a table and the other arrays in paged_attention's order.

    Args: contiguous int32 tensors on the CPU or NumPy arrays; they are copied.

    Raises:
        InvalidParameterError: an index that points outside the table.
    """
    addresses = [a.data_ptr() if isinstance(a, Tensor) else a.ctypes.data for a in others]
    first = table.data_ptr() if isinstance(table, Tensor) else table.ctypes.data
    batch = _C.make_attention_batch(first, table.shape[1], *addresses, len(table))
    if isinstance(batch, tuple):
        raise InvalidParameterError(*batch)
    return batch


def _build_lists(
    rows: dict[str, Ints],
    num_tokens: int,
    tile_tokens: int,
    run_blocks: int,
    options: WorkListOptions,
) -> tuple[dict[str, Ints], int]:
    """items (no empty ones), token_rows and partial_starts; the number of partial results."""
    num_rows, width = rows["block_table"].shape
    num_splits = -(-width // run_blocks) + 1
    lists = {
        "items": np.empty((num_splits * (num_rows + num_tokens // tile_tokens), 6), np.int32),
        "token_rows": np.empty(num_tokens, np.int32),
        "partial_starts": np.empty(num_tokens + 1, np.int32),
    }
    num_items, num_partials = _C.build_work_list(
        **rows,
        **lists,
        tile_tokens=tile_tokens,
        run_blocks=run_blocks,
        min_shared_rows=options.min_shared_rows,
        min_shared_tokens=options.min_shared_tokens,
        max_partials=2**31 - 1,
    )
    lists["items"] = lists["items"][:num_items]
    return lists, num_partials
