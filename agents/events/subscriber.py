"""What runs tell, for those who listen in this process: the web server's side of
agents.events.publisher.

One task for the process hears the one channel that all runs tell on and hands out what somebody here
waits for. Who begins, comes back or has fallen behind reads the run's stream in Redis from where it
stands. An idle listener costs its memory: no thread, no connection, no query.
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

# More than this is not kept for a slow listener; it reads on from Redis.
MOST_WAITING = 500
BATCH = 1000
MAX_PAUSE_SECONDS = 5.0
LINGER_SECONDS = 30.0


class Place(NamedTuple):
    """The id of an event: which attempt tells it, and its number there."""

    attempt: int
    number: int

    def __str__(self) -> str:
        return f"{self.attempt}-{self.number}"


class Told(NamedTuple):
    place: Place
    type: str
    data: str  # JSON


class Gap(NamedTuple):
    """Events that are nowhere to be had any more, both ends included."""

    first: Place
    last: Place


class Listener:
    """One listener of a run, standing at `place`: the last event that it knows."""

    def __init__(self, hub: "Hub", run_id: str, place: Place) -> None:
        self.run_id = run_id
        self.place = place
        # The run has ended, as far as anybody has told; its outcome is in the database.
        self.ended = False
        # All that it told before it ended has been taken.
        self.up_to_date = False
        self._hub = hub
        self._behind = True
        self._roused = False
        self._waiting: deque[Told] = deque()
        self._news = asyncio.Event()

    async def take(self, seconds: float) -> list[Told | Gap]:
        """What is new, in order; nothing after `seconds` without news, when roused, or once the run
        has ended."""
        until = asyncio.get_running_loop().time() + seconds
        while not (found := await self._next()) and not self.ended:
            if self._roused:
                self._roused = False
                return []
            # Around nothing but this: redis-py swallows a cancellation now and then.
            try:
                async with asyncio.timeout_at(until):
                    await self._news.wait()
            except TimeoutError:
                return []
        return found

    async def _next(self) -> list[Told | Gap]:
        self._news.clear()
        ended, behind = self.ended, self._behind
        read: list[Told] = []
        if behind or not self._follows(self._waiting):
            # Set before, as it may fall behind while it reads; true unless reading goes well.
            self._behind, behind = False, True
            try:
                read = await self._hub.read(self.run_id, self.place)
                behind = len(read) == BATCH
            except RedisError:
                # It may be there yet. What Redis does not have is said when Redis says so: it wakes
                # all listeners when it is back.
                self.up_to_date = ended
                return []
            finally:
                self._behind = self._behind or behind
        found = read if self._behind else sorted({*read, *self._waiting})
        self._waiting.clear()
        self.up_to_date = ended and not self._behind
        return list(self._in_order(found))

    def _follows(self, found: Iterable[Told]) -> bool:
        return not any(isinstance(each, Gap) for each in self._in_order(found, move=False))

    def _in_order(self, found: Iterable[Told], *, move: bool = True) -> Iterator[Told | Gap]:
        place = self.place
        for told in found:
            if told.place <= place:
                continue
            attempt, number = told.place
            expected = place.number + 1 if attempt == place.attempt else 1
            if number > expected:
                yield Gap(Place(attempt, expected), Place(attempt, number - 1))
            place = told.place
            if move:
                self.place = place
            yield told

    def hear(self, news: Iterable[Told]) -> None:
        self._waiting.extend(news)
        if len(self._waiting) > MOST_WAITING:
            self.fall_behind()
        self._news.set()

    def fall_behind(self) -> None:
        self._waiting.clear()
        self._behind = True
        self._news.set()

    def end(self) -> None:
        self.ended = True
        self._news.set()

    def rouse(self) -> None:
        """Have `take` return, news or none."""
        self._roused = True
        self._news.set()


class Hub:
    """The listeners of one event loop."""

    def __init__(self, which_ended: Callable[[list[str]], Awaitable[Iterable[str]]]) -> None:
        """`which_ended` asks the database which of these runs have ended: for when Redis, which
        tells it otherwise, was away."""
        self._which_ended = which_ended
        # Called with what was heard of rights that were taken away; `None`: something may have been.
        self.revoked: Callable[[dict[str, Any] | None], None] = lambda news: None
        self._runs: dict[str, set[Listener]] = defaultdict(set)
        self._threads: dict[str, set[asyncio.Event]] = defaultdict(set)
        self._task: asyncio.Task[None] | None = None
        self._calls: set[asyncio.Task[None]] = set()
        self._left_at = 0.0
        self._failures = 0
        # A Redis that was restarted is found out by a connection that is dead. What goes over these
        # may go twice.
        self._redis = async_client(timeout=5, connect_timeout=2, retries=1)

    @contextmanager
    def run(self, run_id: str, place: Place) -> Iterator[Listener]:
        """Listen to a run, from after `place` on. Ask whether it has ended after entering: what was
        told before is not told again."""
        listener = Listener(self, run_id, place)
        with self._kept(self._runs, run_id, listener):
            self._call([run_id])
            yield listener

    @contextmanager
    def thread(self, thread_id: str) -> Iterator[asyncio.Event]:
        """An event that is set when a run of the thread was asked for or has ended."""
        news = asyncio.Event()
        with self._kept(self._threads, thread_id, news):
            yield news

    @contextmanager
    def _kept(self, table: dict[str, set[Any]], key: str, who: Any) -> Iterator[None]:
        table[key].add(who)
        if self._task is None:
            self._task = asyncio.create_task(self._listen())
        try:
            yield
        finally:
            table[key].discard(who)
            if not table[key]:
                del table[key]
            self._left_at = time.monotonic()

    async def close(self) -> None:
        """Let go of Redis."""
        tasks = [*self._calls, *([self._task] if self._task else [])]
        while left := [task for task in tasks if not task.done()]:
            for task in left:
                task.cancel()
            await asyncio.wait(left, timeout=0.2)
        await self._redis.connection_pool.disconnect()

    async def read(self, run_id: str, place: Place) -> list[Told]:
        """At most `BATCH` events of a run after `place`. Raises `RedisError`."""
        after = f"{place.attempt}-{place.number + 1}"
        found: Any = await self._redis.xrange(publisher.stream_of(run_id), after, "+", count=BATCH)
        return list(_usable(found))

    async def remembers(self, run_id: str) -> bool:
        """Whether Redis has anything of what a run told. Raises `RedisError`."""
        return bool(await self._redis.exists(publisher.stream_of(run_id)))

    def _call(self, run_ids: list[str]) -> None:
        """Have the workers tell of these runs."""
        task = asyncio.create_task(self._send_call(run_ids))
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    async def _send_call(self, run_ids: list[str]) -> None:
        with suppress(RedisError):  # called again when Redis is back
            for first in range(0, len(run_ids), 500):
                call = orjson.dumps({"called": run_ids[first : first + 500]})
                await self._redis.publish(publisher.called_channel(), call)

    def _wanted(self) -> bool:
        """A little longer than there are listeners: the next one may come soon."""
        return bool(
            self._runs or self._threads or time.monotonic() - self._left_at < LINGER_SECONDS
        )

    async def _listen(self) -> None:
        while self._wanted():
            try:
                if self._failures:
                    await self._look()
                await self._hear()
            except RedisError as error:
                if not self._failures:
                    logger.warning("Listeners hear nothing: Redis is away (%s)", error)
                self._failures += 1
            except Exception:
                # The database, or a defect: whoever listens must not be left alone for good.
                logger.exception("Listening broke; it begins anew")
                self._failures += 1
            if self._failures:
                longest = min(MAX_PAUSE_SECONDS, 0.25 * 2.0**self._failures)
                await asyncio.sleep(random.uniform(0.1, longest))  # noqa: S311
        self._task = None

    async def _hear(self) -> None:
        async with self._redis.pubsub() as pubsub:
            channels = {stream.live_channel(), revocations.channel()}
            await pubsub.subscribe(*channels)
            for _ in channels:
                while (await pubsub.get_message(timeout=5) or {}).get("type") != "subscribe":
                    pass
            if self._failures:
                logger.info("Listeners hear Redis again")
                self._failures = 0
            # From here on nothing is missed. What was told before is read, or asked for.
            for listener in self._all():
                listener.fall_behind()
            self._call(list(self._runs))
            self.revoked(None)
            await self._look()
            called = time.monotonic()
            while self._wanted():
                message = await pubsub.get_message(timeout=1)
                if message and message["type"] == "message":
                    self._heed(message)
                if time.monotonic() - called > publisher.CALL_SECONDS:
                    self._call(list(self._runs))
                    called = time.monotonic()

    def _heed(self, message: dict[str, Any]) -> None:
        channel = message["channel"].decode()
        try:
            news = orjson.loads(message["data"])
            if channel == revocations.channel():
                self.revoked(dict(news))
            else:
                self._hand_out(news)
        except (TypeError, ValueError, AttributeError):
            logger.warning("News that make no sense were heard on %s", channel)

    def _hand_out(self, news: dict[str, Any]) -> None:
        for run_id, attempt, events in news.get("told", ()):
            if listeners := self._runs.get(run_id):
                told = [_told(attempt, *event) for event in events]
                for listener in listeners:
                    listener.hear(told)
        if event := news.get("event"):
            kind, run_id, thread_id = event
            if kind != "agent.run.requested":
                for listener in self._runs.get(run_id, ()):
                    listener.end()
            for thread in self._threads.get(thread_id, ()):
                thread.set()
        if news.get("who"):
            self._call(list(self._runs))

    async def _look(self) -> None:
        """Ask the database what Redis may not have told."""
        if self._runs:
            for run_id in await self._which_ended(list(self._runs)):
                for listener in self._runs.get(run_id, ()):
                    listener.end()
        for threads in self._threads.values():
            for news in threads:
                news.set()

    def _all(self) -> Iterator[Listener]:
        for listeners in self._runs.values():
            yield from listeners


_hubs: WeakKeyDictionary[asyncio.AbstractEventLoop, Hub] = WeakKeyDictionary()


def hub(which_ended: Callable[[list[str]], Awaitable[Iterable[str]]]) -> Hub:
    """That of the running event loop."""
    loop = asyncio.get_running_loop()
    if loop not in _hubs:
        _hubs[loop] = Hub(which_ended)
    return _hubs[loop]


def _told(attempt: Any, number: Any, type: Any, data: Any) -> Told:
    """Raises `TypeError` for what no worker tells."""
    if not (isinstance(attempt, int) and isinstance(number, int)):
        raise TypeError("a place is two numbers")
    if not (isinstance(type, str) and isinstance(data, str)):
        raise TypeError("an event is a type and data")
    return Told(Place(attempt, number), type, data)


def _usable(entries: Any) -> Iterator[Told]:
    for entry, fields in entries:
        try:
            yield Told(_place(entry), fields[b"type"].decode(), fields[b"data"].decode())
        except (LookupError, ValueError):
            # Any program may have written it; a listener is told of the gap, if there is one.
            logger.warning("An entry that makes no sense stands on the stream of a run")


def _place(entry: bytes) -> Place:
    attempt, _, number = entry.partition(b"-")
    return Place(int(attempt), int(number))
