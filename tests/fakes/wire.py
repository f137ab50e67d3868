"""A small HTTP/1.1 server for fakes: keep-alive, cheap, and able to do what servers must not.

An answer is a series of steps, so that it can wait, hang or be cut at any byte.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import responses
from typing import Any

import orjson

# What a connection does next: write bytes, wait seconds (infinity: hang), or reset (None).
Steps = Iterator[bytes | float | None]

LAST_CHUNK = b"0\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Request:
    """One request as it arrived; `body` is the parsed JSON or None, `at` a `time.monotonic()`."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any
    at: float


def response(
    status: int,
    body: bytes,
    content_type: str = "application/json",
    headers: dict[str, str] | None = None,
) -> bytes:
    """Return a whole response."""
    fields = {"content-type": content_type, "content-length": str(len(body)), **(headers or {})}
    return head(status, fields) + body


def head(status: int, headers: dict[str, str]) -> bytes:
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status} {responses.get(status, 'Unknown')}\r\n{lines}\r\n".encode()


def chunk(parts: list[bytes]) -> bytes:
    """One chunk of a chunked body; none for nothing, since an empty chunk ends the body."""
    body = b"".join(parts)
    return b"%x\r\n%b\r\n" % (len(body), body) if body else b""


class Server:
    """A listening socket on loopback, served by a thread (`start`, `stop`) or by `run`."""

    def __init__(
        self,
        answer: Callable[[Request], Steps],
        gone: Callable[[Request], None] = lambda request: None,
        *,
        port: int = 0,
    ) -> None:
        self.answer = answer
        self.gone = gone
        self.port = port
        self.connections: set[Connection] = set()
        self.accepted = 0
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()
        self._listening = threading.Event()
        self._thread = threading.Thread(target=self.run, name="fake-server", daemon=True)

    def start(self) -> None:
        self._thread.start()
        if not self._listening.wait(60):
            raise RuntimeError("the fake server did not start")

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(60)

    def run(self, listening: Callable[[], object] = lambda: None) -> None:
        """Serve until stopped; `listening` is called when `port` is known."""
        try:
            self._loop.run_until_complete(self._serve(listening))
        finally:
            self._loop.close()

    async def _serve(self, listening: Callable[[], object]) -> None:
        server = await self._loop.create_server(
            lambda: Connection(self), "127.0.0.1", self.port, backlog=1024
        )
        self.port = server.sockets[0].getsockname()[1]
        listening()
        self._listening.set()
        await self._stopping.wait()
        server.close()
        for connection in list(self.connections):
            connection.abort()
        await asyncio.sleep(0)  # one turn, in which the aborted transports close their sockets


class Connection(asyncio.Protocol):
    """One client; its requests are answered one after the other."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._received = b""
        self._request: Request | None = None
        self._steps: Steps = iter(())
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._server.connections.add(self)
        self._server.accepted += 1

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.connections.discard(self)
        if self._timer:
            self._timer.cancel()
        if self._request:
            self._server.gone(self._request)

    def data_received(self, data: bytes) -> None:
        self._received += data
        if not self._request:
            self._take_request()

    def abort(self) -> None:
        """Reset the connection; what was asked counts as answered."""
        self._request = None
        self._transport.abort()

    def _take_request(self) -> None:
        top, separator, rest = self._received.partition(b"\r\n\r\n")
        if not separator:
            return
        first, *lines = top.decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in lines)
        headers = {name.lower(): value.strip() for name, _, value in pairs}
        length = int(headers.get("content-length", 0))
        if len(rest) < length:
            return
        self._received = rest[length:]
        method, path, _ = first.split(" ")
        body = _json_or_none(rest[:length])
        self._request = Request(method, path, headers, body, time.monotonic())
        self._steps = self._server.answer(self._request)
        self._advance()

    def _advance(self) -> None:
        for step in self._steps:
            if step is None:
                self.abort()
                return
            if isinstance(step, bytes):
                self._transport.write(step)
            elif step == math.inf:
                return
            else:
                self._timer = self._loop.call_later(step, self._advance)
                return
        self._request = None
        if self._received:
            self._take_request()


def _json_or_none(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
