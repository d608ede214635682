# SPDX-License-Identifier: Apache-2.0
"""AsyncEngine: clients that stream, abort and go away; a full queue, shutdowns, failures."""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from async_cases import checked, collect, serve
from engine_cases import text_score
from tiny_models import tiny_model, tiny_tokenizer

from ivg_fast import (
    AsyncEngine,
    CapacityError,
    Engine,
    EngineConfig,
    EngineStoppedError,
    InvalidParameterError,
    IVGError,
    QueueFullError,
    RequestOutput,
    ScorerError,
    SearchParams,
)
from ivg_fast.burst import BurstRunner
from ivg_fast.streaming import TextStream, TokenKinds

SINGLE = SearchParams(max_tokens=20, seed=3, ignore_eos=True)
SEARCH = SearchParams.cbs(
    max_tokens=20,
    beam_width=2,
    num_candidates=2,
    chunk_length=4,
    scorer=text_score,
    seed=5,
    ignore_eos=True,
)


def make_engine(**config: Any) -> Engine:
    options = {"num_blocks": 400, "num_threads": 1, "max_burst_steps": 4, **config}
    return Engine(tiny_model("gpt2", seed=1), tiny_tokenizer(), config=EngineConfig(**options))


@pytest.fixture(scope="module")
def alone() -> dict[str, RequestOutput]:
    with make_engine() as engine:
        single, search = engine.generate(["hello", "hello"], [SINGLE, SEARCH], seeds=[3, 5])
    return {"single": single, "search": search}


def tokens(output: RequestOutput) -> list[int]:
    return output.outputs[0].token_ids


@pytest.fixture
def released() -> Iterator[threading.Event]:
    """What hangs waits for this event; it is set at the end."""
    event = threading.Event()
    yield event
    event.set()


def on_steps(engine: Engine, call: Callable[[int], None]) -> None:
    """Calls with its number before each step, on the engine's thread."""
    real, count = engine.step, iter(range(10**9))

    def step():
        call(next(count))
        return real()

    engine.step = step  # type: ignore[method-assign]


def test_a_stream_of_a_single_candidate(alone) -> None:
    async def clients(served: AsyncEngine) -> None:
        events = await collect(served, "hello", SINGLE, request_id="mine")
        assert tokens(checked(events)) == tokens(alone["single"])
        assert {event.request_id for event in events} == {"mine"}
        assert [len(event.token_ids) for event in events] == [2] * 10

    serve(make_engine(max_stream_steps=2, max_burst_steps=16), clients)


def test_a_stream_of_a_search(alone) -> None:
    async def clients(served: AsyncEngine) -> None:
        events = await collect(served, "hello", SEARCH)
        assert tokens(checked(events)) == tokens(alone["search"])
        # One survivor decides its chunk at each selection, before that what its children share.
        one = SearchParams(**{**_fields(SEARCH), "beam_width": 1, "num_candidates": 4})
        events = await collect(served, "hello", one)
        assert len(tokens(checked(events))) == 20
        assert len(events) >= 5
        decided = list(itertools.accumulate(len(event.token_ids) for event in events))
        assert {1, 2, 3, 4, 5} <= {length // 4 for length in decided}
        output = await served.generate("hello", SEARCH)
        assert tokens(output) == tokens(alone["search"])

    serve(make_engine(), clients)


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


def test_deadlines() -> None:
    async def clients(served: AsyncEngine) -> None:
        for params in (SINGLE, SEARCH):
            hurried = SearchParams(**{**_fields(params), "deadline_s": 0.0})
            output = checked(await collect(served, "hello", hurried))
            assert output.outputs[0].finish_reason == "deadline"

    serve(make_engine(), clients)


def _fields(params: SearchParams) -> dict[str, Any]:
    return {name: getattr(params, name) for name in params.__dataclass_fields__}


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


def test_a_text_that_cannot_be_decoded_fails_its_stream_alone(monkeypatch, alone) -> None:
    engine = make_engine()
    decode = engine.tokenizer.decode

    def fails(ids, **options):
        if 7 <= len(ids) <= 8:
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


def test_draining() -> None:
    async def run() -> None:
        served = AsyncEngine(make_engine())
        tasks = [asyncio.ensure_future(served.generate("hello", SINGLE)) for _ in range(8)]
        await asyncio.sleep(0)
        await asyncio.gather(served.shutdown(), served.shutdown(drain=True))
        assert {(await task).outputs[0].finish_reason for task in tasks} == {"length"}
        for _ in range(2):
            with pytest.raises(EngineStoppedError, match="shut down"):
                await served.generate("hello", SINGLE)
            await served.shutdown(drain=False)
        assert not served.abort("nobody")
        served._thread.join(60)
        assert not served._thread.is_alive()

    asyncio.run(asyncio.wait_for(run(), 120))


def test_shutdown_without_draining(released: threading.Event) -> None:
    def hangs(inputs):
        released.wait()
        return text_score(inputs)

    async def run() -> None:
        served = AsyncEngine(make_engine(max_num_rows=8))
        params = SearchParams.cbs(
            max_tokens=8, num_candidates=2, chunk_length=4, scorer=hangs, ignore_eos=True
        )
        streams = [asyncio.ensure_future(collect(served, "hello", params)) for _ in range(8)]
        await asyncio.sleep(0.05)
        draining = asyncio.ensure_future(served.shutdown())
        await asyncio.sleep(0.01)
        assert not draining.done()
        await served.shutdown(drain=False)
        await draining
        for stream in streams:  # some had not started
            assert checked(await stream).outputs[0].finish_reason == "abort"

    asyncio.run(asyncio.wait_for(run(), 120))


def test_an_error_inside_the_context_aborts() -> None:
    async def run() -> list[RequestOutput]:
        params = SearchParams(max_tokens=200, ignore_eos=True)
        tasks: list[asyncio.Task[RequestOutput]] = []

        async def fail() -> None:
            async with AsyncEngine(make_engine()) as served:
                tasks.extend(
                    asyncio.ensure_future(served.generate("hello", params)) for _ in range(3)
                )
                await asyncio.sleep(0)
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await fail()
        return await asyncio.gather(*tasks)

    for output in asyncio.run(asyncio.wait_for(run(), 120)):
        assert output.outputs[0].finish_reason == "abort"


@pytest.mark.parametrize("at", [0, 1, 4])
def test_a_failed_thread_fails_every_client(at: int) -> None:
    engine = make_engine(max_num_rows=3)

    def fail(step: int) -> None:
        if step == at:
            raise RuntimeError("planted failure")

    on_steps(engine, fail)

    async def run() -> None:
        served = AsyncEngine(engine)
        tasks = [asyncio.ensure_future(served.generate("hello", SINGLE)) for _ in range(6)]
        streams = [asyncio.ensure_future(collect(served, "hello", SINGLE)) for _ in range(6)]
        results = await asyncio.gather(*tasks, *streams, return_exceptions=True)
        assert {type(result) for result in results} == {EngineStoppedError}
        assert "planted failure" in {str(result.__cause__) for result in results}
        with pytest.raises(EngineStoppedError, match="thread has failed") as caught:
            await served.generate("hello", SINGLE)
        assert str(caught.value.__cause__) == "planted failure"
        await served.shutdown()

    asyncio.run(asyncio.wait_for(run(), 120))


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


_FORGETS = """
import asyncio, sys
sys.path.insert(0, {tests!r})
from test_async_engine import AsyncEngine, SearchParams, make_engine

async def main():
    served = AsyncEngine(make_engine())
    params = SearchParams(max_tokens=200, ignore_eos=True)
    tasks = [asyncio.ensure_future(served.generate("hello", params)) for _ in range(4)]
    await asyncio.sleep(0.1)  # they are cancelled on their way
    assert tasks
    return served

served = asyncio.run(main())
print("the end")
"""


def test_a_process_that_forgets_to_shut_down() -> None:
    code = _FORGETS.format(tests=str(Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (0, "the end\n"), done.stderr


def test_an_engine_in_use_is_not_taken() -> None:
    with make_engine() as engine:
        engine.add_request("hello", SINGLE)
        with pytest.raises(IVGError, match="with requests"):
            AsyncEngine(engine)


def test_an_engine_belongs_to_its_owner(alone) -> None:
    """Nobody else runs it, between its steps and before the first either, and it outlives who
    tries."""
    engine = make_engine()

    async def main() -> None:
        async with AsyncEngine(engine) as served:
            for call in (lambda: engine.generate("hello", SINGLE), engine.step, engine.close):
                with pytest.raises(IVGError, match="another thread runs this engine"):
                    call()
            output = await served.generate("hello", SINGLE)
            assert tokens(output) == tokens(alone["single"])

    asyncio.run(main())


def test_an_engine_that_another_thread_runs_is_not_taken() -> None:
    with make_engine() as engine, engine.hold(), pytest.raises(IVGError, match="another thread"):
        AsyncEngine(engine)
    assert not [t for t in threading.enumerate() if t.name == "ivg-engine" and t.is_alive()]


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


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")
@pytest.mark.parametrize("niceness", [0, 3])
def test_the_engine_steps_back_behind_the_loop(niceness: int) -> None:
    async def client() -> int:
        async with AsyncEngine(make_engine(), niceness=niceness) as served:
            await served.generate("hello", SINGLE)
            (engine,) = [t for t in threading.enumerate() if t.name == "ivg-engine"]
            return os.getpriority(os.PRIO_PROCESS, engine.native_id or 0)

    assert asyncio.run(client()) == min(os.getpriority(os.PRIO_PROCESS, 0) + niceness, 19)


def test_a_niceness_out_of_range_is_refused() -> None:
    with make_engine() as engine, pytest.raises(InvalidParameterError, match=r"niceness.*20"):
        AsyncEngine(engine, niceness=20)
