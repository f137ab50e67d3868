"""Connections to Redis."""

from typing import Any

from django.conf import settings
from redis import Redis
from redis.backoff import NoBackoff
from redis.retry import Retry


def client(*, timeout: float, connect_timeout: float | None = None, **options: Any) -> Redis:
    """Return a client for REDIS_URL whose commands end after `timeout` seconds.

    It never repeats a command by itself, which might add an entry twice.
    """
    return Redis.from_url(
        settings.REDIS_URL,
        socket_timeout=timeout,
        socket_connect_timeout=timeout if connect_timeout is None else connect_timeout,
        retry=Retry(NoBackoff(), 0),
        **options,
    )
