"""A load generator that leaves the processor to what it measures: about 0.05 ms a request.

HTTP/1.1 by hand over kept connections; JSON in and out.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import orjson

CONTENT_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
REQUEST_SECONDS = 120

Send = Callable[["Connection"], Awaitable[Any]]


class BadAnswer(Exception):
    """The system answered something else than success."""


class Connection(asyncio.Protocol):
    """One kept connection, one request at a time."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._received = b""
        self._answer: asyncio.Future[bytes] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer and not self._answer.done():
            self._answer.set_exception(exc or ConnectionResetError("closed by the server"))

    def data_received(self, data: bytes) -> None:
        self._received += data
        if self._answer and not self._answer.done() and _is_whole(self._received):
            self._answer.set_result(self._received)
            self._received = b""

    async def get(self, path: str) -> Any:
        return await self._request(f"GET {path}", b"", "")

    async def post(self, path: str, body: dict[str, Any], headers: str = "") -> Any:
        """`headers`: whole lines, each with its line end."""
        return await self._request(f"POST {path}", orjson.dumps(body), headers)

    async def _request(self, line: str, body: bytes, headers: str) -> Any:
        head = (
            f"{line} HTTP/1.1\r\nHost: {self._host}\r\nAccept: application/json\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
        )
        self._answer = asyncio.get_running_loop().create_future()
        self.transport.write(head.encode() + body)
        answer = await asyncio.wait_for(self._answer, REQUEST_SECONDS)
        top, _, content = answer.partition(b"\r\n\r\n")
        if not top.startswith(b"HTTP/1.1 20"):
            raise BadAnswer(f"{line}: {answer[:500]!r}")
        return orjson.loads(_unchunked(content) if _is_chunked(top) else content)


@asynccontextmanager
async def connections(url: str, count: int) -> AsyncIterator[list[Connection]]:
    host = urlsplit(url).netloc
    name, _, port = host.partition(":")
    loop = asyncio.get_running_loop()
    pairs = [
        await loop.create_connection(lambda: Connection(host), name, int(port))
        for _ in range(count)
    ]
    opened = [connection for _, connection in pairs]
    try:
        yield opened
    finally:
        for connection in opened:
            connection.transport.close()


async def closed_loop(
    opened: Iterable[Connection], send: Send, *, total: int
) -> tuple[list[float], float]:
    """Send `total` requests, each connection the next one as soon as it is free. Seconds of each,
    and of all."""
    left = iter(range(total))
    seconds: list[float] = []

    async def work(connection: Connection) -> None:
        for _ in left:
            started = time.perf_counter()
            await send(connection)
            seconds.append(time.perf_counter() - started)

    begun = time.perf_counter()
    await asyncio.gather(*(work(connection) for connection in opened))
    return seconds, time.perf_counter() - begun


async def paced(
    opened: Iterable[Connection], send: Send, *, per_second: float, total: int
) -> list[float]:
    """Send requests by the clock, whether or not earlier ones are answered. Seconds of each from
    the moment that it was due, so that a stall is counted for everyone who waited."""
    free: asyncio.Queue[Connection] = asyncio.Queue()
    for connection in opened:
        free.put_nowait(connection)
    begun = time.perf_counter()

    async def one(index: int) -> float:
        due = begun + index / per_second
        await asyncio.sleep(due - time.perf_counter())
        connection = await free.get()
        await send(connection)
        free.put_nowait(connection)
        return time.perf_counter() - due

    return list(await asyncio.gather(*(one(index) for index in range(total))))


def percentile(values: Iterable[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def milliseconds(values: Iterable[float]) -> dict[str, float]:
    """Return the usual percentiles of seconds, in milliseconds."""
    ordered = sorted(values)
    return {
        f"p{share}_ms": round(percentile(ordered, share / 100) * 1000, 2) for share in (50, 95, 99)
    }


def _is_whole(answer: bytes) -> bool:
    top, separator, content = answer.partition(b"\r\n\r\n")
    if not separator:
        return False
    if length := CONTENT_LENGTH.search(top):
        return len(content) >= int(length[1])
    return content.endswith(b"0\r\n\r\n")


def _is_chunked(top: bytes) -> bool:
    return b"transfer-encoding: chunked" in top.lower()


def _unchunked(content: bytes) -> bytes:
    parts = []
    while content:
        size, _, content = content.partition(b"\r\n")
        parts.append(content[: int(size, 16)])
        content = content[int(size, 16) + 2 :]
    return b"".join(parts)
