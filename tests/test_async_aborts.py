# SPDX-License-Identifier: Apache-2.0
"""Clients of an AsyncEngine that abort, cancel or go away, at any step, by the hundred."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable

import pytest
from async_cases import SEARCH, SINGLE, alone_outputs, make_engine, on_steps, serve, tokens

from ivg_fast import AsyncEngine, Engine, InvalidParameterError, RequestOutput, SearchParams
from ivg_fast.burst import BurstRunner
from ivg_fast.streaming import TextStream, TokenKinds


@pytest.fixture(scope="module")
def alone() -> dict[str, RequestOutput]:
    return alone_outputs()


class Leaving:
    """Calls `go` once, at step `at` of the engine, between steps or inside the burst."""

    def __init__(self, engine: Engine, monkeypatch, *, is_in_flight: bool) -> None:
        self.at = self.step = 0
        self.has_gone = False
        self.go: Callable[[], object] = bool
        run = BurstRunner.run

        def in_burst(burst, *args):
            if is_in_flight:
                self._look()
            return run(burst, *args)

        def before_step(_: int) -> None:
            if not is_in_flight:
                self._look()
            self.step += 1

        monkeypatch.setattr(BurstRunner, "run", in_burst)
        on_steps(engine, before_step)

    def start(self, at: int, go: Callable[[], object]) -> None:
        self.at, self.go, self.step, self.has_gone = at, go, 0, False

    def _look(self) -> None:
        if self.step >= self.at and not self.has_gone:
            self.has_gone = True
            self.go()


@pytest.mark.parametrize("is_in_flight", [False, True])
@pytest.mark.parametrize("params", [SINGLE, SEARCH], ids=["single", "search"])
@pytest.mark.parametrize("how", ["abort", "cancel", "close"])
def test_a_client_that_goes_at_every_step(
    monkeypatch, alone, how: str, params: SearchParams, is_in_flight: bool
) -> None:
    """Its neighbour never notices, and its blocks come back."""
    engine = make_engine(max_prefill_tokens=2, max_burst_steps=2)
    leaving = Leaving(engine, monkeypatch, is_in_flight=is_in_flight)
    whole = tokens(alone["single" if params is SINGLE else "search"])

    async def client(served: AsyncEngine) -> RequestOutput | None:
        stream = served.stream("hello", params, request_id="going")
        try:
            async for event in stream:
                if event.output is not None:
                    return event.output
                if how == "close" and leaving.has_gone:
                    return None
        finally:
            await stream.aclose()
        return None

    async def one_that_goes(served: AsyncEngine, at: int) -> RequestOutput | None:
        loop = asyncio.get_running_loop()
        going = asyncio.ensure_future(client(served))
        go: Callable[[], object] = bool
        if how == "abort":
            go = functools.partial(served.abort, "going")
        elif how == "cancel":
            go = functools.partial(loop.call_soon_threadsafe, going.cancel)
        leaving.start(at, go)
        stays = asyncio.ensure_future(served.generate("hello", SINGLE))
        assert tokens(await stays) == tokens(alone["single"])
        (output,) = await asyncio.gather(going, return_exceptions=True)
        while engine.has_unfinished:
            await asyncio.sleep(0.001)
        assert engine.stats()["num_blocks_used"] == 0
        if isinstance(output, Exception):
            raise output
        return output if isinstance(output, RequestOutput) else None

    async def clients(served: AsyncEngine) -> None:
        reasons = []
        for at in range(12):
            output = await one_that_goes(served, at)
            if output is None:
                continue
            reasons.append(output.outputs[0].finish_reason)
            got = tokens(output)
            if reasons[-1] == "abort":
                assert len(got) < len(whole)
                assert params is SEARCH or got == whole[: len(got)]
            else:
                assert got == whole
        assert how != "abort" or reasons.count("abort") > 8

    serve(engine, clients)


def test_aborts_are_idempotent_and_of_any_name() -> None:
    async def clients(served: AsyncEngine) -> None:
        assert not served.abort("nobody")
        with pytest.raises(InvalidParameterError, match=r"request_id.*7"):
            served.abort(7)
        task = asyncio.ensure_future(served.generate("hello", SINGLE, request_id="a"))
        await asyncio.sleep(0)
        assert served.abort("a")  # before its prompt has been read
        served.abort("a")
        assert (await task).outputs[0].finish_reason == "abort"
        assert not served.abort("a")
        output = await served.generate("hello", SINGLE, request_id="a")  # the name is free again
        assert output.outputs[0].finish_reason == "length"
        assert not served.abort("a")

    serve(make_engine(), clients)


def test_clients_whose_loop_is_closed(alone) -> None:
    """Nobody can be told, so the request ends; the others are served."""
    engine = make_engine()
    params = SearchParams(max_tokens=200, ignore_eos=True)

    async def clients(served: AsyncEngine) -> None:
        async def leave() -> None:
            text = TextStream(engine.tokenizer, TokenKinds())
            client = served._open(None, text)
            await served._admit(client, "hello", params, None)

        await asyncio.to_thread(asyncio.run, leave())
        num_steps = 0
        while engine.has_unfinished:
            output = await served.generate("hello", SINGLE)
            assert tokens(output) == tokens(alone["single"])
            num_steps += 5
        assert num_steps < 50  # of bursts of 4

    serve(engine, clients)


@pytest.mark.parametrize("is_in_flight", [False, True])
def test_half_of_a_thousand_requests_are_aborted(monkeypatch, is_in_flight: bool) -> None:
    """Their blocks are free by the next step: at once, or when the burst in flight is committed."""
    params = SearchParams(max_tokens=12, ignore_eos=True, seed=1)
    options = {"max_num_rows": 1000, "num_blocks": 2000, "max_prefill_tokens": 3000}
    with make_engine(**options) as engine:
        ids = [engine.add_request([1, 2, i % 90], params) for i in range(1000)]
        engine.step()
        before = engine.stats()
        assert (before["num_requests_running"], before["num_blocks_used"]) == (1000, 2000)
        run = BurstRunner.run

        def aborts(self, *args):
            for request_id in ids[::2]:
                assert engine.abort(request_id)
            return run(self, *args)

        if is_in_flight:
            monkeypatch.setattr(BurstRunner, "run", aborts)
        else:
            for request_id in ids[::2]:
                assert engine.abort(request_id)
            after = engine.stats()
            assert (after["num_requests_running"], after["num_blocks_used"]) == (500, 1000)
        ended = dict(engine.step())
        monkeypatch.undo()
        engine.check_integrity()
        assert set(ended) == set(ids[::2])
        assert {output.outputs[0].finish_reason for output in ended.values()} == {"abort"}
        lengths = {len(output.outputs[0].token_ids) for output in ended.values()}
        assert lengths == {8 if is_in_flight else 4}
        after = engine.stats()
        assert (after["num_requests_running"], after["num_blocks_used"]) == (500, 1000)
        assert set(dict(engine.step())) == set(ids[1::2])
        assert engine.stats()["num_blocks_used"] == 0


def test_a_thousand_clients_half_of_whom_go() -> None:
    engine = make_engine(max_num_rows=1000, num_blocks=2000)
    params = SearchParams(max_tokens=60, ignore_eos=True, seed=1)

    async def clients(served: AsyncEngine) -> None:
        tasks = [asyncio.ensure_future(served.generate([1, i % 90], params)) for i in range(1000)]
        while engine.stats()["num_requests_running"] < 100:
            await asyncio.sleep(0.001)
        for task in tasks[::4]:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results[::4])
        rest = [result for i, result in enumerate(results) if i % 4]
        assert {len(tokens(result)) for result in rest} == {60}

    serve(engine, clients)
