"""The public event log: a Redis stream with one field, `event`, and one consumer group of workers.

Redis may forget all of it at any moment. Whatever matters is in the database, and what is missing
here is added again (agents.worker.bootstep).
"""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import orjson
from django.conf import settings
from redis import Redis
from redis.client import PubSub
from redis.exceptions import RedisError, ResponseError

from lib import process
from lib.redis import Breaker, brief, client

logger = logging.getLogger(__name__)

BATCH = 200
# A blocked read has to end before the client's socket time-out does.
BLOCK_SECONDS = 1.0
LOOK_SECONDS = 1.0
GAUGE_SECONDS = 5.0
# Of REDIS_STREAM_MAX_BYTES: where the keeper begins to trim, and what it leaves. The publishers stop at
# all of it, which they only come to where no worker reads.
TRIM_FROM, TRIM_TO = 0.8, 0.7
TRIM_BATCH = 50
TRIM_AT_ONCE_BYTES = 32 * 1024 * 1024
# The dead letters may have this part of it.
DEAD_PART = 8
BREAK_SECONDS = 3.0
# What a request, or a step of a run, waits for Redis at the most.
REQUEST_SECONDS = 0.3
KEEPER_MS = 4000
MOST_OF_MESSAGE = 64 * 1024


@dataclass(frozen=True)
class Entry:
    """What stands on the stream under `id`, as it was read."""

    id: str
    raw: bytes | None


_breaker = process.shared(Breaker(BREAK_SECONDS))


class Gauge:
    """Whether the stream has reached REDIS_STREAM_MAX_BYTES, looked at now and then."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._look_at = 0.0
        self._is_full = False

    def is_full(self, redis: Redis) -> bool:
        """Raises `RedisError`."""
        most = settings.REDIS_STREAM_MAX_BYTES
        now = time.monotonic()
        if most and now >= self._look_at:
            self._look_at = now + GAUGE_SECONDS
            used = redis.memory_usage(settings.REDIS_STREAM_KEY, samples=0) or 0
            self._is_full = used >= most
            if self._is_full:
                logger.warning(
                    "The stream takes no events: it has %d bytes that the workers have not read. "
                    "The relay will add them later",
                    used,
                )
        return bool(most) and self._is_full


_gauge = process.shared(Gauge())


@process.once
def _publisher() -> Redis:
    """For use within a request: gives up soon, and never repeats a command by itself, which might add
    an entry twice."""
    return client(timeout=REQUEST_SECONDS, max_connections=1000)


@process.once
def consumer() -> Redis:
    """For the loops of a worker, which may wait."""
    return client(timeout=BLOCK_SECONDS + 4, connect_timeout=2)


@process.once
def observer() -> Redis:
    """For who only looks: gives up after a second."""
    return client(timeout=1)


def try_write() -> None:
    """Write what is gone again at once. Raises `RedisError` where Redis is away or takes nothing, being
    full, a replica or unable to save."""
    observer().set(f"{settings.REDIS_STREAM_KEY}:probe", b"", px=1)


@dataclass(frozen=True)
class Group:
    """How far a group has come."""

    name: str
    unread_seconds: float  # how old the first entry is that it has yet to read
    unread: int | None  # how many there are; Redis tells since version 7
    pending: int  # read, and not acknowledged


@dataclass(frozen=True)
class Figures:
    length: int
    dead: int
    handed: int  # tasks in Celery's queue
    groups: list[Group]


def figures() -> Figures:
    """How the stream and the queue stand. Raises `RedisError`."""
    redis, key = observer(), settings.REDIS_STREAM_KEY
    return Figures(
        length=int(redis.xlen(key)),
        dead=int(redis.xlen(f"{key}:dead")),
        handed=int(redis.llen(settings.CELERY_TASK_DEFAULT_QUEUE)),
        groups=[_group(redis, info) for info in _groups(redis)],
    )


def _groups(redis: Redis) -> list[dict[str, Any]]:
    try:
        return list(redis.xinfo_groups(settings.REDIS_STREAM_KEY))
    except ResponseError:  # there is no stream
        return []


def _group(redis: Redis, info: dict[str, Any]) -> Group:
    delivered = info["last-delivered-id"].decode()
    first = redis.xrange(settings.REDIS_STREAM_KEY, min=f"({delivered}", count=1)
    age = time.time() - _numbers(cast("bytes", first[0][0]))[0] / 1000 if first else 0.0
    return Group(
        name=info["name"].decode(),
        unread_seconds=max(0.0, age),
        unread=info.get("lag"),
        pending=int(info["pending"]),
    )


def publish(events: Iterable[dict[str, Any]]) -> bool:
    """Add events to the stream and wake who waits for an outcome. False when Redis did not take
    them, which is logged and no more: the relay adds them later."""
    if _breaker.open():
        return False
    redis = _publisher()
    try:
        is_full = _gauge.is_full(redis)
        for event in events:
            run_id, thread_id = event["payload"]["runId"], event["payload"]["threadId"]
            news = orjson.dumps({"event": [event["type"], run_id, thread_id]})
            with redis.pipeline(transaction=False) as pipe:
                if not is_full:
                    pipe.xadd(settings.REDIS_STREAM_KEY, {"event": orjson.dumps(event)})
                pipe.publish(live_channel(), news)
                if event["type"] != "agent.run.requested":
                    pipe.publish(_outcome_channel(run_id), b"")
                pipe.execute()
    except RedisError as error:
        _breaker.trip()
        logger.warning("Redis took no event (%s); the relay will add it later", brief(error))
        return False
    return not is_full


def live_channel() -> str:
    """Heard by every web process: that there is an event, and what runs tell while they go on."""
    return f"{settings.REDIS_STREAM_KEY}:live"


def shout(channel: str, message: bytes) -> None:
    """Tell whoever hears it just now. Where Redis is away nobody does, which is no error."""
    if _breaker.open():
        return
    try:
        _publisher().publish(channel, message)
    except RedisError as error:
        _breaker.trip()
        logger.info("Redis is away (%s): nobody hears on %s", type(error).__name__, channel)


def add_up(key: str, numbers: Mapping[str, int]) -> bool:
    """Add to the numbers of a hash. False when Redis did not take them, as far as is known."""
    if _breaker.open():
        return False
    try:
        with _publisher().pipeline(transaction=True) as pipe:
            for name, number in numbers.items():
                pipe.hincrby(key, name, number)
            pipe.execute()
    except RedisError as error:
        _breaker.trip()
        logger.info("Redis is away (%s): %s is added up later", type(error).__name__, key)
        return False
    return True


def _outcome_channel(run_id: str) -> str:
    return f"{settings.REDIS_STREAM_KEY}:outcome:{run_id}"


class OutcomeWaiter:
    def __init__(self, pubsub: PubSub | None) -> None:
        self._pubsub = pubsub

    def wait(self, until: float) -> bool:
        """Return when the outcome may be there: it is told, or a second has passed, for Redis may have
        been away when it was told. False at `until` (of `time.monotonic()`), and at once where Redis
        was away from the beginning."""
        look_at = min(until, time.monotonic() + LOOK_SECONDS)
        if self._pubsub is None or time.monotonic() >= until:
            return False
        try:
            while (left := look_at - time.monotonic()) > 0:
                if self._pubsub.get_message(ignore_subscribe_messages=True, timeout=left):
                    break
        except RedisError:
            time.sleep(max(0.0, look_at - time.monotonic()))
        return True


@contextmanager
def outcome_of(run_id: str) -> Iterator[OutcomeWaiter]:
    """Listen for the outcome of a run. Look at the run after entering and before waiting: what was
    told earlier is not told again."""
    if _breaker.open():
        yield OutcomeWaiter(None)
        return
    with _publisher().pubsub() as pubsub:
        try:
            pubsub.subscribe(_outcome_channel(run_id))
            # The server's confirmation: from here on nothing is missed.
            pubsub.get_message(timeout=0.3)
        except RedisError:
            _breaker.trip()
            yield OutcomeWaiter(None)
            return
        yield OutcomeWaiter(pubsub)


def ensure_group() -> None:
    """Create the consumer group where it is missing, from the first entry on: what is already there
    after a wipe was meant for the workers too."""
    try:
        consumer().xgroup_create(
            settings.REDIS_STREAM_KEY, settings.REDIS_CONSUMER_GROUP, id="0", mkstream=True
        )
    except ResponseError as error:
        if "BUSYGROUP" not in str(error):
            raise


def read(name: str, *, seconds: float = BLOCK_SECONDS) -> list[Entry]:
    """New entries for the consumer `name`, after so many seconds, one at the most. Raises
    `RedisError`."""
    try:
        found = consumer().xreadgroup(
            settings.REDIS_CONSUMER_GROUP,
            name,
            {settings.REDIS_STREAM_KEY: ">"},
            count=BATCH,
            block=int(seconds * 1000),
        )
    except ResponseError as error:
        # The stream or its group is gone: Redis was wiped.
        if "NOGROUP" not in str(error) and "UNBLOCKED" not in str(error):
            raise
        logger.info("Redis has no consumer group for the workers; making it")
        ensure_group()
        return []
    return [entry for _, entries in _pairs(found) for entry in _entries(entries)]


def claim_stale(name: str, *, idle: timedelta) -> list[Entry]:
    """Entries that another consumer took and has not acknowledged for `idle`. Raises `RedisError`."""
    redis, key = consumer(), settings.REDIS_STREAM_KEY
    ids = redis.xautoclaim(
        key,
        settings.REDIS_CONSUMER_GROUP,
        name,
        min_idle_time=int(idle.total_seconds() * 1000),
        count=BATCH,
        justid=True,
    )
    entries = []
    for entry_id in cast("list[bytes]", ids):
        found = _entries(redis.xrange(key, entry_id, entry_id))
        # Somebody has trimmed or deleted it; before version 7, Redis keeps it pending for ever.
        if not found:
            redis.xack(key, settings.REDIS_CONSUMER_GROUP, entry_id)
        entries += found
    return entries


def acknowledge(entries: Iterable[Entry]) -> None:
    if ids := [entry.id for entry in entries]:
        consumer().xack(settings.REDIS_STREAM_KEY, settings.REDIS_CONSUMER_GROUP, *ids)


def follow(group: str, name: str) -> list[Entry]:
    """What is new for a `group` beside the workers', after a second at the most; from now on, where
    there is no such group yet. Nothing is to be acknowledged: whoever follows has the database for
    what it missed. Raises `RedisError`."""
    key = settings.REDIS_STREAM_KEY
    try:
        found = consumer().xreadgroup(
            group, name, {key: ">"}, count=BATCH, block=int(BLOCK_SECONDS * 1000), noack=True
        )
    except ResponseError as error:
        if "NOGROUP" not in str(error) and "UNBLOCKED" not in str(error):
            raise
        with suppress(ResponseError):  # it was made by another process meanwhile
            consumer().xgroup_create(key, group, id="$", mkstream=True)
        return []
    return [entry for _, entries in _pairs(found) for entry in _entries(entries)]


def unfollow(group: str) -> None:
    """Drop the group, which trimming would wait for. Raises `RedisError`."""
    with suppress(ResponseError):  # there is no stream
        consumer().xgroup_destroy(settings.REDIS_STREAM_KEY, group)


def bury(entry: Entry, reason: str) -> None:
    """Copy an entry that cannot be used to `<key>:dead`. Acknowledge it afterwards: dying in between
    leaves it there twice, not nowhere."""
    logger.warning("Stream entry %s is of no use: %s", entry.id, reason)
    consumer().xadd(
        _dead_key(),
        {"id": entry.id, "event": entry.raw or b"", "reason": reason},
        maxlen=settings.REDIS_STREAM_DEAD_LENGTH or None,
        approximate=True,
    )


def bury_message(raw: bytes, place: str, reason: str) -> None:
    """Keep with them what stood in Celery's queue or beside it and is no message: as much of it as a
    message may have. Raises `RedisError`."""
    logger.warning("An entry of %s is of no use: %s", place, reason)
    consumer().xadd(
        _dead_key(),
        {"event": raw[:MOST_OF_MESSAGE], "reason": f"{place}: {reason}", "queue": place},
        maxlen=settings.REDIS_STREAM_DEAD_LENGTH or None,
        approximate=True,
    )


@dataclass(frozen=True)
class Dead:
    """An entry that could not be used: the one it was, when it was set aside, and why."""

    id: str
    entry: Entry
    reason: str

    @property
    def at(self) -> datetime:
        return datetime.fromtimestamp(int(self.id.partition("-")[0]) / 1000, tz=UTC)


def dead(*, before: str = "", count: int = 50) -> list[Dead]:
    """What was set aside, newest first. Raises `RedisError`."""
    newest = f"({before}" if before else "+"
    found: Any = consumer().xrevrange(_dead_key(), newest, "-", count=count)
    return [_dead(entry_id, fields) for entry_id, fields in found or []]


def count_dead() -> int:
    """Raises `RedisError`."""
    return int(consumer().xlen(_dead_key()))


def revive(dead_id: str) -> bool:
    """Move an entry that was set aside back to the stream, or to the queue that it came from, in one
    step; False when it is not there any more. Raises `RedisError`."""

    def move(pipe: Any) -> Any:
        found = pipe.xrange(_dead_key(), dead_id, dead_id)
        pipe.multi()
        if found:
            fields = found[0][1]
            pipe.xdel(_dead_key(), dead_id)
            if b"queue" not in fields:
                pipe.xadd(settings.REDIS_STREAM_KEY, {"event": fields.get(b"event", b"")})
            elif fields[b"queue"].decode(errors="replace") == settings.CELERY_TASK_DEFAULT_QUEUE:
                pipe.lpush(settings.CELERY_TASK_DEFAULT_QUEUE, fields.get(b"event", b""))
        return bool(found)

    redis: Any = consumer()  # its types know no `value_from_callable`
    # Whatever happens to the dead letters meanwhile makes it look again.
    return bool(redis.transaction(move, _dead_key(), value_from_callable=True))


def discard(dead_id: str) -> bool:
    """Forget an entry that was set aside. Raises `RedisError`."""
    return bool(consumer().xdel(_dead_key(), dead_id))


def _dead_key() -> str:
    return f"{settings.REDIS_STREAM_KEY}:dead"


def _dead(entry_id: bytes, fields: dict[bytes, bytes]) -> Dead:
    was = fields.get(b"id", b"").decode(errors="replace")
    reason = fields.get(b"reason", b"").decode(errors="replace")
    return Dead(entry_id.decode(), Entry(was, fields.get(b"event")), reason)


def dead_letters() -> int | None:
    """How many entries were buried; None while Redis is away."""
    if _breaker.open():
        return None
    try:
        return int(_publisher().xlen(_dead_key()))
    except RedisError:
        _breaker.trip()
        return None


def caught_up() -> bool:
    """Whether the workers have been given all there is."""
    stream, group = _info()
    return group is None or group["last-delivered-id"] == stream.get("last-generated-id")


def forget_consumers(*, idle: timedelta) -> None:
    """Drop the names of workers that are gone for long and have nothing pending."""
    for info in consumer().xinfo_consumers(
        settings.REDIS_STREAM_KEY, settings.REDIS_CONSUMER_GROUP
    ):
        if not info["pending"] and info["idle"] > idle.total_seconds() * 1000:
            consumer().xgroup_delconsumer(
                settings.REDIS_STREAM_KEY, settings.REDIS_CONSUMER_GROUP, info["name"]
            )


def keep(name: str) -> bool:
    """Whether `name` is the one worker that looks after the stream, for the next seconds."""
    key = f"{settings.REDIS_STREAM_KEY}:keeper"
    if consumer().set(key, name, nx=True, px=KEEPER_MS):
        return True
    if consumer().get(key) != name.encode():
        return False
    return bool(consumer().pexpire(key, KEEPER_MS))


def stop_keeping(name: str) -> None:
    """Let another worker look after the stream at once. Raises `RedisError`."""
    key = f"{settings.REDIS_STREAM_KEY}:keeper"
    if consumer().get(key) == name.encode():
        consumer().delete(key)


def trim() -> None:
    """Drop what is older than the retention, but nothing that any group has yet to read or to
    acknowledge: Redis itself would drop that silently. A group that is seven times as far behind is
    taken for abandoned; it must not fill the memory."""
    redis, key = consumer(), settings.REDIS_STREAM_KEY
    now, retention = int(time.time() * 1000), settings.REDIS_STREAM_RETENTION_HOURS * 3600 * 1000
    keep = [(now - retention, 0)]
    for group in redis.xinfo_groups(key):
        keep.append(_numbers(group["last-delivered-id"]))
        pending = redis.xpending(key, group["name"])
        if pending["min"]:
            keep.append(_numbers(pending["min"]))
    oldest = max(min(keep), (now - 7 * retention, 0))
    redis.xtrim(key, minid=f"{oldest[0]}-{oldest[1]}", approximate=True)


def trim_bytes() -> int:
    """Drop the oldest entries of a stream that is near REDIS_STREAM_MAX_BYTES. How many.

    What the workers have yet to read or to acknowledge stays, as only Redis has the requests of other
    programs; any other group loses what it has not read.
    """
    most = settings.REDIS_STREAM_MAX_BYTES
    if not most:
        return 0
    # All of the dead letters may go.
    dropped = _shrink(_dead_key(), most // DEAD_PART, before=(2**63, 0))
    groups = consumer().xinfo_groups(settings.REDIS_STREAM_KEY)
    for group in groups:
        if group["name"] == settings.REDIS_CONSUMER_GROUP.encode():
            dropped += _shrink(settings.REDIS_STREAM_KEY, most, before=_needed_from(group))
    if dropped:
        logger.info("Dropped %d entries of the stream that had become too large", dropped)
    return dropped


def _needed_from(group: dict[str, Any]) -> tuple[int, int]:
    """Before which entry a group needs nothing any more."""
    pending = consumer().xpending(settings.REDIS_STREAM_KEY, group["name"])
    return _numbers(pending["min"] or group["last-delivered-id"])


def _shrink(key: str, most: int, *, before: tuple[int, int]) -> int:
    redis = consumer()
    used = int(redis.memory_usage(key, samples=0) or 0)
    if used <= TRIM_FROM * most:
        return 0
    to_free = min(used - int(TRIM_TO * most), TRIM_AT_ONCE_BYTES)
    dropped = 0
    while to_free > 0:
        found: Any = redis.xrange(key, count=TRIM_BATCH)
        old = [(entry_id, fields) for entry_id, fields in found if _numbers(entry_id) < before]
        last = None
        for entry_id, fields in old:
            if to_free <= 0:
                break
            to_free -= sum(map(len, fields.values()))
            last, dropped = entry_id, dropped + 1
        if last is None:
            break
        milliseconds, sequence = _numbers(last)
        redis.xtrim(key, minid=f"{milliseconds}-{sequence + 1}", approximate=False)
    return dropped


def _numbers(entry_id: bytes) -> tuple[int, int]:
    milliseconds, _, sequence = entry_id.partition(b"-")
    return int(milliseconds), int(sequence or 0)


def _info() -> tuple[dict[str, Any], dict[str, Any] | None]:
    stream = consumer().xinfo_stream(settings.REDIS_STREAM_KEY)
    wanted = settings.REDIS_CONSUMER_GROUP.encode()
    groups = consumer().xinfo_groups(settings.REDIS_STREAM_KEY)
    return stream, next((group for group in groups if group["name"] == wanted), None)


def _pairs(found: Any) -> list[tuple[bytes, list[Any]]]:
    """Redis answers with a list in RESP2 and a mapping in RESP3."""
    if isinstance(found, dict):
        return [(key, entries[0] if entries else []) for key, entries in found.items()]
    return list(found or [])


def _entries(found: Any) -> list[Entry]:
    return [
        Entry(entry_id.decode(), (fields or {}).get(b"event")) for entry_id, fields in found or []
    ]
