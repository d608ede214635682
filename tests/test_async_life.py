# SPDX-License-Identifier: Apache-2.0
"""The life of an AsyncEngine: whose its engine is, shutdowns, a thread that fails."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from async_cases import SINGLE, alone_outputs, checked, collect, make_engine, on_steps, tokens
from engine_cases import text_score

from ivg_fast import (
    AsyncEngine,
    EngineStoppedError,
    InvalidParameterError,
    IVGError,
    RequestOutput,
    SearchParams,
)


@pytest.fixture(scope="module")
def alone() -> dict[str, RequestOutput]:
    return alone_outputs()


def engine_threads() -> set[threading.Thread]:
    """Those that run; an engine of an earlier test may still be on its way out."""
    return {thread for thread in threading.enumerate() if thread.name == "ivg-engine"}


def test_draining() -> None:
    async def run() -> None:
        engine = make_engine()
        served = AsyncEngine(engine)
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
        with pytest.raises(IVGError, match="the engine is closed"):
            engine.generate("hello", SINGLE)

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


_FORGETS = """
import asyncio, sys
sys.path.insert(0, {tests!r})
from async_cases import AsyncEngine, SearchParams, make_engine

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
    before = engine_threads()
    with make_engine() as engine, engine.hold(), pytest.raises(IVGError, match="another thread"):
        AsyncEngine(engine)
    assert engine_threads() <= before


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")
@pytest.mark.parametrize("niceness", [0, 3])
def test_the_engine_steps_back_behind_the_loop(niceness: int) -> None:
    before = engine_threads()

    async def client() -> int:
        async with AsyncEngine(make_engine(), niceness=niceness) as served:
            await served.generate("hello", SINGLE)
            (engine,) = engine_threads() - before
            return os.getpriority(os.PRIO_PROCESS, engine.native_id or 0)

    assert asyncio.run(client()) == min(os.getpriority(os.PRIO_PROCESS, 0) + niceness, 19)


def test_a_niceness_out_of_range_is_refused() -> None:
    with make_engine() as engine, pytest.raises(InvalidParameterError, match=r"niceness.*20"):
        AsyncEngine(engine, niceness=20)
