"""An in-process ASGI client, with which a test controls when the client reads and disconnects."""

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
    """A streaming response."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""
        self.ended = False
        # If cleared, the client stops reading and the server's sends block.
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
                self.ended = not message.get("more_body", False)
            self._changed.notify_all()

    async def close(self) -> None:
        """End the body, complete or not."""
        async with self._changed:
            self.ended = True
            self._changed.notify_all()

    async def begun(self) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self.status)

    async def event(self, seconds: float = 60) -> Event:
        """Return the next event."""
        while True:
            async with self._changed, asyncio.timeout(seconds):
                await self._changed.wait_for(
                    lambda: b"\n\n" in self.body[self._read :] or self.ended
                )
            end = self.body.find(b"\n\n", self._read)
            assert end >= 0, f"The stream has ended: {self.body!r}"
            lines = self.body[self._read : end].decode().split("\n")
            self._read = end + 2
            fields = dict(line.split(": ", 1) for line in lines)
            if "event" in fields:
                return Event(fields.get("id", ""), fields["event"], json.loads(fields["data"]))

    async def until(self, type: str, seconds: float = 60) -> list[Event]:
        """Return the events up to and including the next one of this type."""
        events = [await self.event(seconds)]
        while events[-1].type != type:
            events.append(await self.event(seconds))
        return events

    async def end(self, seconds: float = 60) -> Self:
        async with self._changed, asyncio.timeout(seconds):
            await self._changed.wait_for(lambda: self.ended)
        return self


@asynccontextmanager
async def request(
    path: str, method: str = "GET", body: Any = None, **headers: str
) -> AsyncIterator[Response]:
    """Send a request. The client disconnects at the end of the block."""
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

    async def serve() -> None:
        try:
            await asgi.application(scope, messages.get, response.send)
        finally:
            await response.close()

    task = asyncio.create_task(serve())
    begun = asyncio.create_task(response.begun())
    try:
        await asyncio.wait([task, begun], timeout=60, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
        assert begun.done(), "No response was sent."
        yield response
    finally:
        begun.cancel()
        messages.put_nowait({"type": "http.disconnect"})
        response.reading.set()
        await asyncio.wait_for(task, 60)


def go(scene: Coroutine[Any, Any, None]) -> None:
    """Run the scene in a new event loop, as in a new process."""
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
