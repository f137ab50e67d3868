"""News that rights were taken away, published on one Redis channel that every web process hears.

The news carries no right and no proof: a process that hears it looks the rights up again. Where Redis
is away nobody hears, which the regular checks of `chat.rights` make good.
"""

import logging
import time
from functools import partial

import orjson
from django.conf import settings
from django.db import transaction
from redis.exceptions import RedisError

from lib import redis

logger = logging.getLogger(__name__)

PUBLISH_SECONDS = 0.5
# A Redis that did not answer is not asked for so long: a thousand deletions must not wait for it each.
REST_SECONDS = 5.0

_rest_until = 0.0


def channel() -> str:
    return f"{settings.REDIS_STREAM_KEY}:revoked"


def publish(*, user: int | None = None, thread: str | None = None) -> None:
    """Have the rights of a user, or to a thread, looked up again; of all where neither is named."""
    global _rest_until
    if time.monotonic() < _rest_until:
        return
    subject = {"user": user, "thread": thread}
    news = orjson.dumps({name: value for name, value in subject.items() if value is not None})
    try:
        with redis.client(timeout=PUBLISH_SECONDS) as client:
            client.publish(channel(), news)
    except RedisError as error:
        _rest_until = time.monotonic() + REST_SECONDS
        logger.info("Redis is away (%s): revocations are found by checks", type(error).__name__)


def publish_on_commit(*, user: int | None = None, thread: str | None = None) -> None:
    transaction.on_commit(partial(publish, user=user, thread=thread), robust=True)


def forget() -> None:
    """Ask Redis again at once."""
    global _rest_until
    _rest_until = 0.0
