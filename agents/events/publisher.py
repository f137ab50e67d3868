"""What a run tells while it goes on, to whoever listens: the worker's side.

A web process calls for the runs that it has listeners of. Until somebody does, a run only keeps what
it would tell; from then on all of it goes to a Redis stream of the run, from which a listener that
comes late or comes back reads, and to the one channel that every web process hears. Redis may be
away or forget: what it did not take is told when it is back, and no run waits for it.

The id of an event is `<attempt>-<n>`; n counts from 1 in each attempt, so a reader knows what it
missed, and Redis itself refuses what a worker tells that has lost the run to a later attempt.
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

# Tokens that come faster than this are told together. The first one is told at once. Where many runs
# tell at the same time each waits longer: what is told costs the same however long it is.
TICK_SECONDS = 0.04
TICK_SECONDS_EACH = 0.001
MOST_TICK_SECONDS = 0.2
# A web process calls again sooner than a worker forgets.
CALL_SECONDS = 20.0
CALLED_SECONDS = 60.0
TELL_SECONDS = 0.5
KEPT_EVENTS = 10_000
KEPT_SECONDS = 3600
# Of one attempt. What comes after is told to those who listen, and kept for nobody: who comes later is
# told of the gap, and has the answer when the run ends.
KEPT_BYTES = 1024 * 1024


def called_channel() -> str:
    """Heard by every worker."""
    return f"{settings.REDIS_STREAM_KEY}:live:called"


def stream_of(run_id: str) -> str:
    return f"{settings.REDIS_STREAM_KEY}:live:{run_id}"


@process.once
def _teller() -> Redis:
    """Tells again by itself where a connection turns out to be dead: ids make that harmless."""
    return client(timeout=TELL_SECONDS, connect_timeout=stream.REQUEST_SECONDS, retries=1)


def stop(run_id: str) -> None:
    """Tell the worker that has the run to give it up now; its heartbeat would tell it too, later."""
    stream.publish_volatile(called_channel(), orjson.dumps({"stop": run_id}))


@dataclass
class Text:
    """Tokens that are told together."""

    step: int
    pieces: list[str] = field(default_factory=list)


# Number, type, and data as JSON.
Told = tuple[int, str, str]


class Feed:
    """What one attempt has to tell. Its run's thread fills it; it goes out when somebody listens."""

    def __init__(self, desk: "Desk", run_id: str, attempt: int, stop: Callable[[], None]) -> None:
        self.run_id = run_id
        self.attempt = attempt
        self.stop = stop
        self.called = False
        self._desk = desk
        self._lock = threading.Lock()
        self._untold: list[Text | tuple[str, dict[str, Any]]] = []
        self._sending: list[Told] = []
        self._told = 0
        self.told_bytes = 0
        self._step = 0
        self._speaks = False
        self.tell("run.status", {"status": "processing", "attempt": attempt})

    def tell(self, type: str, data: dict[str, Any]) -> None:
        with self._lock:
            self._untold.append((type, data))
        if self.called:
            self._desk.has_news(self, urgent=True)

    def text(self, piece: str) -> None:
        with self._lock:
            last = self._untold[-1] if self._untold else None
            if isinstance(last, Text):
                last.pieces.append(piece)
                return  # its first piece is news already
            self._untold.append(Text(self._step, [piece]))
        if self.called:
            self._desk.has_news(self, urgent=not self._speaks)
        self._speaks = True

    def step_started(self, kind: str, name: str) -> None:
        self._step += 1
        self.tell("step.started", {"step": self._step, "kind": kind, "name": name})

    def step_finished(self, **data: Any) -> None:
        self.tell("step.finished", {"step": self._step, **data})

    def call(self) -> None:
        """Somebody listens, from now to the end of the attempt."""
        if not self.called:
            self.called = True
            self._desk.has_news(self, urgent=True)

    def finish(self) -> None:
        """Send the rest now: an outcome that is told after this comes after it."""
        if self.called:
            self._desk.flush(self)

    def take(self) -> list[Told]:
        """What is to be sent: what was taken before and not `taken_in`, and what is new."""
        with self._lock:
            untold, self._untold = self._untold, []
        for event in untold:
            if isinstance(event, Text):
                text = "".join(event.pieces)
                event = ("message.delta", {"step": event.step, "text": text})
            self._told += 1
            self._sending.append((self._told, event[0], orjson.dumps(event[1]).decode()))
        return self._sending

    def taken_in(self) -> None:
        self.told_bytes += sum(len(data) for _, _, data in self._sending)
        self._sending = []


class Desk:
    """The feeds of this process, and who is called for."""

    def __init__(self) -> None:
        self._feeds: dict[str, Feed] = {}
        self._calls: dict[str, float] = {}
        self._news: dict[Feed, None] = {}
        self._urgent: dict[Feed, None] = {}
        self._changed = threading.Condition()
        self._sending = threading.Lock()
        self._thread: threading.Thread | None = None
        self._breaker = Breaker(stream.BREAK_SECONDS)
        self._pubsub: PubSub | None = None

    @contextmanager
    def feed(self, run_id: str, attempt: int, *, stop: Callable[[], None]) -> Iterator[Feed]:
        """What the attempt tells meanwhile. `stop` is called when it is to be given up."""
        feed = Feed(self, run_id, attempt, stop)
        self._feeds[run_id] = feed
        if self._calls.get(run_id, 0) > time.monotonic():
            feed.call()
        try:
            yield feed
        finally:
            feed.finish()
            if self._feeds.get(run_id) is feed:
                del self._feeds[run_id]

    def flush(self, feed: Feed) -> None:
        with self._changed:
            self._news.pop(feed, None)
            self._urgent.pop(feed, None)
        self._send([feed])

    def has_news(self, feed: Feed, *, urgent: bool = False) -> None:
        with self._changed:
            if urgent:
                self._urgent[feed] = None
            self._news[feed] = None
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="live", daemon=True)
                self._thread.start()
            self._changed.notify()

    def _run(self) -> None:
        due = 0.0
        while True:
            with self._changed:
                while not (self._urgent or (self._news and time.monotonic() >= due)):
                    self._changed.wait(due - time.monotonic() if self._news else None)
                if time.monotonic() >= due:
                    feeds, self._news = list(self._news), {}
                    due = time.monotonic() + tick_seconds(len(feeds))
                else:
                    feeds = list(self._urgent)
                    for feed in feeds:
                        self._news.pop(feed, None)
                self._urgent.clear()
            if not self._send(feeds):
                with self._changed:
                    self._news |= dict.fromkeys(
                        feed for feed in feeds if feed.run_id in self._feeds
                    )
                    due = time.monotonic() + 0.5

    def _send(self, feeds: list[Feed]) -> bool:
        """Tell what these feeds have to tell, in one go. False when it is to be tried again."""
        with self._sending:
            if self._breaker.open():
                return False
            try:
                self._pipe([(feed, feed.take()) for feed in feeds])
            except RedisError as error:
                self._breaker.trip()
                logger.warning("Redis takes no tokens now (%s)", brief(error))
                return False
            for feed in feeds:
                feed.taken_in()
            return True

    def _pipe(self, news: list[tuple[Feed, list[Told]]]) -> None:
        told = []
        with _teller().pipeline(transaction=False) as pipe:
            for feed, events in news:
                if not events:
                    continue
                key, size = stream_of(feed.run_id), feed.told_bytes
                for number, kind, data in events:
                    entry = f"{feed.attempt}-{number}"
                    fields = ("type", kind, "data", data)
                    size += len(data)
                    if size > KEPT_BYTES:
                        break
                    pipe.execute_command("XADD", key, "MAXLEN", "~", KEPT_EVENTS, entry, *fields)
                pipe.expire(key, KEPT_SECONDS)
                told.append([feed.run_id, feed.attempt, events])
            if told:
                pipe.publish(stream.live_channel(), orjson.dumps({"told": told}))
                # Redis refuses an id that it has, or that a later attempt has overtaken.
                pipe.execute(raise_on_error=False)

    def hear(self) -> None:
        """Heed what web processes call for; returns after a second at the most. Raises `RedisError`."""
        try:
            if self._pubsub is None:
                self._pubsub = _hearer().pubsub(ignore_subscribe_messages=True)
                self._pubsub.subscribe(called_channel())
                # Who has listeners calls at once, not when the time has come again.
                _hearer().publish(stream.live_channel(), b'{"who":true}')
            message = self._pubsub.get_message(timeout=stream.BLOCK_SECONDS)
            if message:
                self.heed(orjson.loads(message["data"]))
        except RedisError:
            pubsub, self._pubsub = self._pubsub, None
            if pubsub:
                pubsub.close()
            raise
        except (orjson.JSONDecodeError, TypeError, AttributeError):
            logger.warning("A call that makes no sense was heard on %s", called_channel())

    def heed(self, call: dict[str, Any]) -> None:
        if feed := self._feeds.get(call.get("stop") or ""):
            feed.stop()
        now = time.monotonic()
        for run_id in call.get("called") or ():
            self._calls[run_id] = now + CALLED_SECONDS
            if feed := self._feeds.get(run_id):
                feed.call()
        if len(self._calls) > 1000:
            self._calls = {run: until for run, until in self._calls.items() if until > now}


def tick_seconds(feeds: int) -> float:
    """How long so many feeds keep what comes from now on."""
    return min(max(TICK_SECONDS, feeds * TICK_SECONDS_EACH), MOST_TICK_SECONDS)


@process.once
def _hearer() -> Redis:
    return client(timeout=stream.BLOCK_SECONDS + 4, connect_timeout=2)


@process.once
def desk() -> Desk:
    return Desk()
