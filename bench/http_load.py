# SPDX-License-Identifier: Apache-2.0
"""A server in a process of its own, and clients of it that cost little: raw HTTP on asyncio."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import urlopen

MODEL = "imdb"


@dataclass(slots=True)
class Answer:
    """One request as its client saw it; seconds since the request was sent.

    Attributes:
        status: HTTP's.
        arrivals: of each event with text, but for a last one that carries none.
        seconds: until all was there.
        is_whole: whether the stream ended as it should.
    """

    status: int = 0
    arrivals: list[float] = field(default_factory=list)
    seconds: float = 0.0
    is_whole: bool = False


@contextmanager
def server_process(folder: Path, num_threads: int, *options: str) -> Iterator[int]:
    """`ivg-fast serve` with the family in `folder`; its port."""
    roles = ("base", "tuned", "untuned", "value")
    models = [word for role in roles for word in (f"--{role}", str(folder / role))]
    command = [sys.executable, "-m", "ivg_fast.cli", "serve", *models, "--model-name", MODEL]
    command += ["--port", "0", "--num-threads", str(num_threads), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": str(num_threads)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if ":" not in line:
                raise RuntimeError("the server has not started")
            yield int(line.rsplit(":", 1)[1])
        finally:
            process.terminate()


async def ask(port: int, body: Mapping[str, Any]) -> Answer:
    """Streams one completion."""
    content = json.dumps({"model": MODEL, "stream": True, **body}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    answer = Answer()
    begin = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    try:
        writer.write(head.encode() + content)
        answer.status = int((await reader.readline()).split()[1])
        # Each event is a chunk of its own, so that the lines between are no more than lengths.
        while line := await reader.readline():
            if line.startswith(b"data: [DONE]"):
                answer.is_whole = True
            elif line.startswith(b"data: ") and b'"text":""' not in line:
                answer.arrivals.append(time.perf_counter() - begin)
    finally:
        writer.close()
    answer.seconds = time.perf_counter() - begin
    return answer


async def closed_loop(
    port: int,
    num_clients: int,
    num_requests: int,
    bodies: Iterator[Mapping[str, Any]],
    min_seconds: float = 0.0,
) -> tuple[list[Answer], float]:
    """Clients that each ask again when they are answered, until there have been so many requests
    and so many seconds; the answers, and seconds in all.
    """
    left = num_requests
    answers: list[Answer] = []
    begin = time.perf_counter()

    async def client() -> None:
        nonlocal left
        while left > 0 or time.perf_counter() - begin < min_seconds:
            left -= 1
            answers.append(await ask(port, next(bodies)))

    await asyncio.gather(*(client() for _ in range(num_clients)))
    return answers, time.perf_counter() - begin


async def open_loop(
    port: int, rate: float, num_requests: int, bodies: Iterator[Mapping[str, Any]]
) -> tuple[list[Answer], float]:
    """`rate` requests a second, whatever becomes of them."""
    begin = time.perf_counter()
    tasks = []
    for i in range(num_requests):
        await asyncio.sleep(max(0.0, begin + i / rate - time.perf_counter()))
        tasks.append(asyncio.ensure_future(ask(port, next(bodies))))
    answers = list(await asyncio.gather(*tasks))
    return answers, time.perf_counter() - begin


def loop_delays(port: int) -> dict[float, float]:
    """The server's histogram of its event loop's delays: cumulative counts by upper bound."""
    with urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        text = response.read().decode()
    name = "ivg_event_loop_delay_seconds_bucket{le="
    lines = [line.removeprefix(name) for line in text.splitlines() if line.startswith(name)]
    pairs = (line.replace('"', "").split("} ") for line in lines)
    return {float(bound): float(count) for bound, count in pairs}


def quantile_bound(before: Mapping[float, float], after: Mapping[float, float], q: float) -> float:
    """The upper bound of the bucket that holds the quantile of what came between."""
    counts = {bound: after[bound] - before[bound] for bound in sorted(after)}
    total = max(counts.values())
    return next(bound for bound, count in counts.items() if count >= q * total)
