"""Server-sent events of a run and of a thread. Async generators of whole frames; the database is
asked in threads, a unit at a time."""

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
from chat import rights
from chat.models import fitting, read_contents
from chat.representation import AcceptedJSON, message_json, run_json
from chat.rights import Caller
from lib import limiter
from lib.db import TRANSIENT_ERRORS
from lib.limiter import Limiter
from realm.access import Reason

logger = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 15.0
# How many turns of a thread are read at a time, fewer where they are long.
TURNS = 50
END = 1 << 62  # no event has such a number: the place of an attempt's end
START = EventId(0, 0)
PLACE = re.compile(r"([0-9]{1,5})-([0-9]{1,10}|end)\Z", re.ASCII)
KEEP_ALIVE = b": \n\n"
# A client that was cut off comes back after this many milliseconds.
RETRY = b"retry: 1000\n\n"
GONE = {Reason.THREAD_DELETED}

P = ParamSpec("P")
T = TypeVar("T")


class TooManyStreams(Exception):
    """Each stream takes memory for as long as it is open."""

    code = "too_many_streams"
    retry_after = 5


class Full(TooManyStreams):
    """The process has as many as it may."""


class TooManyOfOne(TooManyStreams):
    """One caller has as many of them as they may."""


# The streams of this process, those that have yet to begin included.
open_streams = Limiter()


class Seat:
    """What a stream takes, until it is left or has been forgotten: a client may be gone before the
    first frame. Raises `TooManyStreams`."""

    def __init__(self, caller: str) -> None:
        limit = settings.CHAT_MAX_STREAMS_PER_USER
        try:
            open_streams.acquire(caller, limit=limit or None, total=settings.CHAT_MAX_STREAMS)
        except limiter.TotalReached:
            raise Full(
                "Too many streams are open here. Try again, or ask for the run itself."
            ) from None
        except limiter.HolderReached:
            raise TooManyOfOne(
                f"You have {limit} streams open here, and no more may be. Close one, or ask for the "
                "run itself. An operator can raise it: CHAT_MAX_STREAMS_PER_USER."
            ) from None
        self.leave = weakref.finalize(self, open_streams.release, caller)


class EventStream(StreamingHttpResponse):
    def __init__(self, frames: AsyncGenerator[bytes], seat: Seat, **headers: str) -> None:
        super().__init__(
            _seated(frames, seat),
            content_type="text/event-stream",
            headers={
                "Cache-Control": "no-store, no-transform",
                # nginx would keep it back otherwise.
                "X-Accel-Buffering": "no",
                **headers,
            },
        )


async def _seated(frames: AsyncGenerator[bytes], seat: Seat) -> AsyncGenerator[bytes]:
    try:
        async with aclosing(frames):
            async for frame in frames:
                yield frame
    finally:
        seat.leave()


def wants_stream(request: Request) -> bool:
    """Whether the Accept header names server-sent events before JSON."""
    best, stream = 0.0, False
    for part in request.headers.get("Accept", "").lower().split(","):
        kind, *parameters = (piece.strip() for piece in part.split(";"))
        quality = next((_quality(p[2:]) for p in parameters if p.startswith("q=")), 1.0)
        if kind in ("text/event-stream", "application/json", "*/*") and quality > best:
            best, stream = quality, kind == "text/event-stream"
    return stream


def _quality(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        return 0.0


def place_asked(request: Request) -> EventId | None:
    """Where a client wants to go on: after this. None: from the beginning."""
    value = _after(request)
    if not value:
        return None
    found = PLACE.match(value)
    if not found:
        raise exceptions.ParseError("That is the id of no event of a run.")
    return EventId(int(found[1]), END if found[2] == "end" else int(found[2]))


def number_asked(request: Request) -> int:
    value = _after(request) or "0"
    if not (value.isascii() and value.isdigit() and len(value) <= 9):
        raise exceptions.ParseError("That is the id of no event of a thread.")
    return int(value)


def _after(request: Request) -> str:
    # A browser that comes back by itself repeats the address that it began with.
    return request.headers.get("Last-Event-ID") or request.query_params.get("after") or ""


async def run_events(
    run: Run, after: EventId | None, caller: Caller, accepted: AcceptedJSON | None = None
) -> AsyncGenerator[bytes]:
    """The events of a run from after `after` on, up to its outcome, for as long as `caller` has the
    right to them. `accepted`: what is told first."""
    yield RETRY
    if accepted:
        yield _frame(str(START), "run.accepted", accepted)
    elif after is None:
        yield _frame(str(START), "run.status", {"status": run.status, "attempt": run.attempt})
    events, watch = _hub()
    with (
        events.subscribe(run.pk, after or START) as subscription,
        watch.guard(caller, run.thread_id, subscription.wake) as guard,
    ):
        # Beside the telling: in a rush the database has others to serve, and tokens need not wait.
        looking = asyncio.create_task(_end_if_ended(subscription))
        last: StreamEvent | Gap | None = None
        try:
            while not (subscription.ended and subscription.up_to_date):
                found = await subscription.receive(guard.patience(KEEP_ALIVE_SECONDS))
                if not guard.is_fresh():
                    await guard.check()
                last = found[-1] if found else last
                # One write for all of them.
                yield b"".join(map(_told, found)) or KEEP_ALIVE
            if (
                after
                and subscription.last_id == after
                and after.number < END
                and not await _remembers(events, run.pk)
            ):
                yield _gap(str(EventId(after.attempt, after.number + 1)), f"{after.attempt}-end")
                last = None
            await guard.check()
            outcome = await _unit(_outcome, caller, run.pk, last)
            if outcome is None:
                await guard.check_again()
            yield outcome or _run_deleted(run.pk)
        except rights.Lost as lost:
            yield _run_deleted(run.pk) if lost.reason in GONE else _closed(lost)
        except rights.Unknown:
            logger.warning("A stream ends: the rights of its caller cannot be looked up")
        finally:
            looking.cancel()


async def _end_if_ended(subscription: subscriber.RunSubscription) -> None:
    while True:
        try:
            if await _which_ended([subscription.run_id]):
                subscription.end()
            return
        except TRANSIENT_ERRORS as error:
            logger.warning("A subscription cannot look whether its run has ended: %s", error)
            await asyncio.sleep(2)


async def _remembers(events: subscriber.Subscriber, run_id: str) -> bool:
    try:
        return await events.has_stream(run_id)
    except RedisError:
        return False


async def thread_events(thread_id: str, after: int, caller: Caller) -> AsyncGenerator[bytes]:
    """What happens in a thread, for as long as the client stays, the thread is there and `caller` has
    the right to it. Numbers count the questions and outcomes in the order of the conversation: 2n+1 is
    the question of turn n, 2n+2 its outcome."""
    yield RETRY
    events, watch = _hub()
    with events.watch_thread(thread_id) as news, watch.guard(caller, thread_id, news.set) as guard:
        try:
            while True:
                news.clear()
                await guard.check()
                told = await _unit(_told_of_thread, caller, thread_id, after)
                if told is None:
                    # Raises the reason, unless it was open again meanwhile.
                    await guard.check_again()
                    continue
                frames, reached = told
                if frames:
                    after = reached
                    yield frames
                    continue
                try:
                    async with asyncio.timeout(guard.patience(KEEP_ALIVE_SECONDS)):
                        await news.wait()
                except TimeoutError:
                    await guard.check()
                    yield KEEP_ALIVE
        except rights.Lost as lost:
            yield _closed(lost)
        except rights.Unknown:
            logger.warning("A stream ends: the rights of its caller cannot be looked up")


def _told_of_thread(caller: Caller, thread_id: str, after: int) -> tuple[bytes, int] | None:
    """The next frames after the number `after`, and the number of the last of them. None where the
    thread is not open to the caller."""
    size = Length("message__content") + Coalesce(Length("answer__content"), 0)
    thread = caller.threads().filter(pk=thread_id)
    # From the turn on that was told last: where it is not found the thread may be gone.
    known = after - after % 2
    runs: list[Any] = list(
        Run.objects.visible_to(caller.user)
        .filter(thread_id=thread_id, position__gte=max(0, known - 2))
        .select_related("message", "answer")
        .annotate(size=size)
        .defer("message__content", "answer__content")
        .order_by("position")[: TURNS + 1]
    )
    if not runs and not thread.exists():
        return None
    runs = [run for run in runs if run.position >= known]
    runs = runs[: min(TURNS, fitting(run.size for run in runs))]
    said = (message for run in runs for message in (run.message, run.answer) if message)
    read_contents(said)
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


def _hub() -> tuple[subscriber.Subscriber, rights.Watch]:
    """Those of the running event loop."""
    events, watch = subscriber.current(_which_ended), rights.watch(_looked_up)
    events.revoked = partial(_revoked, watch)
    return events, watch


def _revoked(watch: rights.Watch, news: dict[str, Any] | None) -> None:
    if news is None:
        watch.renew()
    else:
        watch.doubt(user=news.get("user"), thread=news.get("thread"))


async def _looked_up(questions: rights.Questions) -> rights.Answers:
    return await _unit(rights.look_up, questions)


async def _which_ended(run_ids: list[str]) -> list[str]:
    """Also those that are gone."""
    return await _unit(_ended, run_ids)


def _ended(run_ids: list[str]) -> list[str]:
    going_on: set[str] = set()
    for first in range(0, len(run_ids), 500):
        some = run_ids[first : first + 500]
        going_on.update(Run.objects.unfinished().filter(pk__in=some).values_list("pk", flat=True))
    return [run_id for run_id in run_ids if run_id not in going_on]


def _outcome(caller: Caller, run_id: str, last: StreamEvent | Gap | None) -> bytes | None:
    """`last`: what was told before it. None where the caller has no such run any more."""
    visible = Run.objects.visible_to(caller.user)
    run = visible.select_related("answer").filter(pk=run_id).first()
    if run is None:
        return None
    end = f"{run.attempt}-end"
    outcome = _frame(end, f"run.{run.status}", {"run": run_json(run)})
    if (
        isinstance(last, StreamEvent)
        and run.status == Run.Status.COMPLETED
        and _breaks_off(run, last)
    ):
        attempt, number = last.id
        begins = EventId(run.attempt, number + 1 if attempt == run.attempt else 1)
        return _gap(str(begins), end) + outcome
    return outcome


def _breaks_off(run: Run, last: StreamEvent) -> bool:
    """Whether the telling of a run that was answered ends before its last step: Redis was wiped, or
    did not come back until it was too late."""
    steps = run.steps.filter(attempt=run.attempt).count()
    finished = orjson.loads(last.data)["step"] if last.type == "step.finished" else 0
    return finished < steps or last.id.attempt < run.attempt


async def _unit(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Database work in a thread, which keeps no connection afterwards that others may use."""

    def fresh() -> T:
        close_old_connections()
        try:
            return function(*args, **kwargs)
        finally:
            close_old_connections()

    return await asyncio.to_thread(fresh)


def _told(told: StreamEvent | Gap) -> bytes:
    if isinstance(told, Gap):
        return _gap(str(told.first), str(told.last))
    return f"id: {told.id}\nevent: {told.type}\ndata: {told.data}\n\n".encode()


def _run_deleted(run_id: str) -> bytes:
    return _frame("0-end", "run.deleted", {"id": run_id})


def _closed(lost: rights.Lost) -> bytes:
    """Without an id: a client that has the rights again goes on after the last event that has one."""
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
