"""The application for an ASGI server, in front of Django's WSGI handler.

The WSGI handler runs in one of a few threads: that serves several times the requests of Django's own
ASGI handler with synchronous views, and never opens more database connections than threads. Only a body
that is an async iterator, an event stream, is served by the event loop, and so is an answer that waits
(lib.lateanswer): thousands may be open while all threads are free.

Requests that wait for a thread are bounded and take turns (config.server.pool); if the client leaves
before a thread is free, its request is dropped. Probes have threads of their own, so that load is never
mistaken for a failure, and so have requests that hash a password.

It can go when Django's ASGI handler runs synchronous views in a bounded pool with the throughput of
WSGI; today each request starts a thread of its own (django/asgiref#218, #306).
"""

import asyncio
import functools
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from django.conf import settings

from config.server.response import WSGIResponse, wsgi_environ

# The apps are loaded now; the next imports need them.
# isort: split
from config.server import refusals
from config.server.callers import ClientKey, HeldBytes, client_key
from config.server.pool import ClientLeft, QueueFull
from config.server.streaming import (
    Message,
    Receive,
    Send,
    answer_unless_left,
    send_stream,
    wait_for_disconnect,
)
from config.server.threads import threads
from lib import lateanswer, paths

# A response is passed to the connection in pieces of this size.
PIECE_BYTES = 64 * 1024
# Of a URL with all headers: more than clients need, and too little to keep a thread busy.
MAX_HEAD_BYTES = 64 * 1024
MAX_HEADERS = 200
# In a scope's extensions, from config.server.protocol: a function that returns True once the client has
# left.
HAS_LEFT = "botrealm.left"


async def application(scope: Message, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
        raise ValueError(f"The scope {scope['type']} is not supported.")
    if _head_size(scope) > MAX_HEAD_BYTES or len(scope["headers"]) > MAX_HEADERS:
        await _refuse(431, "head_too_long", scope, send)
        return
    exchange = _Exchange(_below_prefix(scope), receive, send)
    try:
        await exchange.run()
    finally:
        exchange.end()


def _below_prefix(scope: Message) -> Message:
    """Return the scope without FORCE_SCRIPT_NAME at the start of its path."""
    path = paths.inner(scope["path"])
    if path is None:
        return scope
    prefix = (settings.FORCE_SCRIPT_NAME or "").encode()
    raw = scope.get("raw_path") or b""
    # A client may have encoded the prefix.
    raw = (raw.removeprefix(prefix) or b"/") if raw.startswith(prefix) else None
    return {**scope, "path": path, "raw_path": raw}


class TooManyBytes(Exception):
    """One client, or all together, hold as many bytes as are allowed."""


class _Exchange:
    """One request and its response."""

    def __init__(self, scope: Message, receive: Receive, send: Send) -> None:
        self.scope, self.receive, self.send = scope, receive, send
        self.threads = threads()
        self.pool = self.threads.for_request(scope)
        self.is_bounded = self.threads.is_bounded(self.pool)
        self.client = client_key(scope.get("client"), scope["headers"])
        self.response = WSGIResponse()
        # If the connection cannot report it, a task waits for the client to leave.
        has_left = (scope.get("extensions") or {}).get(HAS_LEFT)
        self.has_left: Callable[[], bool] = has_left or self._has_disconnected
        self.watches_client = has_left is None
        self.leaving: asyncio.Task[None] | None = None
        self.held = 0

    async def run(self) -> None:
        bodies, client = self.threads.bodies, self.client
        if self._is_full():
            await self._refuse(503, "bytes_held")
            return
        try:
            body = await _read_body(self.scope, self.receive, bodies, client)
        except TimeoutError:
            await self._refuse(408, "slow_body")
            return
        except TooManyBytes:
            await self._refuse(503, "bytes_held")
            return
        except BadFraming as error:
            await self._refuse(error.args[0], "framing")
            return
        if body is None:  # the client has left
            return
        content, length = body
        size = len(content)
        bodies.add(client, size)
        try:
            if self.watches_client:
                self.leaving = asyncio.create_task(wait_for_disconnect(self.receive))
            environ = wsgi_environ(self.scope, content, length=length)
            start = functools.partial(self._start, environ)
            del body, content, environ
            chunk = await self.pool.submit(client, start, self.has_left)
        except ClientLeft:
            refusals.note("client_left")
            # A connection that is not read at the moment has yet to notice.
            with suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await (self.leaving or wait_for_disconnect(self.receive))
            return
        except QueueFull:
            await self._refuse(503, "too_many_waiting")
            return
        except TooManyBytes:
            await self._refuse(503, "bytes_held")
            return
        finally:
            bodies.add(client, -size)
        await self._reply(chunk)

    def _start(self, environ: dict[str, Any]) -> bytes:
        """Call the application, in a thread. Check the limit again first: many requests may have passed
        the first check together, and others may since hold answers that are not read."""
        if self._is_full():
            raise TooManyBytes
        chunk = self.response.start(environ)
        if not self._try_hold(len(chunk)):
            self.response.close()
            raise TooManyBytes
        return chunk

    def _try_hold(self, size: int) -> bool:
        """Hold a response if there is room. Several that started side by side could exceed the limit
        many times; a request that may have changed something is answered anyway."""
        is_safe = self.scope["method"] in ("GET", "HEAD")
        if size <= PIECE_BYTES or not (is_safe and self.is_bounded):
            self._hold(size)
            return True
        self.held = size if self.threads.answers.try_add(self.client, size) else 0
        return bool(self.held)

    def _next(self) -> bytes:
        chunk = self.response.next()
        self._hold(len(chunk))
        return chunk

    def _hold(self, size: int) -> None:
        """Count the bytes of the response that wait for the client now."""
        size = 0 if size <= PIECE_BYTES else size
        self.threads.answers.add(self.client, size - self.held)
        self.held = size

    def _is_full(self) -> bool:
        return self.is_bounded and self.threads.answers.is_full_for(self.client)

    async def _refuse(self, status: int, reason: str) -> None:
        await _refuse(status, reason, self.scope, self.send)

    async def _reply(self, chunk: bytes) -> None:
        response, send = self.response, self.send
        if response.waiting is not None:
            late = await self._wait(response.waiting, chunk)
            if late is None:
                return
            chunk = late
        await self._send(
            {
                "type": "http.response.start",
                "status": response.status,
                "headers": response.headers,
            }
        )
        if response.stream and self.scope["method"] != "HEAD":
            leaving = self.leaving or asyncio.create_task(wait_for_disconnect(self.receive))
            await send_stream(response.stream, leaving, send)
            return
        if response.more and self.scope["method"] == "HEAD":
            await self.pool.resume(self.client, response.close)
        while response.more:
            await self._send_body(chunk, more=True)
            if self.has_left():
                await self.pool.resume(self.client, response.close)
                return
            chunk = await self.pool.resume(self.client, self._next)
        await self._send_body(chunk, more=False)

    async def _wait(self, waiting: lateanswer.Waiting, chunk: bytes) -> bytes | None:
        """Await the answer of a waiting request; return its body. None if the client has left."""
        if self.leaving is None:
            self.leaving = asyncio.create_task(wait_for_disconnect(self.receive))
        answer = await answer_unless_left(waiting, self.leaving)
        if self.leaving.done() and not self.leaving.cancelled():
            return None
        if answer is None:
            return chunk
        self.response.replace(answer)
        self._hold(len(answer.body))
        return answer.body

    async def _send_body(self, chunk: bytes, *, more: bool) -> None:
        size = len(chunk)
        if size <= PIECE_BYTES:
            await self._send({"type": "http.response.body", "body": chunk, "more_body": more})
            return
        view = memoryview(chunk)
        for start in range(0, size, PIECE_BYTES):
            is_last = start + PIECE_BYTES >= size
            piece = bytes(view[start : start + PIECE_BYTES])
            await self._send(
                {"type": "http.response.body", "body": piece, "more_body": more or not is_last}
            )
            if self.has_left():
                return

    async def _send(self, message: Message) -> None:
        if not self.watches_client:  # the connection limits the time itself
            await self.send(message)
            return
        async with asyncio.timeout(settings.WEB_SEND_SECONDS):
            await self.send(message)

    def _has_disconnected(self) -> bool:
        return self.leaving is not None and self.leaving.done()

    def end(self) -> None:
        self._hold(0)
        if self.leaving is not None:
            self.leaving.cancel()


def _head_size(scope: Message) -> int:
    address = len(scope.get("raw_path") or scope["path"]) + len(scope["query_string"])
    return address + sum(len(name) + len(value) for name, value in scope["headers"])


async def _refuse(status: int, reason: str, scope: Message, send: Send) -> None:
    refusals.note(reason)
    headers, body = refusals.answer(status, scope["path"])
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class BadFraming(Exception):
    """The end of the body is not clear; the argument is the status of the answer."""


def _readable_length(scope: Message) -> int:
    """Return the number of bytes of the body to read. A body that is too long by its Content-Length is
    not read: Django refuses it by its head. Raises `BadFraming` (RFC 9112, section 6): two servers that
    disagree about the end of a request would see two different requests."""
    length = coding = None
    for name, value in scope["headers"]:
        if name == b"content-length":
            length = value
        elif name == b"transfer-encoding":
            coding = value if coding is None else coding + b"," + value
    limit: int = settings.DATA_UPLOAD_MAX_MEMORY_SIZE
    if coding is not None:
        if length is not None or scope["http_version"] != "1.1":
            raise BadFraming(400)
        if coding.strip().lower() != b"chunked":
            raise BadFraming(501)
        return limit
    if length is None:
        return 0
    # With leading zeros, any number may have any number of digits.
    digits = length.lstrip(b"0")
    return limit if digits.isdigit() and int(digits[:12]) <= limit else 0


async def _read_body(
    scope: Message, receive: Receive, held: HeldBytes, client: ClientKey
) -> tuple[bytes, int] | None:
    """Return the body and its length, or None if the client leaves. Of a body that is too long only
    the length is returned, as far as it was read. Raises `TimeoutError`, `TooManyBytes` and
    `BadFraming`."""
    limit = _readable_length(scope)
    if not limit:
        return b"", 0
    body, more = bytearray(), True
    try:
        async with asyncio.timeout(settings.WEB_BODY_SECONDS):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                piece, more = message.get("body", b""), message.get("more_body", False)
                if not more and not body and len(piece) <= limit:
                    return bytes(piece), len(piece)
                held.add(client, len(piece))
                body += piece
                if len(body) > limit:
                    return b"", len(body)
                if more and held.is_full_for(client):
                    raise TooManyBytes
    finally:
        held.add(client, -len(body))
    return bytes(body), len(body)
