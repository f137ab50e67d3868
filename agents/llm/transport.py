"""The transport to the model endpoint: the OpenAI SDK in one event loop for all calls of the process.

The threads of the runs wait meanwhile. One thread reads for all of them: to wake a thread for every
token of its answer costs many times as much as the token.
"""

import asyncio
import atexit
import functools
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager, suppress
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from django.conf import settings

if TYPE_CHECKING:
    # At run time it is loaded by the first call: 30 MB and half a second that only workers need.
    import openai

T = TypeVar("T")

CONNECT_SECONDS = 5.0
# The more answers arrive at once, the less often each of them is read.
REST_SECONDS_EACH = 0.0005
MIN_REST_SECONDS = 0.01
MAX_REST_SECONDS = 0.1
# Chunks closer than this were read together.
TOGETHER_SECONDS = 0.002


class Answer(Protocol):
    """The receiver of an answer, in the thread of the event loop; an exception ends the call."""

    def begin(self, content_type: str) -> None:
        """Take the type of the body, once the endpoint has accepted the call."""

    def feed(self, chunk: bytes) -> None:
        """Take a piece of the body, cut anywhere."""


OnCancel = Callable[[Callable[[], None]], AbstractContextManager[None]]


def post(body: bytes, answer: Answer, *, deadline: float, on_cancel: OnCancel) -> None:
    """Send a call of `/chat/completions` and feed `answer` to its end.

    `on_cancel` receives a function that cancels the call from any thread. Raises the SDK's errors;
    `TimeoutError` at the `deadline` (in `time.monotonic()`), and `concurrent.futures.CancelledError`.
    """
    _run(_post(body, answer, deadline, on_cancel))


async def _post(body: bytes, answer: Answer, deadline: float, on_cancel: OnCancel) -> None:
    task = asyncio.create_task(_stream(body, answer))
    loop = asyncio.get_running_loop()

    def cancel() -> None:
        loop.call_soon_threadsafe(task.cancel)

    with on_cancel(cancel):
        async with asyncio.timeout(_remaining(deadline)):
            await task


def _remaining(deadline: float) -> float | None:
    return None if deadline == float("inf") else max(0.0, deadline - time.monotonic())


async def _stream(body: bytes, answer: Answer) -> None:
    import openai

    seconds = settings.OPENAI_TIMEOUT_SECONDS
    async with await _client().post(
        "/chat/completions",
        cast_to=object,
        # Bytes and an untyped stream: the SDK's typed request and events cost ten times the rest of
        # the call.
        content=body,
        options={
            "headers": {"Content-Type": "application/json", "Accept": "text/event-stream"},
            "timeout": openai.Timeout(seconds, connect=min(CONNECT_SECONDS, seconds)),
        },
        stream=True,
        stream_cls=openai.AsyncStream[object],
    ) as stream:
        _reading.add(stream)
        try:
            answer.begin(stream.response.headers.get("content-type", ""))
            rested = 0.0
            async for chunk in stream.response.aiter_bytes():
                answer.feed(chunk)
                if (rest := rest_seconds()) and time.monotonic() - rested > TOGETHER_SECONDS:
                    await asyncio.sleep(rest)
                    rested = time.monotonic()
        finally:
            _reading.discard(stream)


# The answers that arrive in this process.
_reading: set[object] = set()


def rest_seconds() -> float:
    """Return how long to leave an answer in its buffer: 0 unless many arrive at once."""
    rest = len(_reading) * REST_SECONDS_EACH
    return 0 if rest < MIN_REST_SECONDS else min(rest, MAX_REST_SECONDS)


_starting = threading.Lock()


def _run(work: Coroutine[Any, Any, T], seconds: float | None = None) -> T:
    """Run a coroutine in the event loop, and wait for it."""
    with _starting:  # without it, concurrent threads would make a loop each
        loop = _loop()
    return asyncio.run_coroutine_threadsafe(work, loop).result(seconds)


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    import uvloop

    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    threading.Thread(target=loop.run_forever, name="endpoint", daemon=True).start()
    atexit.register(close)
    return loop


def warm_up() -> None:
    """Load the SDK, so that the first call of the process need not wait for it."""
    _run(_make_client())


async def _make_client() -> None:
    _client()


@functools.cache
def _client() -> "openai.AsyncOpenAI":
    """One for the process, made in its event loop: a client costs 70 ms, most of it TLS. Retries are
    up to agents.runs.outcomes: a run waits in the database, not in a worker's slot."""
    import openai

    return openai.AsyncOpenAI(
        api_key=settings.OPENAI_API_KEY or "none",
        base_url=settings.OPENAI_BASE_URL or None,
        max_retries=0,
        # The key and the conversation go nowhere but to the configured address.
        http_client=openai.DefaultAioHttpClient(follow_redirects=False),
    )


def close() -> None:
    """Close all connections. The next call makes a client with the settings of that time."""
    with suppress(TimeoutError):
        _run(_close_client(), seconds=2)


async def _close_client() -> None:
    if _client.cache_info().currsize:
        client = _client()
        _client.cache_clear()
        await client.close()
