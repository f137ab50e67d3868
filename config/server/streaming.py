"""Send event streams and answers that wait, which the event loop serves, until the client leaves or
the server stops."""

import asyncio
import signal
from collections.abc import Awaitable, Callable
from contextlib import aclosing, suppress
from typing import Any, cast

from django.conf import settings
from django.http import StreamingHttpResponse

from lib import lateanswer

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

# For each open stream the task that waits for its client to leave.
_open: set[asyncio.Task[None]] = set()


async def send_stream(
    response: StreamingHttpResponse, leaving: asyncio.Task[None], send: Send
) -> None:
    """Send the pieces as they come, until they end, the client leaves or the server stops."""
    sending = asyncio.create_task(_send_all(response, send))
    _open.add(leaving)
    try:
        await asyncio.wait([sending, leaving], return_when=asyncio.FIRST_COMPLETED)
    finally:
        _open.discard(leaving)
        leaving.cancel()
        # More than once: redis-py sometimes swallows a cancellation.
        while not sending.done():
            sending.cancel()
            await asyncio.wait([sending], timeout=0.2)
    if not sending.cancelled() and (error := sending.exception()):
        raise error
    with suppress(OSError):
        await send({"type": "http.response.body", "body": b""})


async def answer_unless_left(
    waiting: lateanswer.Waiting, leaving: asyncio.Task[None]
) -> lateanswer.LateAnswer | None:
    """Return the answer that is waited for; None if there is none, the client leaves or the server's
    time to stop is over. Unlike a stream it goes on when the server is told to stop: its client has
    nothing to reconnect to."""
    answering = asyncio.ensure_future(waiting())
    try:
        # The server cancels what is left at the end of its time: the message is accepted, so say that.
        with suppress(asyncio.CancelledError):
            await asyncio.wait([answering, leaving], return_when=asyncio.FIRST_COMPLETED)
    finally:
        while not answering.done():
            answering.cancel()
            await asyncio.wait([answering], timeout=0.2)
    return None if answering.cancelled() else answering.result()


async def _send_all(response: StreamingHttpResponse, send: Send) -> None:
    # Not `streaming_content`, a generator around this one: closing that would not close this.
    async with aclosing(cast("Any", response)._iterator) as pieces:
        async for piece in pieces:
            async with asyncio.timeout(settings.WEB_SEND_SECONDS):
                await send({"type": "http.response.body", "body": piece, "more_body": True})


async def wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def end_streams_on_stop(loop: asyncio.AbstractEventLoop) -> None:
    """End all streams on a signal to stop: the server waits for open requests. A client whose stream
    ends reconnects, to another process."""

    def end() -> None:
        for leaving in _open:
            leaving.cancel()

    for signum in (signal.SIGTERM, signal.SIGINT):
        handler = signal.getsignal(signum)

        def handle(number: int, frame: Any, handler: Any = handler) -> None:
            loop.call_soon_threadsafe(end)
            if callable(handler):
                handler(number, frame)

        signal.signal(signum, handle)
