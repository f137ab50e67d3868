"""The application for an ASGI server, which all of HTTP goes through.

Django's WSGI handler answers, in one of a few threads: that carries several times what Django's own
ASGI handler does with synchronous views, and never more database connections than threads. Only a
body that is an async iterator, a stream of events, is left to the event loop: thousands of those may
be open while all threads are free.

What waits for a thread is bounded and takes turns (config.server.pool); a request whose client has
left by
then is dropped. Probes have threads of their own, so that load is never mistaken for a failure, and so
has whatever hashes a password, which takes a processor for a quarter of a second.
"""

import asyncio
import functools
import io
import re
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import unquote_to_bytes

from django.conf import settings
from django.http import StreamingHttpResponse

from config.wsgi import application as wsgi

# The apps are loaded now, which what follows needs.
# isort: split
from config.server import refusals
from config.server.callers import Caller, Held, caller_of
from config.server.pool import Full, Left, Pool
from lib import process

THREADS = 8
# For callers of whom nothing is worked on.
SPARE_THREADS = 2
STREAM_THREADS = 3
LOGIN_THREADS = 2
LOGINS_WAITING = 100
PROBES_WAITING = 50
CHUNK_BYTES = 256 * 1024
# How much of an answer is given to the connection at a time.
PIECE_BYTES = 64 * 1024
# Of an address with all headers: more than any client has need of, and less than it takes to keep a
# thread busy.
MAX_HEAD_BYTES = 64 * 1024
MAX_HEADERS = 200
PROBES = {
    "/healthz": "healthz",
    "/healthz/deep": "probes",
    "/readyz": "probes",
    "/metrics": "probes",
}
HASHING = re.compile(
    r"/login|/admin/(login|password_change|realm/user/add|realm/user/[^/]+/password)/?"
)
# In a scope's extensions, from config.server.protocol: a function that is true once the client has
# left.
HAS_LEFT = "botrealm.left"

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

# Of each open stream the task that waits for its client to leave.
_open: set[asyncio.Task[None]] = set()


@dataclass(frozen=True)
class Threads:
    web: Pool
    logins: Pool
    healthz: Pool
    probes: Pool
    bodies: Held
    answers: Held

    def for_request(self, scope: Message) -> Pool:
        path = scope["path"]
        if name := PROBES.get(path):
            return cast("Pool", getattr(self, name))
        if scope["method"] == "POST" and HASHING.fullmatch(path):
            return self.logins
        return self.web


@process.once
def _threads() -> Threads:
    """Made in the process that serves, as are those that database work of streams is done in."""
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(STREAM_THREADS, thread_name_prefix="streams"))
    _end_streams_on_stop(loop)
    return Threads(
        web=Pool("web", THREADS, spare=SPARE_THREADS, waiting=settings.WEB_MAX_WAITING),
        logins=Pool("logins", LOGIN_THREADS, waiting=LOGINS_WAITING),
        healthz=Pool("healthz", 1, waiting=PROBES_WAITING),
        probes=Pool("probes", 1, waiting=PROBES_WAITING),
        bodies=Held(),
        answers=Held(),
    )


async def application(scope: Message, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
        raise ValueError(f"There is no {scope['type']} here.")
    if _head_size(scope) > MAX_HEAD_BYTES or len(scope["headers"]) > MAX_HEADERS:
        await _refuse(431, "head_too_long", scope, send)
        return
    exchange = _Exchange(scope, receive, send)
    try:
        await exchange.run()
    finally:
        exchange.end()


class TooMuch(Exception):
    """So many bytes wait of a caller, or of all, that no more may."""


class _Exchange:
    """One request and its answer."""

    def __init__(self, scope: Message, receive: Receive, send: Send) -> None:
        self.scope, self.receive, self.send = scope, receive, send
        self.threads = _threads()
        self.pool = self.threads.for_request(scope)
        self.caller = caller_of(scope.get("client"), scope["headers"])
        self.answer = Answer()
        # Where the connection does not know, a task waits for the client to leave.
        known = (scope.get("extensions") or {}).get(HAS_LEFT)
        self.has_left: Callable[[], bool] = known or self._is_over
        self.asks = known is None
        self.leaving: asyncio.Task[None] | None = None
        self.held = 0

    async def run(self) -> None:
        bodies, caller = self.threads.bodies, self.caller
        if self._is_too_much():
            await _refuse(503, "bytes_held", self.scope, self.send)
            return
        try:
            body = await _body(self.scope, self.receive, bodies, caller)
        except TimeoutError:
            await _refuse(408, "slow_body", self.scope, self.send)
            return
        except TooMuch:
            await _refuse(503, "bytes_held", self.scope, self.send)
            return
        if body is None:  # the client is gone
            return
        size = len(body)
        bodies.add(caller, size)
        try:
            if self.asks:
                self.leaving = asyncio.create_task(_left(self.receive))
            begin = functools.partial(self._begin, environ(self.scope, body))
            del body
            chunk = await self.pool.submit(caller, begin, self.has_left)
        except Left:
            refusals.note("client_left")
            # A connection that is not read at the moment has yet to learn of it.
            with suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await (self.leaving or _left(self.receive))
            return
        except Full:
            await _refuse(503, "too_many_waiting", self.scope, self.send)
            return
        except TooMuch:
            await _refuse(503, "bytes_held", self.scope, self.send)
            return
        finally:
            bodies.add(caller, -size)
        await self._reply(chunk)

    def _begin(self, environ: dict[str, Any]) -> bytes:
        """In a thread. Many may have passed the same look when they came; by now others may have been
        answered, and wait for a client that does not read."""
        if self._is_too_much():
            raise TooMuch
        chunk = self.answer.begin(environ)
        if not self._takes(len(chunk)):
            self.answer.close()
            raise TooMuch
        return chunk

    def _takes(self, size: int) -> bool:
        """Whether there is still room for the answer, which is then held. Several that were begun side
        by side might come to many times what is left; what has changed something is answered anyway."""
        is_safe = self.scope["method"] in ("GET", "HEAD")
        if size <= PIECE_BYTES or not (is_safe and self._is_bounded()):
            self.holds(size)
            return True
        self.held = size if self.threads.answers.takes(self.caller, size) else 0
        return bool(self.held)

    def _next(self) -> bytes:
        chunk = self.answer.next()
        self.holds(len(chunk))
        return chunk

    def holds(self, size: int) -> None:
        """So much of the answer waits for the client now."""
        size = 0 if size <= PIECE_BYTES else size
        self.threads.answers.add(self.caller, size - self.held)
        self.held = size

    def _is_bounded(self) -> bool:
        return self.pool is self.threads.web or self.pool is self.threads.logins

    def _is_too_much(self) -> bool:
        return self._is_bounded() and self.threads.answers.is_too_much(self.caller)

    async def _reply(self, chunk: bytes) -> None:
        answer, send = self.answer, self.send
        start = {"type": "http.response.start", "status": answer.status, "headers": answer.headers}
        await self._put(start)
        if answer.stream and self.scope["method"] != "HEAD":
            leaving = self.leaving or asyncio.create_task(_left(self.receive))
            await _stream(answer.stream, leaving, send)
            return
        if answer.more and self.scope["method"] == "HEAD":
            await self.pool.go_on(self.caller, answer.close)
        while answer.more:
            await self._put_body(chunk, more=True)
            if self.has_left():
                # Nobody reads the rest.
                await self.pool.go_on(self.caller, answer.close)
                return
            chunk = await self.pool.go_on(self.caller, self._next)
        await self._put_body(chunk, more=False)

    async def _put_body(self, chunk: bytes, *, more: bool) -> None:
        size = len(chunk)
        if size <= PIECE_BYTES:
            await self._put({"type": "http.response.body", "body": chunk, "more_body": more})
            return
        view = memoryview(chunk)
        for at in range(0, size, PIECE_BYTES):
            last = at + PIECE_BYTES >= size
            piece = bytes(view[at : at + PIECE_BYTES])
            await self._put(
                {"type": "http.response.body", "body": piece, "more_body": more or not last}
            )
            if self.has_left():
                return

    async def _put(self, message: Message) -> None:
        if not self.asks:  # then the connection sees to it that the client reads
            await self.send(message)
            return
        async with asyncio.timeout(settings.WEB_SEND_SECONDS):
            await self.send(message)

    def _is_over(self) -> bool:
        return self.leaving is not None and self.leaving.done()

    def end(self) -> None:
        self.holds(0)
        if self.leaving is not None:
            self.leaving.cancel()


class Answer:
    """What the WSGI application says to one request."""

    status = 500
    headers: list[tuple[bytes, bytes]]
    stream: StreamingHttpResponse | None = None
    more = True

    def begin(self, environ: dict[str, Any]) -> bytes:
        """The first piece of the body. To be called in a thread, as `next` is."""
        response = wsgi(environ, self._start)
        if isinstance(response, StreamingHttpResponse) and response.is_async:
            self.stream, self.more = response, False
            # What the request has used is free from here on.
            response.close()
            return b""
        self._response: Any = response
        self._parts: Iterator[bytes] = iter(response)
        return self.next()

    def next(self) -> bytes:
        size, pieces = 0, []
        try:
            for part in self._parts:
                pieces.append(part)
                size += len(part)
                if size >= CHUNK_BYTES:
                    return b"".join(pieces)
        except BaseException:
            self._response.close()
            raise
        self.more = False
        self._response.close()
        return b"".join(pieces)

    def close(self) -> None:
        """Instead of `next`, where no more is wanted."""
        if self.more:
            self.more = False
            self._response.close()

    def _start(
        self, status: str, headers: list[tuple[str, str]], exc_info: Any = None, /
    ) -> Callable[[bytes], object]:
        self.status = int(status[:3])
        self.headers = [
            (name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers
        ]
        return _no_write


def _no_write(data: bytes) -> object:
    raise NotImplementedError("Django answers with an iterable.")


def environ(scope: Message, body: bytes) -> dict[str, Any]:
    """The request as PEP 3333 has it."""
    path = scope.get("raw_path") or scope["path"].encode()
    server = scope.get("server") or ("localhost", 80)
    found: dict[str, Any] = {
        "REQUEST_METHOD": scope["method"],
        "SCRIPT_NAME": "",
        "PATH_INFO": unquote_to_bytes(path).decode("latin-1"),
        "QUERY_STRING": scope["query_string"].decode("latin-1"),
        "SERVER_NAME": server[0],
        "SERVER_PORT": str(server[1] or 0),
        "SERVER_PROTOCOL": f"HTTP/{scope['http_version']}",
        "REMOTE_ADDR": (scope.get("client") or ("", 0))[0],
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": scope.get("scheme", "http"),
        "wsgi.input": io.BytesIO(body),
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
        "wsgi.multiprocess": True,
        "wsgi.run_once": False,
    }
    for raw_name, raw_value in scope["headers"]:
        # With an underscore it would pass for another header, one that a proxy vouches for.
        if b"_" in raw_name:
            continue
        name = raw_name.decode("latin-1").upper().replace("-", "_")
        key = name if name in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{name}"
        value = raw_value.decode("latin-1")
        found[key] = f"{found[key]},{value}" if key in found else value
    return found


def _head_size(scope: Message) -> int:
    address = len(scope.get("raw_path") or scope["path"]) + len(scope["query_string"])
    return address + sum(len(name) + len(value) for name, value in scope["headers"])


async def _refuse(status: int, reason: str, scope: Message, send: Send) -> None:
    refusals.note(reason)
    headers, body = refusals.answer(status, scope["path"])
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _body(scope: Message, receive: Receive, held: Held, caller: Caller) -> bytes | None:
    """The whole body; None when the client leaves. What is too long, or does not say how long it is,
    is not read: Django refuses it by its head. Raises `TimeoutError`, and `TooMuch`."""
    length = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
    # With zeros before it, a number of any size may have any number of digits.
    digits = length.lstrip(b"0")
    if not digits.isdigit() or int(digits[:12]) > settings.DATA_UPLOAD_MAX_MEMORY_SIZE:
        return b""
    read = 0
    pieces, more = [], True
    try:
        async with asyncio.timeout(settings.WEB_BODY_SECONDS):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                piece = message.get("body", b"")
                pieces.append(piece)
                more = message.get("more_body", False)
                if more:
                    read += len(piece)
                    held.add(caller, len(piece))
                    if held.is_too_much(caller):
                        raise TooMuch
    finally:
        held.add(caller, -read)
    return b"".join(pieces)


async def _stream(response: StreamingHttpResponse, leaving: asyncio.Task[None], send: Send) -> None:
    """Send the pieces as they come, until there are no more, the client leaves or the server stops."""
    sending = asyncio.create_task(_send_all(response, send))
    _open.add(leaving)
    try:
        await asyncio.wait([sending, leaving], return_when=asyncio.FIRST_COMPLETED)
    finally:
        _open.discard(leaving)
        leaving.cancel()
        # Not once: redis-py swallows a cancellation now and then.
        while not sending.done():
            sending.cancel()
            await asyncio.wait([sending], timeout=0.2)
    if not sending.cancelled() and (error := sending.exception()):
        raise error
    with suppress(OSError):
        await send({"type": "http.response.body", "body": b""})


async def _send_all(response: StreamingHttpResponse, send: Send) -> None:
    # Not `streaming_content`, a generator around this one: closing that would not close this.
    async with aclosing(cast("Any", response)._iterator) as pieces:
        async for piece in pieces:
            async with asyncio.timeout(settings.WEB_SEND_SECONDS):
                await send({"type": "http.response.body", "body": piece, "more_body": True})


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _end_streams_on_stop(loop: asyncio.AbstractEventLoop) -> None:
    """A server that stops waits for its open requests; streams would keep it waiting. A client whose
    stream ends comes back, to another process."""

    def end() -> None:
        for leaving in _open:
            leaving.cancel()

    for signum in (signal.SIGTERM, signal.SIGINT):
        handler = signal.getsignal(signum)

        def heed(number: int, frame: Any, handler: Any = handler) -> None:
            loop.call_soon_threadsafe(end)
            if callable(handler):
                handler(number, frame)

        signal.signal(signum, heed)
