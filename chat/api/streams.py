"""Server-sent events of runs and threads, as async generators of whole frames. Database work runs in
threads, one unit at a time."""

import asyncio
import logging
import re
import weakref
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing
from functools import partial
from typing import Any, ParamSpec, TypeVar

import orjson
from django.conf import settings
from django.db import close_old_connections
from django.db.models.functions import Coalesce, Length
from django.http import StreamingHttpResponse
from redis.exceptions import RedisError
from rest_framework import exceptions
from rest_framework.request import Request

from agents.events import subscriber
from agents.events.subscriber import EventId, Gap, StreamEvent
from agents.models import Run
from agents.models.runs import STATE
from agents.runs import retries
from agents.runs.retries import PendingRetry, pending_retry
from chat.api import stream_access
from chat.api.stream_access import (
    AccessLost,
    AccessQueries,
    AccessResults,
    AccessUnverified,
    AccessWatcher,
    StreamCaller,
)
from chat.models import fitting, read_contents
from chat.representation import AcceptedJSON, message_json, run_json
from lib import limiter
from lib.db import TRANSIENT_ERRORS
from lib.limiter import Limiter
from realm.access import Reason

logger = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 15.0
# Turns read per query; long ones make it fewer.
TURNS = 50
END = 1 << 62  # stands for the end of an attempt; no event has this number
START = EventId(0, 0)
EVENT_ID = re.compile(r"([0-9]{1,5})-([0-9]{1,10}|end)\Z", re.ASCII)
KEEP_ALIVE = b": \n\n"
# A disconnected client reconnects after this many milliseconds.
RETRY = b"retry: 1000\n\n"
P = ParamSpec("P")
T = TypeVar("T")


class TooManyStreams(Exception):
    """A limit on open streams, each of which takes memory."""

    code = "too_many_streams"
    retry_after = 5


class ProcessStreamsExceeded(TooManyStreams):
    """The limit of the process, CHAT_MAX_STREAMS."""


class CallerStreamsExceeded(TooManyStreams):
    """The limit of a caller, CHAT_MAX_STREAMS_PER_USER."""


# The streams of this process, including those that have not started.
open_streams = Limiter()


class StreamSlot:
    """A slot of `open_streams`, released explicitly or by the garbage collector: a client may
    disconnect before the first frame. Raises `TooManyStreams`."""

    def __init__(self, caller: str) -> None:
        limit = settings.CHAT_MAX_STREAMS_PER_USER
        try:
            open_streams.acquire(caller, limit=limit or None, total=settings.CHAT_MAX_STREAMS)
        except limiter.TotalReached:
            raise ProcessStreamsExceeded(
                "Too many streams are open on this server. Retry, or poll the run."
            ) from None
        except limiter.HolderReached:
            raise CallerStreamsExceeded(
                f"You have reached the limit of {limit} open streams. Close one, or poll the run."
            ) from None
        self.release = weakref.finalize(self, open_streams.release, caller)


class EventStream(StreamingHttpResponse):
    def __init__(self, frames: AsyncGenerator[bytes], slot: StreamSlot, **headers: str) -> None:
        super().__init__(
            _releasing(frames, slot),
            content_type="text/event-stream",
            headers={
                "Cache-Control": "no-store, no-transform",
                # Disables buffering in nginx.
                "X-Accel-Buffering": "no",
                **headers,
            },
        )


async def _releasing(frames: AsyncGenerator[bytes], slot: StreamSlot) -> AsyncGenerator[bytes]:
    try:
        async with aclosing(frames):
            async for frame in frames:
                yield frame
    finally:
        slot.release()


def wants_stream(request: Request) -> bool:
    """Return True if the Accept header prefers server-sent events to JSON."""
    best, stream = 0.0, False
    for part in request.headers.get("Accept", "").lower().split(","):
        kind, *parameters = (piece.strip() for piece in part.split(";"))
        quality = next((_parse_quality(p[2:]) for p in parameters if p.startswith("q=")), 1.0)
        if kind in ("text/event-stream", "application/json", "*/*") and quality > best:
            best, stream = quality, kind == "text/event-stream"
    return stream


def _parse_quality(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        return 0.0


def requested_event_id(request: Request) -> EventId | None:
    """Return the id of the last event that the client received, None for none."""
    value = _after(request)
    if not value:
        return None
    match = EVENT_ID.match(value)
    if not match:
        raise exceptions.ParseError("Not the id of an event of a run.")
    return EventId(int(match[1]), END if match[2] == "end" else int(match[2]))


def requested_number(request: Request) -> int:
    value = _after(request) or "0"
    if not (value.isascii() and value.isdigit() and len(value) <= 9):
        raise exceptions.ParseError("Not the id of an event of a thread.")
    return int(value)


def _after(request: Request) -> str:
    # A browser that reconnects by itself repeats the original URL.
    return request.headers.get("Last-Event-ID") or request.query_params.get("after") or ""


async def run_events(
    run: Run, after: EventId | None, caller: StreamCaller, accepted: AcceptedJSON | None = None
) -> AsyncGenerator[bytes]:
    """Yield the events of a run after `after`, up to its outcome, while `caller` has access. `accepted`
    is sent first."""
    yield RETRY
    if accepted:
        yield _frame(str(START), "run.accepted", accepted)
    elif after is None:
        yield _frame(str(START), "run.status", {"status": run.status, "attempt": run.attempt})
    events, watcher = _hub()
    with (
        events.subscribe(run.pk, after or START) as subscription,
        watcher.guard(caller, run.thread_id, subscription.wake) as guard,
    ):
        # In the background: under load the database is slow, and tokens need not wait for it.
        state = RunState(subscription)
        reading_state = asyncio.create_task(state.read())
        last: StreamEvent | Gap | None = None
        try:
            while not (subscription.ended and subscription.up_to_date):
                received = await subscription.receive(guard.limit_wait(KEEP_ALIVE_SECONDS))
                if not guard.is_fresh():
                    await guard.check()
                last = received[-1] if received else last
                # One write for all events.
                yield b"".join(map(_event_frame, received)) + state.take(last) or KEEP_ALIVE
            if (
                after
                and subscription.last_id == after
                and after.number < END
                and not await _remembers(events, run.pk)
            ):
                yield _gap(str(EventId(after.attempt, after.number + 1)), f"{after.attempt}-end")
                last = None
            await guard.check()
            outcome = await unit(_outcome, caller, run.pk, last)
            if outcome is None:
                await guard.recheck()
            yield outcome or _run_deleted(run.pk)
        except AccessLost as lost:
            yield _run_deleted(run.pk) if lost.reason is Reason.THREAD_DELETED else _closed(lost)
        except AccessUnverified:
            logger.warning("Stream closed: the access of its caller could not be checked")
        finally:
            reading_state.cancel()


class RunState:
    """The state of a run in the database when a stream of it opens: Redis may not have what happened
    before, as a run without subscribers publishes nothing."""

    def __init__(self, subscription: subscriber.RunSubscription) -> None:
        self._subscription = subscription
        self._retry: PendingRetry | None = None

    async def read(self) -> None:
        """End the subscription of a run that has ended; remember the retry that it waits for."""
        while True:
            try:
                ended, retry = await unit(_read_state, self._subscription.run_id)
            except TRANSIENT_ERRORS as error:
                logger.warning("Run state of a stream could not be read, retrying: %s", error)
                await asyncio.sleep(2)
                continue
            if ended:
                self._subscription.end()
            elif retry:
                self._retry = retry
                self._subscription.wake()
            return

    def take(self, last: StreamEvent | Gap | None) -> bytes:
        """Return a frame of the retry, once, unless `last` is the same or of a later attempt. It has no
        id, so that a client resumes after the last event of the run."""
        retry, self._retry = self._retry, None
        if retry is None or self._subscription.last_id.attempt > retry.attempt:
            return b""
        if isinstance(last, StreamEvent) and last.type == retries.EVENT:
            return b""
        data = orjson.dumps(retry.as_event()).decode()
        return f"event: {retries.EVENT}\ndata: {data}\n\n".encode()


def _read_state(run_id: str) -> tuple[bool, PendingRetry | None]:
    run = Run.objects.unfinished().filter(pk=run_id).only(*STATE).first()
    return run is None, pending_retry(run) if run else None


async def _remembers(events: subscriber.Subscriber, run_id: str) -> bool:
    try:
        return await events.has_stream(run_id)
    except RedisError:
        return False


async def thread_events(thread_id: str, after: int, caller: StreamCaller) -> AsyncGenerator[bytes]:
    """Yield the events of a thread while it exists and `caller` has access. Events are numbered in the
    order of the conversation: 2n+1 is the message of turn n, 2n+2 its outcome."""
    yield RETRY
    events, watcher = _hub()
    with (
        events.watch_thread(thread_id) as changed,
        watcher.guard(caller, thread_id, changed.set) as guard,
    ):
        try:
            while True:
                changed.clear()
                await guard.check()
                batch = await unit(_next_frames, caller, thread_id, after)
                if batch is None:
                    # Raises the reason, unless access was restored meanwhile.
                    await guard.recheck()
                    continue
                frames, reached = batch
                if frames:
                    after = reached
                    yield frames
                    continue
                try:
                    async with asyncio.timeout(guard.limit_wait(KEEP_ALIVE_SECONDS)):
                        await changed.wait()
                except TimeoutError:
                    await guard.check()
                    yield KEEP_ALIVE
        except AccessLost as lost:
            yield _closed(lost)
        except AccessUnverified:
            logger.warning("Stream closed: the access of its caller could not be checked")


def _next_frames(caller: StreamCaller, thread_id: str, after: int) -> tuple[bytes, int] | None:
    """Return the next frames after the number `after`, and the number of the last one. None if the
    caller has no access to the thread."""
    size = Length("message__content") + Coalesce(Length("answer__content"), 0)
    thread = caller.threads().filter(pk=thread_id)
    # From the last turn sent on: if it is missing, the thread may be deleted.
    start = after - after % 2
    runs: list[Any] = list(
        Run.objects.visible_to(caller.user)
        .filter(thread_id=thread_id, position__gte=max(0, start - 2))
        .select_related("message", "answer")
        .annotate(size=size)
        .defer("message__content", "answer__content")
        .order_by("position")[: TURNS + 1]
    )
    if not runs and not thread.exists():
        return None
    runs = [run for run in runs if run.position >= start]
    runs = runs[: min(TURNS, fitting(run.size for run in runs))]
    messages = (message for run in runs for message in (run.message, run.answer) if message)
    read_contents(messages)
    frames: list[bytes] = []
    for number, kind, data in _numbered(runs):
        if number <= after:
            continue
        if number > after + 1:
            frames.append(_gap(str(after + 1), str(number - 1)))
        frames.append(_frame(str(number), kind, data))
        after = number
    return b"".join(frames), after


def _numbered(runs: Any) -> Iterator[tuple[int, str, dict[str, Any]]]:
    for run in runs:
        yield (
            run.position + 1,
            "message.created",
            {
                "runId": run.pk,
                "message": message_json(run.message),
            },
        )
        if not run.is_finished:
            return
        answer = {"message": message_json(run.answer)} if run.answer else {}
        yield run.position + 2, f"run.{run.status}", {"run": run_json(run), **answer}


def current_subscriber() -> subscriber.Subscriber:
    """Return the subscriber of the running event loop."""
    return subscriber.current(find_ended)


def _hub() -> tuple[subscriber.Subscriber, AccessWatcher]:
    """Return the subscriber and the watcher of the running event loop."""
    events, watcher = current_subscriber(), stream_access.watcher(_check_access)
    events.revoked = partial(_revoked, watcher)
    return events, watcher


def _revoked(watcher: AccessWatcher, revocation: dict[str, Any] | None) -> None:
    if revocation is None:
        watcher.recheck_all()
    else:
        watcher.invalidate(user=revocation.get("user"), thread=revocation.get("thread"))


async def _check_access(queries: AccessQueries) -> AccessResults:
    return await unit(stream_access.look_up, queries)


async def find_ended(run_ids: list[str]) -> list[str]:
    """Return the finished runs, deleted ones included."""
    return await unit(_ended, run_ids)


def _ended(run_ids: list[str]) -> list[str]:
    unfinished: set[str] = set()
    for first in range(0, len(run_ids), 500):
        batch = run_ids[first : first + 500]
        unfinished.update(
            Run.objects.unfinished().filter(pk__in=batch).values_list("pk", flat=True)
        )
    return [run_id for run_id in run_ids if run_id not in unfinished]


def _outcome(caller: StreamCaller, run_id: str, last: StreamEvent | Gap | None) -> bytes | None:
    """Return the frame of the outcome, preceded by a gap if events after `last` are missing. None if
    the caller has no access to the run."""
    visible = Run.objects.visible_to(caller.user)
    run = visible.select_related("answer").filter(pk=run_id).first()
    if run is None:
        return None
    end = f"{run.attempt}-end"
    outcome = _frame(end, f"run.{run.status}", {"run": run_json(run)})
    if (
        isinstance(last, StreamEvent)
        and run.status == Run.Status.COMPLETED
        and _is_incomplete(run, last)
    ):
        attempt, number = last.id
        begins = EventId(run.attempt, number + 1 if attempt == run.attempt else 1)
        return _gap(str(begins), end) + outcome
    return outcome


def _is_incomplete(run: Run, last: StreamEvent) -> bool:
    """Return True if events up to the last step are missing: Redis was emptied or unavailable."""
    steps = run.steps.filter(attempt=run.attempt).count()
    finished = orjson.loads(last.data)["step"] if last.type == "step.finished" else 0
    return finished < steps or last.id.attempt < run.attempt


async def unit(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run database work in a thread, which keeps no connection that others could use."""

    def run() -> T:
        close_old_connections()
        try:
            return function(*args, **kwargs)
        finally:
            close_old_connections()

    return await asyncio.to_thread(run)


def _event_frame(event: StreamEvent | Gap) -> bytes:
    if isinstance(event, Gap):
        return _gap(str(event.first), str(event.last))
    return f"id: {event.id}\nevent: {event.type}\ndata: {event.data}\n\n".encode()


def _run_deleted(run_id: str) -> bytes:
    return _frame("0-end", "run.deleted", {"id": run_id})


def _closed(lost: AccessLost) -> bytes:
    """Return a frame without an id, so that a client that regains access resumes after the last
    event."""
    data = orjson.dumps({"reason": lost.reason, "error": str(lost)})
    return b"event: stream.closed\ndata: " + data + b"\n\n"


def _gap(first: str, last: str) -> bytes:
    return _frame(last, "gap", {"from": first, "to": last})


def _frame(id: str, kind: str, data: Mapping[str, Any]) -> bytes:
    return (
        f"id: {id}\nevent: {kind}\ndata: ".encode()
        + orjson.dumps(data, option=orjson.OPT_UTC_Z)
        + b"\n\n"
    )
