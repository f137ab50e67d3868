"""The public event log: a Redis stream with one field, `event`, and one consumer group of workers.

Redis may lose all of it at any moment. The database holds the truth, and the relay adds missing events
again (agents.worker.maintenance).
"""

import logging
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import orjson
from django.conf import settings
from redis import Redis
from redis.exceptions import RedisError, ResponseError

from lib import process
from lib.redis import Breaker, brief, client

logger = logging.getLogger(__name__)

BATCH = 200
# A blocked read has to end before the client's socket time-out does.
BLOCK_SECONDS = 1.0
GAUGE_SECONDS = 5.0
# Parts of REDIS_STREAM_MAX_BYTES: trimming starts above the first and stops at the second. Publishers
# stop at the whole, which is reached only if no worker reads.
TRIM_FROM, TRIM_TO = 0.8, 0.7
TRIM_BATCH = 50
TRIM_AT_ONCE_BYTES = 32 * 1024 * 1024
# The dead letters may take REDIS_STREAM_MAX_BYTES divided by this.
DEAD_PART = 8
BREAK_SECONDS = 3.0
# The longest that a request, or a step of a run, waits for Redis.
REQUEST_SECONDS = 0.3
LEADER_MS = 4000
MAX_MESSAGE_BYTES = 64 * 1024


@dataclass(frozen=True)
class Entry:
    """An entry of the stream, not yet parsed."""

    id: str
    raw: bytes | None


_breaker = process.shared(Breaker(BREAK_SECONDS))


class FillGauge:
    """A check of the stream against REDIS_STREAM_MAX_BYTES, repeated every few seconds."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._stale_at = 0.0
        self._is_full = False

    def is_full(self, redis: Redis) -> bool:
        """Return the latest reading. Raises `RedisError`."""
        limit = settings.REDIS_STREAM_MAX_BYTES
        now = time.monotonic()
        if limit and now >= self._stale_at:
            self._stale_at = now + GAUGE_SECONDS
            used = redis.memory_usage(settings.REDIS_STREAM_KEY, samples=0) or 0
            self._is_full = used >= limit
            if self._is_full:
                logger.warning(
                    "Stream full, events are held back: %d unread bytes. The relay adds them later",
                    used,
                )
        return bool(limit) and self._is_full


_gauge = process.shared(FillGauge())


@process.once
def _publisher() -> Redis:
    """Return the client for requests: it gives up soon, and never repeats a command, which might add an
    entry twice."""
    return client(timeout=REQUEST_SECONDS, max_connections=1000)


@process.once
def consumer() -> Redis:
    """Return the client for a worker's loops, which may wait."""
    return client(timeout=BLOCK_SECONDS + 4, connect_timeout=2)


@process.once
def probe_client() -> Redis:
    """Return the client for checks and figures: it gives up after a second."""
    return client(timeout=1)


def check_writable() -> None:
    """Write a key that expires at once. Raises `RedisError` if Redis is unreachable, full, a replica or
    unable to save."""
    probe_client().set(f"{settings.REDIS_STREAM_KEY}:probe", b"", px=1)


@dataclass(frozen=True)
class GroupStats:
    """The progress of a consumer group."""

    name: str
    unread_seconds: float  # the age of its first unread entry
    unread: int | None  # entries; None before Redis 7
    pending: int  # read, and not acknowledged


@dataclass(frozen=True)
class StreamStats:
    length: int
    dead: int
    queued: int  # tasks in Celery's queue
    groups: list[GroupStats]


def stats() -> StreamStats:
    """Return the sizes of the stream and of Celery's queue. Raises `RedisError`."""
    redis, key = probe_client(), settings.REDIS_STREAM_KEY
    return StreamStats(
        length=int(redis.xlen(key)),
        dead=int(redis.xlen(f"{key}:dead")),
        queued=int(redis.llen(settings.CELERY_TASK_DEFAULT_QUEUE)),
        groups=[_group_stats(redis, info) for info in _groups(redis)],
    )


def _groups(redis: Redis) -> list[dict[str, Any]]:
    try:
        return list(redis.xinfo_groups(settings.REDIS_STREAM_KEY))
    except ResponseError:  # there is no stream
        return []


def _group_stats(redis: Redis, info: dict[str, Any]) -> GroupStats:
    delivered = info["last-delivered-id"].decode()
    first = redis.xrange(settings.REDIS_STREAM_KEY, min=f"({delivered}", count=1)
    age = time.time() - _numbers(cast("bytes", first[0][0]))[0] / 1000 if first else 0.0
    return GroupStats(
        name=info["name"].decode(),
        unread_seconds=max(0.0, age),
        unread=info.get("lag"),
        pending=int(info["pending"]),
    )


def publish(events: Iterable[dict[str, Any]]) -> bool:
    """Add events to the stream and publish them to the web processes. Return False if Redis did not
    take them; the relay adds them later."""
    if _breaker.open():
        return False
    redis = _publisher()
    try:
        is_full = _gauge.is_full(redis)
        for event in events:
            run_id, thread_id = event["payload"]["runId"], event["payload"]["threadId"]
            notice = orjson.dumps({"event": [event["type"], run_id, thread_id]})
            with redis.pipeline(transaction=False) as pipe:
                if not is_full:
                    pipe.xadd(settings.REDIS_STREAM_KEY, {"event": orjson.dumps(event)})
                pipe.publish(live_channel(), notice)
                pipe.execute()
    except RedisError as error:
        _breaker.trip()
        logger.warning("Event not published (%s); the relay adds it later", brief(error))
        return False
    return not is_full


def live_channel() -> str:
    """Return the channel that every web process subscribes to: events, and the progress of runs."""
    return f"{settings.REDIS_STREAM_KEY}:live"


def publish_volatile(channel: str, message: bytes) -> None:
    """Publish to the present subscribers. While Redis is unavailable the message is lost."""
    if _breaker.open():
        return
    try:
        _publisher().publish(channel, message)
    except RedisError as error:
        _breaker.trip()
        logger.info("Redis unavailable (%s), message lost on %s", type(error).__name__, channel)


def increment(key: str, numbers: Mapping[str, int]) -> bool:
    """Add to the numbers of a hash. Return False if Redis may not have taken them."""
    if _breaker.open():
        return False
    try:
        with _publisher().pipeline(transaction=True) as pipe:
            for name, number in numbers.items():
                pipe.hincrby(key, name, number)
            pipe.execute()
    except RedisError as error:
        _breaker.trip()
        logger.info("Redis unavailable (%s), %s is incremented later", type(error).__name__, key)
        return False
    return True


def ensure_group() -> None:
    """Create the consumer group if it is missing, from the first entry on: entries added since a wipe
    are for the workers too."""
    try:
        consumer().xgroup_create(
            settings.REDIS_STREAM_KEY, settings.REDIS_CONSUMER_GROUP, id="0", mkstream=True
        )
    except ResponseError as error:
        if "BUSYGROUP" not in str(error):
            raise


def read(name: str, *, seconds: float = BLOCK_SECONDS) -> list[Entry]:
    """Return new entries for the consumer `name`, waiting up to `seconds` (at most 1). Raises
    `RedisError`."""
    try:
        response = consumer().xreadgroup(
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
        logger.info("Creating the workers' consumer group, which Redis does not have")
        ensure_group()
        return []
    return [entry for _, entries in _pairs(response) for entry in _entries(entries)]


def claim_stale(name: str, *, idle: timedelta) -> list[Entry]:
    """Claim the entries that another consumer read and has not acknowledged for `idle`. Raises
    `RedisError`."""
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
        claimed = _entries(redis.xrange(key, entry_id, entry_id))
        # It was trimmed or deleted; Redis before version 7 keeps it pending for ever.
        if not claimed:
            redis.xack(key, settings.REDIS_CONSUMER_GROUP, entry_id)
        entries += claimed
    return entries


def acknowledge(entries: Iterable[Entry]) -> None:
    if ids := [entry.id for entry in entries]:
        consumer().xack(settings.REDIS_STREAM_KEY, settings.REDIS_CONSUMER_GROUP, *ids)


def subscribe(group: str, name: str) -> list[Entry]:
    """Return new entries for a `group` beside the workers', after at most a second. A new group starts
    at the end of the stream. Entries need no acknowledgement: such a group reads from the database
    what it missed. Raises `RedisError`."""
    key = settings.REDIS_STREAM_KEY
    try:
        response = consumer().xreadgroup(
            group, name, {key: ">"}, count=BATCH, block=int(BLOCK_SECONDS * 1000), noack=True
        )
    except ResponseError as error:
        if "NOGROUP" not in str(error) and "UNBLOCKED" not in str(error):
            raise
        with suppress(ResponseError):  # another process has created it
            consumer().xgroup_create(key, group, id="$", mkstream=True)
        return []
    return [entry for _, entries in _pairs(response) for entry in _entries(entries)]


def unsubscribe(group: str) -> None:
    """Drop the group, for which trimming would wait. Raises `RedisError`."""
    with suppress(ResponseError):  # there is no stream
        consumer().xgroup_destroy(settings.REDIS_STREAM_KEY, group)


def dead_letter(entry: Entry, reason: str) -> None:
    """Copy an entry that cannot be used to `<key>:dead`. Acknowledge it afterwards: a crash in between
    duplicates it instead of losing it."""
    logger.warning("Stream entry %s is unusable: %s", entry.id, reason)
    consumer().xadd(
        _dead_key(),
        {"id": entry.id, "event": entry.raw or b"", "reason": reason},
        maxlen=settings.REDIS_STREAM_DEAD_LENGTH or None,
        approximate=True,
    )


def dead_letter_message(raw: bytes, place: str, reason: str) -> None:
    """Copy an item of Celery's queue that is no message to `<key>:dead`, cut to the size of one. Raises
    `RedisError`."""
    logger.warning("Entry of %s is unusable: %s", place, reason)
    consumer().xadd(
        _dead_key(),
        {"event": raw[:MAX_MESSAGE_BYTES], "reason": f"{place}: {reason}", "queue": place},
        maxlen=settings.REDIS_STREAM_DEAD_LENGTH or None,
        approximate=True,
    )


@dataclass(frozen=True)
class DeadLetter:
    """An entry that could not be used, and the reason. The id holds the time."""

    id: str
    entry: Entry
    reason: str

    @property
    def at(self) -> datetime:
        return datetime.fromtimestamp(int(self.id.partition("-")[0]) / 1000, tz=UTC)


def list_dead_letters(*, before: str = "", count: int = 50) -> list[DeadLetter]:
    """Return dead letters, newest first. Raises `RedisError`."""
    newest = f"({before}" if before else "+"
    rows: Any = consumer().xrevrange(_dead_key(), newest, "-", count=count)
    return [_dead_letter(entry_id, fields) for entry_id, fields in rows or []]


def count_dead_letters() -> int:
    """Return their number. Raises `RedisError`."""
    return int(consumer().xlen(_dead_key()))


def requeue_dead_letter(dead_id: str) -> bool:
    """Move a dead letter back to the stream, or to the queue that it came from, in one transaction.
    Return False if it is gone. Raises `RedisError`."""

    def move(pipe: Any) -> Any:
        rows = pipe.xrange(_dead_key(), dead_id, dead_id)
        pipe.multi()
        if rows:
            fields = rows[0][1]
            pipe.xdel(_dead_key(), dead_id)
            if b"queue" not in fields:
                pipe.xadd(settings.REDIS_STREAM_KEY, {"event": fields.get(b"event", b"")})
            elif fields[b"queue"].decode(errors="replace") == settings.CELERY_TASK_DEFAULT_QUEUE:
                pipe.lpush(settings.CELERY_TASK_DEFAULT_QUEUE, fields.get(b"event", b""))
        return bool(rows)

    redis: Any = consumer()  # its types know no `value_from_callable`
    # It is repeated if the dead letters change meanwhile.
    return bool(redis.transaction(move, _dead_key(), value_from_callable=True))


def discard_dead_letter(dead_id: str) -> bool:
    """Delete a dead letter; return False if it is gone. Raises `RedisError`."""
    return bool(consumer().xdel(_dead_key(), dead_id))


def _dead_key() -> str:
    return f"{settings.REDIS_STREAM_KEY}:dead"


def _dead_letter(entry_id: bytes, fields: dict[bytes, bytes]) -> DeadLetter:
    original_id = fields.get(b"id", b"").decode(errors="replace")
    reason = fields.get(b"reason", b"").decode(errors="replace")
    return DeadLetter(entry_id.decode(), Entry(original_id, fields.get(b"event")), reason)


def dead_letters() -> int | None:
    """Return the number of dead letters; None while Redis is unavailable."""
    if _breaker.open():
        return None
    try:
        return int(_publisher().xlen(_dead_key()))
    except RedisError:
        _breaker.trip()
        return None


def caught_up() -> bool:
    """Return whether the workers have read every entry."""
    stream, group = _info()
    return group is None or group["last-delivered-id"] == stream.get("last-generated-id")


def forget_consumers(*, idle: timedelta) -> None:
    """Drop consumers that have been idle for long and have nothing pending."""
    for info in consumer().xinfo_consumers(
        settings.REDIS_STREAM_KEY, settings.REDIS_CONSUMER_GROUP
    ):
        if not info["pending"] and info["idle"] > idle.total_seconds() * 1000:
            consumer().xgroup_delconsumer(
                settings.REDIS_STREAM_KEY, settings.REDIS_CONSUMER_GROUP, info["name"]
            )


def acquire_leadership(name: str) -> bool:
    """Make `name` the worker that does the maintenance for the next seconds, or prolong that. Return
    False if another worker leads. Raises `RedisError`."""
    key = f"{settings.REDIS_STREAM_KEY}:keeper"
    if consumer().set(key, name, nx=True, px=LEADER_MS):
        return True
    if consumer().get(key) != name.encode():
        return False
    return bool(consumer().pexpire(key, LEADER_MS))


def resign(name: str) -> None:
    """Give up leadership, so that another worker can take it at once. Raises `RedisError`."""
    key = f"{settings.REDIS_STREAM_KEY}:keeper"
    if consumer().get(key) == name.encode():
        consumer().delete(key)


def trim() -> None:
    """Drop entries older than the retention, except those that a group has yet to read or acknowledge:
    Redis itself would drop them silently. A group that lags seven times as long counts as abandoned;
    it must not fill the memory."""
    redis, key = consumer(), settings.REDIS_STREAM_KEY
    now, retention = int(time.time() * 1000), settings.REDIS_STREAM_RETENTION_HOURS * 3600 * 1000
    needed = [(now - retention, 0)]
    for group in redis.xinfo_groups(key):
        needed.append(_numbers(group["last-delivered-id"]))
        pending = redis.xpending(key, group["name"])
        if pending["min"]:
            needed.append(_numbers(pending["min"]))
    oldest = max(min(needed), (now - 7 * retention, 0))
    redis.xtrim(key, minid=f"{oldest[0]}-{oldest[1]}", approximate=True)


def trim_bytes() -> int:
    """Drop the oldest entries of a stream that is near REDIS_STREAM_MAX_BYTES; return their number.

    Entries that the workers have yet to read or acknowledge stay, as only Redis has the requests of
    other programs. Any other group loses its unread entries.
    """
    limit = settings.REDIS_STREAM_MAX_BYTES
    if not limit:
        return 0
    # All of the dead letters may go.
    dropped = _shrink(_dead_key(), limit // DEAD_PART, before=(2**63, 0))
    groups = consumer().xinfo_groups(settings.REDIS_STREAM_KEY)
    for group in groups:
        if group["name"] == settings.REDIS_CONSUMER_GROUP.encode():
            dropped += _shrink(settings.REDIS_STREAM_KEY, limit, before=_needed_from(group))
    if dropped:
        logger.info("Dropped %d entries: the stream had grown too large", dropped)
    return dropped


def _needed_from(group: dict[str, Any]) -> tuple[int, int]:
    """Return the oldest entry that a group still needs."""
    pending = consumer().xpending(settings.REDIS_STREAM_KEY, group["name"])
    return _numbers(pending["min"] or group["last-delivered-id"])


def _shrink(key: str, limit: int, *, before: tuple[int, int]) -> int:
    redis = consumer()
    used = int(redis.memory_usage(key, samples=0) or 0)
    if used <= TRIM_FROM * limit:
        return 0
    to_free = min(used - int(TRIM_TO * limit), TRIM_AT_ONCE_BYTES)
    dropped = 0
    while to_free > 0:
        rows: Any = redis.xrange(key, count=TRIM_BATCH)
        old = [(entry_id, fields) for entry_id, fields in rows if _numbers(entry_id) < before]
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
    name = settings.REDIS_CONSUMER_GROUP.encode()
    groups = consumer().xinfo_groups(settings.REDIS_STREAM_KEY)
    return stream, next((group for group in groups if group["name"] == name), None)


def _pairs(response: Any) -> list[tuple[bytes, list[Any]]]:
    """Return the keys and their entries of a list, as RESP2 has them, or of a mapping, as in RESP3."""
    if isinstance(response, dict):
        return [(key, entries[0] if entries else []) for key, entries in response.items()]
    return list(response or [])


def _entries(rows: Any) -> list[Entry]:
    return [
        Entry(entry_id.decode(), (fields or {}).get(b"event")) for entry_id, fields in rows or []
    ]
