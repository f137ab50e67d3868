"""Deliver the progress of runs to subscribers in this process: the counterpart of
agents.events.publisher.

One task of the process receives the channel on which all runs publish, and passes events on to
their subscriptions. A subscription that is new, resumed or behind reads the run's stream in Redis from
its position. An idle one costs memory only: no thread, no connection, no query.
"""

import asyncio
import logging
import random
import time
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import orjson
from redis.exceptions import RedisError

from agents.events import publisher, stream
from lib import revocations
from lib.redis import async_client

logger = logging.getLogger(__name__)

# A slower subscription drops its pending events, and reads on from Redis.
MAX_PENDING = 500
BATCH = 1000
MAX_PAUSE_SECONDS = 5.0
LINGER_SECONDS = 30.0


class EventId(NamedTuple):
    """The id of an event: the attempt, and its number there."""

    attempt: int
    number: int

    def __str__(self) -> str:
        return f"{self.attempt}-{self.number}"


class StreamEvent(NamedTuple):
    id: EventId
    type: str
    data: str  # JSON


class Gap(NamedTuple):
    """Events that are lost, both ends included."""

    first: EventId
    last: EventId


class RunSubscription:
    """A subscription to a run. `last_id`: the last event that it has received."""

    def __init__(self, subscriber: "Subscriber", run_id: str, last_id: EventId) -> None:
        self.run_id = run_id
        self.last_id = last_id
        # The run has ended; its outcome is in the database.
        self.ended = False
        # All events before the end have been received.
        self.up_to_date = False
        self._subscriber = subscriber
        self._behind = True
        self._woken = False
        self._pending: deque[StreamEvent] = deque()
        self._changed = asyncio.Event()

    async def receive(self, seconds: float) -> list[StreamEvent | Gap]:
        """Return new events in order; none after `seconds` without any, after `wake`, or once the run
        has ended."""
        until = asyncio.get_running_loop().time() + seconds
        while not (events := await self._next()) and not self.ended:
            if self._woken:
                self._woken = False
                return []
            # The time-out is around this alone: redis-py sometimes swallows a cancellation.
            try:
                async with asyncio.timeout_at(until):
                    await self._changed.wait()
            except TimeoutError:
                return []
        return events

    async def _next(self) -> list[StreamEvent | Gap]:
        self._changed.clear()
        ended, behind = self.ended, self._behind
        stored: list[StreamEvent] = []
        if behind or not self._is_contiguous(self._pending):
            # Set before, as it may fall behind while it reads; true unless reading succeeds.
            self._behind, behind = False, True
            try:
                stored = await self._subscriber.read(self.run_id, self.last_id)
                behind = len(stored) == BATCH
            except RedisError:
                # The events may still exist. When Redis is back, all subscriptions are woken and read
                # again; only then is a gap known.
                self.up_to_date = ended
                return []
            finally:
                self._behind = self._behind or behind
        events = stored if self._behind else sorted({*stored, *self._pending})
        self._pending.clear()
        self.up_to_date = ended and not self._behind
        return list(self._in_order(events))

    def _is_contiguous(self, events: Iterable[StreamEvent]) -> bool:
        return not any(isinstance(each, Gap) for each in self._in_order(events, advance=False))

    def _in_order(
        self, events: Iterable[StreamEvent], *, advance: bool = True
    ) -> Iterator[StreamEvent | Gap]:
        last_id = self.last_id
        for event in events:
            if event.id <= last_id:
                continue
            attempt, number = event.id
            expected = last_id.number + 1 if attempt == last_id.attempt else 1
            if number > expected:
                yield Gap(EventId(attempt, expected), EventId(attempt, number - 1))
            last_id = event.id
            if advance:
                self.last_id = last_id
            yield event

    def push(self, events: Iterable[StreamEvent]) -> None:
        self._pending.extend(events)
        if len(self._pending) > MAX_PENDING:
            self.fall_behind()
        self._changed.set()

    def fall_behind(self) -> None:
        self._pending.clear()
        self._behind = True
        self._changed.set()

    def end(self) -> None:
        self.ended = True
        self._changed.set()

    def wake(self) -> None:
        """Make `receive` return, with or without events."""
        self._woken = True
        self._changed.set()


class Subscriber:
    """The subscriptions of one event loop."""

    def __init__(self, find_ended: Callable[[list[str]], Awaitable[Iterable[str]]]) -> None:
        """`find_ended` reads from the database the runs of a list that have ended, in case Redis was
        unavailable when they did."""
        self._find_ended = find_ended
        # Called with revoked rights as they are published; with `None` if some may have been missed.
        self.revoked: Callable[[dict[str, Any] | None], None] = lambda revocation: None
        self._runs: dict[str, set[RunSubscription]] = defaultdict(set)
        self._threads: dict[str, set[asyncio.Event]] = defaultdict(set)
        self._ends: dict[str, set[asyncio.Event]] = defaultdict(set)
        self._task: asyncio.Task[None] | None = None
        self._announcing: set[asyncio.Task[None]] = set()
        self._left_at = 0.0
        self._failures = 0
        # A dead connection shows that Redis was restarted. Commands of this client are safe to repeat.
        self._redis = async_client(timeout=5, connect_timeout=2, retries=1)

    @contextmanager
    def subscribe(self, run_id: str, after: EventId) -> Iterator[RunSubscription]:
        """Subscribe to the events of a run after `after`. Check whether it has ended after entering: an
        earlier end is not published again."""
        subscription = RunSubscription(self, run_id, after)
        with self._registered(self._runs, run_id, subscription):
            self._announce([run_id])
            yield subscription

    @contextmanager
    def watch_thread(self, thread_id: str) -> Iterator[asyncio.Event]:
        """Yield an event that is set when a run of the thread is requested or ends."""
        changed = asyncio.Event()
        with self._registered(self._threads, thread_id, changed):
            yield changed

    @contextmanager
    def watch_run(self, run_id: str, ended: asyncio.Event) -> Iterator[None]:
        """Set `ended` when a run ends; workers need not publish its progress. An end that Redis does
        not deliver is not seen."""
        with self._registered(self._ends, run_id, ended):
            yield

    @contextmanager
    def _registered(self, table: dict[str, set[Any]], key: str, entry: Any) -> Iterator[None]:
        table[key].add(entry)
        if self._task is None:
            self._task = asyncio.create_task(self._listen())
        try:
            yield
        finally:
            table[key].discard(entry)
            if not table[key]:
                del table[key]
            self._left_at = time.monotonic()

    async def close(self) -> None:
        """Stop, and close the connections to Redis."""
        tasks = [*self._announcing, *([self._task] if self._task else [])]
        while running := [task for task in tasks if not task.done()]:
            for task in running:
                task.cancel()
            await asyncio.wait(running, timeout=0.2)
        await self._redis.connection_pool.disconnect()

    async def read(self, run_id: str, after: EventId) -> list[StreamEvent]:
        """Return at most `BATCH` events of a run after `after`. Raises `RedisError`."""
        start = f"{after.attempt}-{after.number + 1}"
        rows: Any = await self._redis.xrange(publisher.stream_key(run_id), start, "+", count=BATCH)
        return list(_parse_stored(rows))

    async def has_stream(self, run_id: str) -> bool:
        """Return whether Redis has any event of a run. Raises `RedisError`."""
        return bool(await self._redis.exists(publisher.stream_key(run_id)))

    def _announce(self, run_ids: list[str]) -> None:
        """Have the workers publish the events of these runs."""
        task = asyncio.create_task(self._send_announcement(run_ids))
        self._announcing.add(task)
        task.add_done_callback(self._announcing.discard)

    async def _send_announcement(self, run_ids: list[str]) -> None:
        with suppress(RedisError):  # repeated when Redis is back
            for first in range(0, len(run_ids), 500):
                message = orjson.dumps({"subscribed": run_ids[first : first + 500]})
                await self._redis.publish(publisher.control_channel(), message)

    def _is_needed(self) -> bool:
        """Return whether there are subscriptions, or were a moment ago: the next may come soon."""
        return bool(
            self._runs
            or self._threads
            or self._ends
            or time.monotonic() - self._left_at < LINGER_SECONDS
        )

    async def _listen(self) -> None:
        while self._is_needed():
            try:
                if self._failures:
                    await self._poll_database()
                await self._receive()
            except RedisError as error:
                if not self._failures:
                    logger.warning("Subscriber failed, retrying: Redis unavailable (%s)", error)
                self._failures += 1
            except Exception:
                # The database, or a defect: open streams must not starve.
                logger.exception("Subscriber failed, retrying")
                self._failures += 1
            if self._failures:
                max_pause = min(MAX_PAUSE_SECONDS, 0.25 * 2.0**self._failures)
                await asyncio.sleep(random.uniform(0.1, max_pause))  # noqa: S311
        self._task = None

    async def _receive(self) -> None:
        async with self._redis.pubsub() as pubsub:
            channels = {stream.live_channel(), revocations.channel()}
            await pubsub.subscribe(*channels)
            for _ in channels:
                while (await pubsub.get_message(timeout=5) or {}).get("type") != "subscribe":
                    pass
            if self._failures:
                logger.info("Subscriber recovered")
                self._failures = 0
            # From here on nothing is missed. Earlier events are read from the streams.
            for subscription in self._subscriptions():
                subscription.fall_behind()
            self._announce(list(self._runs))
            self.revoked(None)
            await self._poll_database()
            announced_at = time.monotonic()
            while self._is_needed():
                message = await pubsub.get_message(timeout=1)
                if message and message["type"] == "message":
                    self._handle(message)
                if time.monotonic() - announced_at > publisher.ANNOUNCE_SECONDS:
                    self._announce(list(self._runs))
                    announced_at = time.monotonic()

    def _handle(self, message: dict[str, Any]) -> None:
        channel = message["channel"].decode()
        try:
            data = orjson.loads(message["data"])
            if channel == revocations.channel():
                self.revoked(dict(data))
            else:
                self._deliver(data)
        except (TypeError, ValueError, AttributeError):
            logger.warning("Invalid message on %s ignored", channel)

    def _deliver(self, message: dict[str, Any]) -> None:
        for run_id, attempt, rows in message.get("progress", ()):
            if subscriptions := self._runs.get(run_id):
                events = [_parse_event(attempt, *row) for row in rows]
                for subscription in subscriptions:
                    subscription.push(events)
        if event := message.get("event"):
            kind, run_id, thread_id = event
            if kind != "agent.run.requested":
                for subscription in self._runs.get(run_id, ()):
                    subscription.end()
                for ended in self._ends.get(run_id, ()):
                    ended.set()
            for changed in self._threads.get(thread_id, ()):
                changed.set()
        if message.get("announce"):
            self._announce(list(self._runs))

    async def _poll_database(self) -> None:
        """Find the outcomes that Redis may have missed."""
        if self._runs:
            for run_id in await self._find_ended(list(self._runs)):
                for subscription in self._runs.get(run_id, ()):
                    subscription.end()
        for watchers in self._threads.values():
            for changed in watchers:
                changed.set()

    def _subscriptions(self) -> Iterator[RunSubscription]:
        for subscriptions in self._runs.values():
            yield from subscriptions


_subscribers: WeakKeyDictionary[asyncio.AbstractEventLoop, Subscriber] = WeakKeyDictionary()


def current(find_ended: Callable[[list[str]], Awaitable[Iterable[str]]]) -> Subscriber:
    """Return the subscriber of the running event loop."""
    loop = asyncio.get_running_loop()
    if loop not in _subscribers:
        _subscribers[loop] = Subscriber(find_ended)
    return _subscribers[loop]


def _parse_event(attempt: Any, number: Any, type: Any, data: Any) -> StreamEvent:
    """Return an event of the channel. Raises `TypeError`."""
    if not (isinstance(attempt, int) and isinstance(number, int)):
        raise TypeError("an event id is two numbers")
    if not (isinstance(type, str) and isinstance(data, str)):
        raise TypeError("an event is a type and data")
    return StreamEvent(EventId(attempt, number), type, data)


def _parse_stored(rows: Any) -> Iterator[StreamEvent]:
    for entry, fields in rows:
        try:
            yield StreamEvent(_parse_id(entry), fields[b"type"].decode(), fields[b"data"].decode())
        except (LookupError, ValueError):
            # Another program may have written it; subscribers get a gap, if there is one.
            logger.warning("Invalid entry on the stream of a run ignored")


def _parse_id(entry: bytes) -> EventId:
    attempt, _, number = entry.partition(b"-")
    return EventId(int(attempt), int(number))
