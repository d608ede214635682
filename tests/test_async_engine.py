# SPDX-License-Identifier: Apache-2.0
"""AsyncEngine: streams, what is refused, a full queue, deadlines, scorers that hang or raise."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import threading
from typing import Any

import pytest
from async_cases import (
    SEARCH,
    SINGLE,
    alone_outputs,
    checked,
    collect,
    make_engine,
    on_steps,
    serve,
    tokens,
    wait_until,
)
from engine_cases import text_score

from ivg_fast import (
    AsyncEngine,
    CapacityError,
    InvalidParameterError,
    QueueFullError,
    RequestOutput,
    ScorerError,
    SearchParams,
    StreamEvent,
)
from ivg_fast.client import Client, deliver


@pytest.fixture(scope="module")
def alone() -> dict[str, RequestOutput]:
    return alone_outputs()


def test_a_stream_of_a_single_candidate(alone) -> None:
    async def clients(served: AsyncEngine) -> None:
        events = await collect(served, "hello", SINGLE, request_id="mine")
        assert tokens(checked(events)) == tokens(alone["single"])
        assert {event.request_id for event in events} == {"mine"}
        assert [len(event.token_ids) for event in events] == [2] * 10

    serve(make_engine(max_stream_steps=2, max_burst_steps=16), clients)


def test_events_come_in_their_order() -> None:
    """However many wait for an event loop at once."""

    async def run() -> None:
        made = [Client(str(i), None) for i in range(3)]
        for first in (0, 10):
            events = [StreamEvent("", str(n), ()) for n in range(first, first + 10)]
            assert not deliver((made[int(event.text) % 3], event) for event in events)
        for i, client in enumerate(made):
            texts = [(await client.next_event()).text for _ in range(i, 20, 3)]
            assert texts == [str(n) for n in range(i, 20, 3)]

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_stream_of_a_search(alone) -> None:
    async def clients(served: AsyncEngine) -> None:
        events = await collect(served, "hello", SEARCH)
        assert tokens(checked(events)) == tokens(alone["search"])
        # One survivor decides its chunk at each selection, before that what its children share.
        one = dataclasses.replace(SEARCH, beam_width=1, num_candidates=4)
        events = await collect(served, "hello", one)
        assert len(tokens(checked(events))) == 20
        assert len(events) >= 5
        decided = list(itertools.accumulate(len(event.token_ids) for event in events))
        assert {1, 2, 3, 4, 5} <= {length // 4 for length in decided}
        output = await served.generate("hello", SEARCH)
        assert tokens(output) == tokens(alone["search"])

    serve(make_engine(), clients)


def test_what_is_refused() -> None:
    async def clients(served: AsyncEngine) -> None:
        with pytest.raises(CapacityError):
            await served.generate("hello", SearchParams(max_tokens=10**4))
        with pytest.raises(InvalidParameterError, match="params must be SearchParams"):
            await collect(served, "hello", {"max_tokens": 3})  # type: ignore[arg-type]
        with pytest.raises(InvalidParameterError, match="guidance needs tuned"):
            await collect(served, "hello", SearchParams.eft(max_tokens=3))
        with pytest.raises(InvalidParameterError, match="request_id must be a string, got 3"):
            await served.generate("hello", SINGLE, request_id=3)  # type: ignore[arg-type]
        task = asyncio.ensure_future(served.generate("hello", SINGLE, request_id="a"))
        await asyncio.sleep(0)
        with pytest.raises(InvalidParameterError, match="must not be a live request's"):
            await served.generate("hello", SINGLE, request_id="a")
        await task

    serve(make_engine(), clients)


def test_a_full_queue_refuses_at_once(released: threading.Event, alone) -> None:
    engine = make_engine(max_queued_requests=2)
    stands = threading.Event()

    def stand_still(step: int) -> None:
        if step == 1:
            stands.set()
            released.wait()

    on_steps(engine, stand_still)

    async def clients(served: AsyncEngine) -> None:
        first = asyncio.ensure_future(served.generate("hello", SINGLE))
        await asyncio.to_thread(stands.wait)
        tasks = [asyncio.ensure_future(served.generate("hello", SINGLE)) for _ in range(6)]
        done: set = set()
        while len(done) < 4:  # while the engine's thread stands still
            more, _ = await asyncio.wait(set(tasks) - done, return_when="FIRST_COMPLETED")
            done |= more
        assert {type(task.exception()) for task in done} == {QueueFullError}
        released.set()
        accepted = [await task for task in (first, *tasks) if task not in done]
        assert len(accepted) == 3
        assert all(tokens(output) == tokens(alone["single"]) for output in accepted)

    serve(engine, clients)


def test_a_full_queue_refuses_before_a_prompt_is_read(
    monkeypatch, released: threading.Event
) -> None:
    """While the thread that reads prompts is busy, too."""
    engine = make_engine(max_queued_requests=1)
    create = engine._factory.create

    def slow(prompts: Any, *rest: Any) -> Any:
        if prompts == ["long"]:
            released.wait()
        return create(prompts, *rest)

    monkeypatch.setattr(engine._factory, "create", slow)
    on_steps(engine, lambda _: released.wait() and None)

    async def clients(served: AsyncEngine) -> None:
        queued = asyncio.ensure_future(served.generate("hello", SINGLE))
        while engine.has_room:
            await asyncio.sleep(0.001)
        with monkeypatch.context() as patch:
            patch.setattr(type(engine), "has_room", True)  # one that looked before
            long = asyncio.ensure_future(served.generate("long", SINGLE))
            await asyncio.sleep(0)
        try:
            with pytest.raises(QueueFullError):
                await asyncio.wait_for(served.generate("hello", SINGLE), 30)
        finally:
            released.set()
        await asyncio.gather(queued, long, return_exceptions=True)

    serve(engine, clients)


def test_prompts_are_read_off_the_loop(monkeypatch) -> None:
    engine = make_engine()
    read = threading.Event()
    create = engine._factory.create

    def slow(*args):
        assert read.wait(60), "the loop stood still while a prompt was read"
        return create(*args)

    monkeypatch.setattr(engine._factory, "create", slow)

    async def clients(served: AsyncEngine) -> None:
        task = asyncio.ensure_future(served.generate("hello", SINGLE))
        for _ in range(100):
            await asyncio.sleep(0)
        read.set()
        await task

    serve(engine, clients)


def test_a_scorer_that_hangs_stalls_nobody(released: threading.Event, alone) -> None:
    def hangs(inputs):
        released.wait()
        return text_score(inputs)

    engine = make_engine()
    num_steps = 0

    def count(step: int) -> None:
        nonlocal num_steps
        num_steps = step

    on_steps(engine, count)

    async def clients(served: AsyncEngine) -> None:
        params = SearchParams.cbs(max_tokens=8, num_candidates=2, chunk_length=4, scorer=hangs)
        slow = asyncio.ensure_future(served.generate("hello", params))
        outputs = await asyncio.gather(
            *(served.generate("hello", p) for p in (SINGLE, SEARCH) for _ in range(3))
        )
        assert [tokens(o) for o in outputs[:3]] == [tokens(alone["single"])] * 3
        assert [tokens(o) for o in outputs[3:]] == [tokens(alone["search"])] * 3
        before = num_steps
        await asyncio.sleep(0.05)
        assert num_steps <= before + 2  # it waits, and does not ask again and again
        hurried = SearchParams(
            max_tokens=8, num_candidates=2, chunk_length=4, scorer=hangs, deadline_s=0.05
        )
        output = await served.generate("hello", hurried)
        assert output.outputs[0].finish_reason == "deadline"
        assert len(tokens(output)) == 4
        assert not slow.done()
        released.set()
        assert (await slow).outputs[0].finish_reason in ("length", "stop")
        before = num_steps
        await asyncio.sleep(0.05)
        assert num_steps == before  # idle

    serve(engine, clients)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_request_that_ends_before_its_client_knows_its_number(alone, is_streamed: bool) -> None:
    engine = make_engine()
    add = engine.add_request

    async def clients(served: AsyncEngine) -> None:
        def slow(*args: Any, **options: Any) -> int:
            number = add(*args, **options)
            served._work.set()
            wait_until(lambda: bool(served._unclaimed))
            return number

        engine.add_request = slow  # type: ignore[method-assign]
        if is_streamed:
            output = checked(await collect(served, "hello", SINGLE))
        else:
            output = await served.generate("hello", SINGLE)
        assert tokens(output) == tokens(alone["single"])

    serve(engine, clients)


def test_deadlines() -> None:
    async def clients(served: AsyncEngine) -> None:
        for params in (SINGLE, SEARCH):
            hurried = dataclasses.replace(params, deadline_s=0.0)
            output = checked(await collect(served, "hello", hurried))
            assert output.outputs[0].finish_reason == "deadline"

    serve(make_engine(), clients)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_what_a_scorer_raises_is_its_clients_alone(alone, error) -> None:
    def fails(inputs):
        raise error("planted")

    async def clients(served: AsyncEngine) -> None:
        params = SearchParams.best_of_n(2, max_tokens=3, scorer=fails)
        results = await asyncio.gather(
            served.generate("hello", params),
            collect(served, "hello", params),
            served.generate("hello", SINGLE),
            return_exceptions=True,
        )
        assert [type(result) for result in results[:2]] == [ScorerError] * 2
        assert error.__name__ in str(results[0])
        assert tokens(results[2]) == tokens(alone["single"])
        assert tokens(await served.generate("hello", SINGLE)) == tokens(alone["single"])

    serve(make_engine(), clients)


@pytest.mark.parametrize("is_once", [False, True])
def test_a_text_that_cannot_be_decoded_fails_its_stream_alone(
    monkeypatch, alone, is_once: bool
) -> None:
    """Also where the text of what there is at its end can be had again."""
    engine = make_engine()
    decode = engine.tokenizer.decode
    failed: list[int] = []

    def fails(ids, **options):
        if 7 <= len(ids) <= 8 and not (is_once and failed):
            failed.append(len(ids))
            raise UnicodeError("planted failure")
        return decode(ids, **options)

    monkeypatch.setattr(engine.tokenizer, "decode", fails)

    async def clients(served: AsyncEngine) -> None:
        bad, good = await asyncio.gather(
            collect(served, "hello", SINGLE),
            served.generate("hello", SINGLE),
            return_exceptions=True,
        )
        assert isinstance(bad, UnicodeError)
        assert tokens(good) == tokens(alone["single"])

    serve(engine, clients)
