"""The application for an ASGI server, which all of HTTP goes through.

Django's WSGI handler answers, in one of a few threads: that carries several times what Django's own
ASGI handler does with synchronous views, and never more database connections than threads. Only a
body that is an async iterator, a stream of events, is left to the event loop: thousands of those may
be open while all threads are free.
"""

import asyncio
import functools
import io
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from typing import Any, cast
from urllib.parse import unquote_to_bytes

from django.conf import settings
from django.http import StreamingHttpResponse

from config.wsgi import application as wsgi

THREADS = 8
CHUNK_BYTES = 256 * 1024
# Of an address with all headers: more than any client has need of, and less than it takes to keep a
# thread busy.
MAX_HEAD_BYTES = 64 * 1024
HEAD_TOO_LONG = b'{"ok":false,"error":"The address or the headers are too long."}'
# For a client to send a body, and to take a piece of a stream.
PATIENCE_SECONDS = 60

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

# Of each open stream the task that waits for its client to leave.
_open: set[asyncio.Task[None]] = set()


@functools.cache
def _threads() -> ThreadPoolExecutor:
    """Made in the process that serves, and there also what database work of streams is done in."""
    threads = ThreadPoolExecutor(THREADS, thread_name_prefix="web")
    loop = asyncio.get_running_loop()
    loop.set_default_executor(threads)
    _end_streams_on_stop(loop)
    return threads


async def application(scope: Message, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
        raise ValueError(f"There is no {scope['type']} here.")
    if _head_size(scope) > MAX_HEAD_BYTES:
        await _refuse_head(send)
        return
    loop, threads = asyncio.get_running_loop(), _threads()
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            body = await _body(scope, receive)
    except TimeoutError:
        body = None
    if body is None:  # the client is gone, or as good as
        return
    answer = Answer()
    chunk = await loop.run_in_executor(threads, answer.begin, environ(scope, body))
    await send({"type": "http.response.start", "status": answer.status, "headers": answer.headers})
    if answer.stream and scope["method"] != "HEAD":
        await _stream(answer.stream, receive, send)
        return
    while answer.more:
        await send({"type": "http.response.body", "body": chunk, "more_body": True})
        chunk = await loop.run_in_executor(threads, answer.next)
    await send({"type": "http.response.body", "body": chunk})


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


async def _refuse_head(send: Send) -> None:
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(HEAD_TOO_LONG)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": 431, "headers": headers})
    await send({"type": "http.response.body", "body": HEAD_TOO_LONG})


async def _body(scope: Message, receive: Receive) -> bytes | None:
    """The whole body; None when the client leaves. What is too long, or does not say how long it is,
    is not read: Django refuses it by its head."""
    length = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
    if not length.isdigit() or int(length[:12]) > settings.DATA_UPLOAD_MAX_MEMORY_SIZE:
        return b""
    pieces, more = [], length.strip(b"0") != b""
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        pieces.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(pieces)


async def _stream(response: StreamingHttpResponse, receive: Receive, send: Send) -> None:
    """Send the pieces as they come, until there are no more, the client leaves or the server stops."""
    sending = asyncio.create_task(_send_all(response, send))
    leaving = asyncio.create_task(_left(receive))
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
            async with asyncio.timeout(PATIENCE_SECONDS):
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
