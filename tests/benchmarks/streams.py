"""Answers as they come: how soon a token is at the client, how many streams one web process and one
worker carry, and what they take."""

from __future__ import annotations

import asyncio
import re
import socket
import subprocess
import sys
import time
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import orjson
import psutil

from tests.benchmarks.footprint import _cpu_while, _rounded
from tests.benchmarks.load import milliseconds, paced
from tests.benchmarks.system import CONTENT, Result, System, ask
from tests.system.stack import process_cpu_seconds

STREAMS = 200
TOKENS_PER_SECOND = 50
IDLE = 1000
SENT_AT = re.compile(rb"@(\d+\.\d{6}) ")
END = b"event: run.completed"
RUN = re.compile(rb'"runId":"([^"]+)"')


class Stream(asyncio.Protocol):
    """A client that notes how long each token was under way."""

    def __init__(self, head: bytes) -> None:
        self._head = head
        # Of each token: when it was here, and how long it was under way.
        self.at = array("d")
        self.seconds = array("d")
        self.run = ""
        self.completed = False
        self._tail = b""
        self.begun = asyncio.Event()
        self.over = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(self._head)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        if not self.run and (found := RUN.search(data)):
            self.run = found[1].decode()
        if b"\nevent: " in data:
            self.begun.set()
        if self.completed:
            return
        # The end may come in two parts.
        text = self._tail + data
        if END in text:
            data = text.partition(END)[0][len(self._tail) :]
            self.completed = True
            self.over.set()
        self._tail = text[-len(END) :]
        for sent in SENT_AT.findall(data):
            self.at.append(now)
            self.seconds.append(now - float(sent))

    def connection_lost(self, exc: Exception | None) -> None:
        self.begun.set()
        self.over.set()


async def streams(system: System) -> AsyncIterator[Result]:
    """With one web process beside those of the stack, and the stack's worker."""
    async with _web(system) as (port, pid):
        yield await _first_token(system, port)
        for count in (50, STREAMS):
            yield await _at_once(system, port, pid, count)
        yield await _idle(system, port, pid)
    async for result in _with_and_without(system):
        yield result


async def _first_token(system: System, port: int) -> Result:
    """One at a time; the model takes 50 ms to begin."""
    system.llm.configure(latency=0.05, deltas=5, delta_latency=0.02, clock=True)
    total = system.scaled(200, 20)
    first = []
    for number in range(total + 5):
        (stream,) = await open_streams(port, [question()])
        await asyncio.wait_for(stream.over.wait(), 30)
        stream.transport.close()
        if number >= 5:
            first.append(stream.seconds[0])
    return Result("stream", "first token, one stream", milliseconds(first))


async def _at_once(system: System, port: int, pid: int, count: int) -> Result:
    seconds = system.scaled(20, 5)
    tokens = TOKENS_PER_SECOND * seconds
    system.llm.configure(
        latency=0.5, deltas=tokens, delta_latency=1 / TOKENS_PER_SECOND, clock=True
    )
    worker = system.stack.pid("worker")
    before = [process_cpu_seconds(each) for each in (pid, worker)]
    begun = time.perf_counter()
    opened = await open_streams(port, [question()] * count)
    await asyncio.wait_for(asyncio.gather(*(each.over.wait() for each in opened)), 300)
    took = time.perf_counter() - begun
    after = [process_cpu_seconds(each) for each in (pid, worker)]
    for each in opened:
        each.transport.close()
    came = sum(len(each.seconds) for each in opened)
    late = [lag for each in opened for lag in each.seconds[-TOKENS_PER_SECOND:]]
    web, work = (b - a for a, b in zip(before, after, strict=True))
    figures = {
        "tokens_per_second": _while_all(opened),
        "with_start_and_end": round(came / took),
        "missing": count * tokens - came,
        **milliseconds(lag for each in opened for lag in each.seconds),
        "last_second_p50_ms": milliseconds(late)["p50_ms"],
        "first_token_p50_ms": milliseconds(each.seconds[0] for each in opened)["p50_ms"],
        "web_cores": round(web / took, 2),
        "worker_cores": round(work / took, 2),
    }
    return Result("stream", f"{count} of {TOKENS_PER_SECOND} tokens/s", figures)


def _while_all(streams: list[Stream]) -> int:
    """Tokens a second between the last first one and the first last one."""
    since, until = max(each.at[0] for each in streams), min(each.at[-1] for each in streams)
    if since >= until:
        return 0
    return round(sum(since <= at < until for each in streams for at in each.at) / (until - since))


async def _idle(system: System, port: int, pid: int) -> Result:
    """Measure listeners of runs whose model is silent."""
    system.llm.configure(latency=0, deltas=1, delta_latency=3600, clock=True)
    asked = await open_streams(port, [question()] * 50)
    await asyncio.gather(*(each.begun.wait() for each in asked))
    process = psutil.Process(pid)
    before = process.memory_info().rss
    heads = [_listen(asked[number % 50].run) for number in range(system.scaled(IDLE, IDLE))]
    opened = await open_streams(port, heads)
    await asyncio.wait_for(asyncio.gather(*(each.begun.wait() for each in opened)), 60)
    await asyncio.sleep(3)
    cpu, begun = process_cpu_seconds(pid), time.perf_counter()
    await asyncio.sleep(5)
    used = (process_cpu_seconds(pid) - cpu) / (time.perf_counter() - begun)
    rss, alive = process.memory_info().rss, sum(not each.over.is_set() for each in opened)
    async with system.clients(1) as clients:
        for each in asked:
            await clients[0].post(f"/api/chat/runs/{each.run}/cancel", {})
    for each in (*asked, *opened):
        each.transport.close()
    figures = {
        "listening": alive,
        "rss_mb": round(rss / 1e6, 1),
        "kb_each": round((rss - before) / len(opened) / 1000, 1),
        "cpu_ms_a_second": round(used * 1000, 1),
    }
    return Result("stream", f"{len(opened)} idle listeners", figures)


async def _with_and_without(system: System) -> AsyncIterator[Result]:
    """Measure the processor time of a run without listeners, and with one."""
    total, port = system.scaled(400, 60), system.stack.port
    system.llm.configure(latency=0.05, deltas=48, delta_latency=0.01)

    async def silent() -> None:
        runs: list[str] = []

        async def send(connection: Any) -> None:
            runs.append((await ask(connection))["runId"])

        async with system.outcomes() as outcomes, system.clients(32) as opened:
            await paced(opened, send, per_second=15, total=total)
            await outcomes.of(runs)

    async def heard() -> None:
        async def one(number: int) -> None:
            await asyncio.sleep(number / 15)
            (stream,) = await open_streams(port, [question()])
            await asyncio.wait_for(stream.over.wait(), 60)
            stream.transport.close()

        await asyncio.gather(*map(one, range(total)))

    cases: list[tuple[str, Callable[[], Awaitable[None]]]] = [
        ("nobody listens", silent),
        ("somebody listens", heard),
    ]
    for name, work in cases:
        used = await _cpu_while(system, work())
        used.pop("seconds")
        yield Result("stream", f"48 deltas, {name}, ms a run", _rounded(used, total))


async def open_streams(port: int, heads: list[bytes]) -> list[Stream]:
    loop = asyncio.get_running_loop()
    opened = []
    for head in heads:
        _, stream = await loop.create_connection(lambda head=head: Stream(head), "127.0.0.1", port)
        opened.append(stream)
    return opened


def question() -> bytes:
    body = orjson.dumps({"content": CONTENT})
    return (
        b"POST /api/chat/messages HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    )


def _listen(run: str) -> bytes:
    return f"GET /api/chat/runs/{run}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


@asynccontextmanager
async def _web(system: System) -> AsyncIterator[tuple[int, int]]:
    """Yield port and pid of a web server of one process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = f"-m uvicorn config.asgi:application --port {port} --lifespan off --ws none"
    process = subprocess.Popen(
        [sys.executable, *command.split(), "--no-access-log", "--log-level", "warning"],
        env=system.stack.env | {"REDIS_URL": system.stack.redis_url, "HTTPS": "false"},
    )
    try:
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=5).close()
                break
            except OSError:
                if process.poll() is not None:
                    raise
                await asyncio.sleep(0.1)
        yield port, process.pid
    finally:
        process.terminate()
        process.wait(10)
