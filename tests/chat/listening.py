"""An HTTP client inside the process: it speaks ASGI to the application, so that a test decides when
the client reads and when it leaves."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Self

from agents.events import subscriber
from config import asgi
from config.server import threads as server


@dataclass(frozen=True)
class Event:
    id: str
    type: str
    data: dict[str, Any]


class Response:
    """A response that is read as it comes."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""
        self.over = False
        # Cleared, the client takes no more: what the server sends does not get through.
        self.reading = asyncio.Event()
        self.reading.set()
        self._changed = asyncio.Condition()
        self._read = 0

    async def send(self, message: dict[str, Any]) -> None:
        await self.reading.wait()
        async with self._changed:
            if message["type"] == "http.response.start":
                self.status = message["status"]
                self.headers = {n.decode(): v.decode() for n, v in message["headers"]}
            else:
                self.body += message["body"]
                self.over = not message.get("more_body", False)
            self._changed.notify_all()

    async def close(self) -> None:
        """Nothing more comes, be it whole or not."""
        async with self._changed:
            self.over = True
            self._changed.notify_all()

    async def begun(self) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self.status)

    async def event(self, seconds: float = 60) -> Event:
        """The next event."""
        while True:
            async with self._changed, asyncio.timeout(seconds):
                await self._changed.wait_for(
                    lambda: b"\n\n" in self.body[self._read :] or self.over
                )
            end = self.body.find(b"\n\n", self._read)
            assert end >= 0, f"The stream has ended: {self.body!r}"
            lines = self.body[self._read : end].decode().split("\n")
            self._read = end + 2
            fields = dict(line.split(": ", 1) for line in lines)
            if "event" in fields:
                return Event(fields.get("id", ""), fields["event"], json.loads(fields["data"]))

    async def until(self, type: str, seconds: float = 60) -> list[Event]:
        """The events up to and including the next of this type."""
        found = [await self.event(seconds)]
        while found[-1].type != type:
            found.append(await self.event(seconds))
        return found

    async def end(self, seconds: float = 60) -> Self:
        async with self._changed, asyncio.timeout(seconds):
            await self._changed.wait_for(lambda: self.over)
        return self


@asynccontextmanager
async def request(
    path: str, method: str = "GET", body: Any = None, **headers: str
) -> AsyncIterator[Response]:
    """Leaving the block is the client's leaving."""
    path, _, query = path.partition("?")
    raw = b"" if body is None else json.dumps(body).encode()
    pairs = {"host": "localhost", "content-length": str(len(raw))}
    pairs |= {name.replace("_", "-"): value for name, value in headers.items()}
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "scheme": "http",
        "server": ("localhost", 80),
        "client": ("127.0.0.1", 50000),
        "headers": [(n.encode(), v.encode()) for n, v in pairs.items()],
    }
    messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    messages.put_nowait({"type": "http.request", "body": raw, "more_body": False})
    response = Response()

    async def answered() -> None:
        try:
            await asgi.application(scope, messages.get, response.send)
        finally:
            await response.close()

    task = asyncio.create_task(answered())
    begun = asyncio.create_task(response.begun())
    try:
        await asyncio.wait([task, begun], timeout=60, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
        assert begun.done(), "Nothing was answered."
        yield response
    finally:
        begun.cancel()
        messages.put_nowait({"type": "http.disconnect"})
        response.reading.set()
        await asyncio.wait_for(task, 60)


def go(scene: Coroutine[Any, Any, None]) -> None:
    """Play the scene in an event loop of its own, as in a process of its own."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    async def whole() -> None:
        try:
            await scene
        finally:
            for hub in subscriber._subscribers.values():
                await hub.close()
            subscriber._subscribers.clear()

    try:
        asyncio.run(whole())
    finally:
        server.threads.reset()
        for number, handler in handlers.items():
            signal.signal(number, handler)
