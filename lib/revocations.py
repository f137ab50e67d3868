"""Notices of revoked rights, published on one Redis channel that every web process subscribes to.

A notice grants nothing and proves nothing: a process that receives it looks the rights up again. While
Redis is unavailable nothing is received; the periodic checks of `chat.api.stream_access` find the
revocation.
"""

import logging
from functools import partial

import orjson
from django.conf import settings
from django.db import transaction
from redis.exceptions import RedisError

from lib import process, redis

logger = logging.getLogger(__name__)

PUBLISH_SECONDS = 0.5
# A thousand deletions must not wait for a Redis that does not answer, each for itself.
_breaker = process.shared(redis.Breaker(5.0))


def channel() -> str:
    return f"{settings.REDIS_STREAM_KEY}:revoked"


def publish(*, user: int | None = None, thread: str | None = None) -> None:
    """Have the rights of a user, or to a thread, looked up again; those of all if neither is named."""
    if _breaker.open():
        return
    subject = {"user": user, "thread": thread}
    notice = orjson.dumps({name: value for name, value in subject.items() if value is not None})
    try:
        with redis.client(timeout=PUBLISH_SECONDS) as client:
            client.publish(channel(), notice)
    except RedisError as error:
        _breaker.trip()
        logger.info(
            "Redis is unavailable (%s): revocations are found by checks", type(error).__name__
        )


def publish_on_commit(*, user: int | None = None, thread: str | None = None) -> None:
    transaction.on_commit(partial(publish, user=user, thread=thread), robust=True)
