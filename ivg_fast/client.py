# SPDX-License-Identifier: Apache-2.0
"""A client of an AsyncEngine: what it gets, and the way there from the engine's thread."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from ivg_fast.errors import ScorerError
from ivg_fast.outputs import RequestOutput
from ivg_fast.streaming import TextStream


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """What has been decided of a response since the event before.

    Attributes:
        request_id: the request's.
        text: more of the response's text; characters, and what may become a stop string, are held
            back until they are whole.
        token_ids: more of its tokens. The text may lag behind them.
        output: the request's output, with the last event; None before.
    """

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    output: RequestOutput | None = None


class Client:
    """One waiting task; made on its event loop.

    Attributes:
        text: for streams, detokenises; None: only the output is wanted.
        number: the engine's request id, once it has one.
        is_aborted: its request has to end; it waits for the output.
        is_closed: nobody waits any more.
        error: why its request was ended, instead of an output.
    """

    def __init__(self, request_id: str, text: TextStream | None) -> None:
        self.request_id = request_id
        self.text = text
        self.number: int | None = None
        self.is_aborted = False
        self.is_closed = False
        self.error: BaseException | None = None
        self.loop = asyncio.get_running_loop()
        self._num_tokens = 0
        self._items: asyncio.Queue[StreamEvent | BaseException] = asyncio.Queue()

    async def next_event(self) -> StreamEvent:
        """Waits for the next event; raises what the request failed with."""
        item = await self._items.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def decided(self, token_ids: Sequence[int]) -> StreamEvent:
        """The event of tokens that have been decided."""
        assert self.text is not None
        self._num_tokens += len(token_ids)
        return StreamEvent(self.request_id, self.text.push(token_ids), tuple(token_ids))

    def last(self, output: RequestOutput | BaseException) -> StreamEvent | BaseException:
        """What a client gets at the end."""
        if self.error is not None:
            return self.error
        if not isinstance(output, RequestOutput):
            if isinstance(output, Exception):
                return output
            error = ScorerError(f"a scorer raised {type(output).__name__}")  # ends no event loop
            error.__cause__ = output
            return error
        best = output.outputs[0]
        text = best.text if self.text is None else self.text.finish(best.text)
        left = tuple(best.token_ids[self._num_tokens :])
        return StreamEvent(self.request_id, text, left, output)

    def put(self, item: StreamEvent | BaseException) -> None:
        """On the client's event loop."""
        self._items.put_nowait(item)


_Delivery = tuple[Client, StreamEvent | BaseException]
_DELIVERIES_PER_TURN = 4

# What an event loop has yet to hand out; each entry is touched by its loop's thread alone.
_UNDELIVERED: WeakKeyDictionary[asyncio.AbstractEventLoop, deque[_Delivery]] = WeakKeyDictionary()


def deliver(items: Iterable[_Delivery]) -> list[Client]:
    """Hands each client its item, from any thread: one call a loop, in order.

    Returns:
        Clients that are gone, as their loop is closed.
    """
    lost: list[Client] = []
    by_loop: dict[asyncio.AbstractEventLoop, list[_Delivery]] = {}
    for client, item in items:
        by_loop.setdefault(client.loop, []).append((client, item))
    for loop, of_loop in by_loop.items():
        try:
            loop.call_soon_threadsafe(_put_all, loop, of_loop)
        except RuntimeError:  # the loop is closed, and its tasks with it
            lost += [client for client, _ in of_loop]
    return lost


def _put_all(loop: asyncio.AbstractEventLoop, items: Iterable[_Delivery]) -> None:
    undelivered = _UNDELIVERED.setdefault(loop, deque())
    is_at_it = bool(undelivered)
    undelivered.extend(items)
    if not is_at_it:
        _put_some(loop, undelivered)


def _put_some(loop: asyncio.AbstractEventLoop, undelivered: deque[_Delivery]) -> None:
    """A few at each turn of the loop: what they wake writes to as many connections before anything
    else gets its turn."""
    for _ in range(min(_DELIVERIES_PER_TURN, len(undelivered))):
        client, item = undelivered.popleft()
        client.put(item)
    if undelivered:
        loop.call_soon(_put_some, loop, undelivered)
