"""The way to the model endpoint: the OpenAI SDK in one event loop for all the calls of the process.

The threads of the runs wait meanwhile. One thread reads for all of them, because a thread that is woken
for every token of its answer, to wait for all the others then, costs many times what the token does.
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
# The more answers come at once, the less often each of them is looked at.
REST_SECONDS_EACH = 0.0005
LEAST_REST_SECONDS = 0.01
MOST_REST_SECONDS = 0.1
# Chunks closer than this were read together.
TOGETHER_SECONDS = 0.002


class Answer(Protocol):
    """Who takes what comes, in the thread of the event loop; whatever is raised ends the call."""

    def begin(self, content_type: str) -> None:
        """The endpoint accepts the call."""

    def feed(self, chunk: bytes) -> None:
        """Some of the body, cut anywhere."""


Cutting = Callable[[Callable[[], None]], AbstractContextManager[None]]


def post(body: bytes, answer: Answer, *, deadline: float, cutting: Cutting) -> None:
    """Send a call of `/chat/completions` and feed `answer` to its end. `cutting` is given what ends the
    call from any thread while it goes on. Raises what the SDK raises; `TimeoutError` at the `deadline`
    (of `time.monotonic()`), and `concurrent.futures.CancelledError` where it was cut."""
    _run(_post(body, answer, deadline, cutting))


async def _post(body: bytes, answer: Answer, deadline: float, cutting: Cutting) -> None:
    task = asyncio.create_task(_stream(body, answer))
    loop = asyncio.get_running_loop()

    def cut() -> None:
        loop.call_soon_threadsafe(task.cancel)

    with cutting(cut):
        async with asyncio.timeout(_left(deadline)):
            await task


def _left(deadline: float) -> float | None:
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


# The answers that are coming in this process.
_reading: set[object] = set()


def rest_seconds() -> float:
    """How long to leave an answer in its buffer: nothing unless many come at once."""
    rest = len(_reading) * REST_SECONDS_EACH
    return 0 if rest < LEAST_REST_SECONDS else min(rest, MOST_REST_SECONDS)


_starting = threading.Lock()


def _run(work: Coroutine[Any, Any, T], seconds: float | None = None) -> T:
    """Have the event loop do it, and wait for it."""
    with _starting:  # threads that all find no loop would make one each
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
    _run(_made())


async def _made() -> None:
    _client()


@functools.cache
def _client() -> "openai.AsyncOpenAI":
    """One for the process, made in its event loop: a client costs 70 ms, most of it TLS. Retries are
    agents.runs.execution' affair, which waits in the database and not in a worker's slot."""
    import openai

    return openai.AsyncOpenAI(
        api_key=settings.OPENAI_API_KEY or "none",
        base_url=settings.OPENAI_BASE_URL or None,
        max_retries=0,
        http_client=openai.DefaultAioHttpClient(),
    )


def close() -> None:
    """Close all connections. The next call makes a client as the settings are then."""
    with suppress(TimeoutError):
        _run(_closed(), seconds=2)


async def _closed() -> None:
    if _client.cache_info().currsize:
        client = _client()
        _client.cache_clear()
        await client.close()
