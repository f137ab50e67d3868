"""Publish the progress of runs (worker side).

A web process announces the runs that it has subscribers of. Until then a run only buffers its events;
from then on they go to a Redis stream of the run, which late and returning subscribers read, and to
the one channel of all web processes. While Redis is unavailable the events stay in the buffer, and no
run waits for it.

Measured for an answer of 300 tokens in 5 s: a run without subscribers uses no Redis command, one with
a subscriber 400 (280 where 20 runs publish at once) and 13 to 89 ms of CPU time instead of 7 to 18.

The id of an event is `<attempt>-<n>`; n counts from 1 in each attempt, so that a reader notices a gap,
and Redis rejects the events of a worker that has lost the run to a later attempt.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import orjson
from django.conf import settings
from redis import Redis
from redis.client import PubSub
from redis.exceptions import RedisError

from agents.events import stream
from lib import process
from lib.redis import Breaker, brief, client

logger = logging.getLogger(__name__)

# Tokens within one tick are published together, the first one at once. The tick grows with the number
# of publishing runs: the cost of a batch does not depend on its length.
TICK_SECONDS = 0.04
TICK_SECONDS_EACH = 0.001
MAX_TICK_SECONDS = 0.2
# Web processes repeat their announcements before workers forget them.
ANNOUNCE_SECONDS = 20.0
ANNOUNCED_SECONDS = 60.0
PUBLISH_SECONDS = 0.5
KEPT_EVENTS = 10_000
KEPT_SECONDS = 3600
# Of one attempt. Later events are published and not stored: a late subscriber gets a gap, and the
# answer when the run ends.
KEPT_BYTES = 1024 * 1024


def control_channel() -> str:
    """Return the channel that every worker subscribes to."""
    return f"{settings.REDIS_STREAM_KEY}:live:called"


def stream_key(run_id: str) -> str:
    return f"{settings.REDIS_STREAM_KEY}:live:{run_id}"


@process.once
def _publish_client() -> Redis:
    """Return a client that retries on a dead connection: ids make that harmless."""
    return client(timeout=PUBLISH_SECONDS, connect_timeout=stream.REQUEST_SECONDS, retries=1)


def stop(run_id: str) -> None:
    """Make the worker of a run stop it now; otherwise its next heartbeat does."""
    stream.publish_volatile(control_channel(), orjson.dumps({"stop": run_id}))


@dataclass
class Text:
    """Tokens that are published together."""

    step: int
    pieces: list[str] = field(default_factory=list)


# Number, type, and data as JSON.
NumberedEvent = tuple[int, str, str]


class RunFeed:
    """The events of one attempt: filled by the run's thread, published once there is a subscriber."""

    def __init__(
        self, publisher: "Publisher", run_id: str, attempt: int, stop: Callable[[], None]
    ) -> None:
        self.run_id = run_id
        self.attempt = attempt
        self.stop = stop
        self.has_subscribers = False
        self._publisher = publisher
        self._lock = threading.Lock()
        self._buffer: list[Text | tuple[str, dict[str, Any]]] = []
        self._sending: list[NumberedEvent] = []
        self._number = 0
        self.sent_bytes = 0
        self._step = 0
        self._has_text = False
        self.publish("run.status", {"status": "processing", "attempt": attempt})

    def publish(self, type: str, data: dict[str, Any]) -> None:
        with self._lock:
            self._buffer.append((type, data))
        if self.has_subscribers:
            self._publisher.schedule(self, urgent=True)

    def text(self, piece: str) -> None:
        with self._lock:
            last = self._buffer[-1] if self._buffer else None
            if isinstance(last, Text):
                last.pieces.append(piece)
                return  # its first piece has been scheduled
            self._buffer.append(Text(self._step, [piece]))
        if self.has_subscribers:
            self._publisher.schedule(self, urgent=not self._has_text)
        self._has_text = True

    def step_started(self, kind: str, name: str) -> None:
        self._step += 1
        self.publish("step.started", {"step": self._step, "kind": kind, "name": name})

    def step_finished(self, **data: Any) -> None:
        self.publish("step.finished", {"step": self._step, **data})

    def start(self) -> None:
        """Publish from now to the end of the attempt."""
        if not self.has_subscribers:
            self.has_subscribers = True
            self._publisher.schedule(self, urgent=True)

    def finish(self) -> None:
        """Publish the rest now, before the outcome."""
        if self.has_subscribers:
            self._publisher.flush(self)

    def pending(self) -> list[NumberedEvent]:
        """Return the events to send: new ones, and those not yet `acknowledge`d."""
        with self._lock:
            buffer, self._buffer = self._buffer, []
        for event in buffer:
            if isinstance(event, Text):
                text = "".join(event.pieces)
                event = ("message.delta", {"step": event.step, "text": text})
            self._number += 1
            self._sending.append((self._number, event[0], orjson.dumps(event[1]).decode()))
        return self._sending

    def acknowledge(self) -> None:
        self.sent_bytes += sum(len(data) for _, _, data in self._sending)
        self._sending = []


class Publisher:
    """The feeds of this process, and the runs that have subscribers."""

    def __init__(self) -> None:
        self._feeds: dict[str, RunFeed] = {}
        self._announced: dict[str, float] = {}
        self._scheduled: dict[RunFeed, None] = {}
        self._urgent: dict[RunFeed, None] = {}
        self._changed = threading.Condition()
        self._sending = threading.Lock()
        self._thread: threading.Thread | None = None
        self._breaker = Breaker(stream.BREAK_SECONDS)
        self._pubsub: PubSub | None = None

    @contextmanager
    def feed(self, run_id: str, attempt: int, *, stop: Callable[[], None]) -> Iterator[RunFeed]:
        """Open the feed of an attempt. `stop` is called when the run is to be stopped."""
        feed = RunFeed(self, run_id, attempt, stop)
        self._feeds[run_id] = feed
        if self._announced.get(run_id, 0) > time.monotonic():
            feed.start()
        try:
            yield feed
        finally:
            feed.finish()
            if self._feeds.get(run_id) is feed:
                del self._feeds[run_id]

    def flush(self, feed: RunFeed) -> None:
        with self._changed:
            self._scheduled.pop(feed, None)
            self._urgent.pop(feed, None)
        self._send([feed])

    def schedule(self, feed: RunFeed, *, urgent: bool = False) -> None:
        with self._changed:
            if urgent:
                self._urgent[feed] = None
            self._scheduled[feed] = None
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="live", daemon=True)
                self._thread.start()
            self._changed.notify()

    def _run(self) -> None:
        due = 0.0
        while True:
            with self._changed:
                while not (self._urgent or (self._scheduled and time.monotonic() >= due)):
                    self._changed.wait(due - time.monotonic() if self._scheduled else None)
                if time.monotonic() >= due:
                    feeds, self._scheduled = list(self._scheduled), {}
                    due = time.monotonic() + tick_seconds(len(feeds))
                else:
                    feeds = list(self._urgent)
                    for feed in feeds:
                        self._scheduled.pop(feed, None)
                self._urgent.clear()
            if not self._send(feeds):
                with self._changed:
                    self._scheduled |= dict.fromkeys(
                        feed for feed in feeds if feed.run_id in self._feeds
                    )
                    due = time.monotonic() + 0.5

    def _send(self, feeds: list[RunFeed]) -> bool:
        """Publish the pending events of these feeds in one batch; return False to have it retried."""
        with self._sending:
            if self._breaker.open():
                return False
            try:
                self._send_batch([(feed, feed.pending()) for feed in feeds])
            except RedisError as error:
                self._breaker.trip()
                logger.warning("Run progress not published (%s), retrying", brief(error))
                return False
            for feed in feeds:
                feed.acknowledge()
            return True

    def _send_batch(self, batch: list[tuple[RunFeed, list[NumberedEvent]]]) -> None:
        progress = []
        with _publish_client().pipeline(transaction=False) as pipe:
            for feed, events in batch:
                if not events:
                    continue
                key, size = stream_key(feed.run_id), feed.sent_bytes
                for number, kind, data in events:
                    entry = f"{feed.attempt}-{number}"
                    fields = ("type", kind, "data", data)
                    size += len(data)
                    if size > KEPT_BYTES:
                        break
                    pipe.execute_command("XADD", key, "MAXLEN", "~", KEPT_EVENTS, entry, *fields)
                pipe.expire(key, KEPT_SECONDS)
                progress.append([feed.run_id, feed.attempt, events])
            if progress:
                pipe.publish(stream.live_channel(), orjson.dumps({"progress": progress}))
                # Redis rejects an id that it has, and one of an attempt before the latest.
                pipe.execute(raise_on_error=False)

    def listen(self) -> None:
        """Handle the messages of web processes; return after at most a second. Raises `RedisError`."""
        try:
            if self._pubsub is None:
                self._pubsub = _control_client().pubsub(ignore_subscribe_messages=True)
                self._pubsub.subscribe(control_channel())
                # Have web processes announce their subscribers now, not at the next interval.
                _control_client().publish(stream.live_channel(), b'{"announce":true}')
            message = self._pubsub.get_message(timeout=stream.BLOCK_SECONDS)
            if message:
                self.handle(orjson.loads(message["data"]))
        except RedisError:
            pubsub, self._pubsub = self._pubsub, None
            if pubsub:
                pubsub.close()
            raise
        except (orjson.JSONDecodeError, TypeError, AttributeError):
            logger.warning("Invalid message on %s ignored", control_channel())

    def handle(self, message: dict[str, Any]) -> None:
        if feed := self._feeds.get(message.get("stop") or ""):
            feed.stop()
        now = time.monotonic()
        for run_id in message.get("subscribed") or ():
            self._announced[run_id] = now + ANNOUNCED_SECONDS
            if feed := self._feeds.get(run_id):
                feed.start()
        if len(self._announced) > 1000:
            self._announced = {run: until for run, until in self._announced.items() if until > now}


def tick_seconds(feeds: int) -> float:
    """Return the time between two batches of so many feeds."""
    return min(max(TICK_SECONDS, feeds * TICK_SECONDS_EACH), MAX_TICK_SECONDS)


@process.once
def _control_client() -> Redis:
    return client(timeout=stream.BLOCK_SECONDS + 4, connect_timeout=2)


@process.once
def current() -> Publisher:
    """Return the publisher of this process."""
    return Publisher()
