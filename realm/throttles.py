"""Rate limits per client network, counted in Redis for all web processes together.

While Redis is unavailable each process counts for itself. To refuse all requests then would lock out
every user whose token has expired, during an outage that the rest of the server survives; and the load
is still bounded, by the limit times the number of processes.
"""

import threading
import time
from collections import Counter

from django.conf import settings
from redis import Redis
from redis.exceptions import RedisError
from rest_framework.request import Request
from rest_framework.throttling import BaseThrottle
from rest_framework.views import APIView

from lib import process
from lib.clients import client_ip, network
from lib.redis import client

WINDOW_SECONDS = 60
REDIS_SECONDS = 0.3


class ServerSessionThrottle(BaseThrottle):
    """`SERVER_SESSIONS_PER_MINUTE`: each attempt costs the homeserver a request."""

    def allow_request(self, request: Request, view: APIView) -> bool:
        limit: int = settings.SERVER_SESSIONS_PER_MINUTE
        return not limit or count_attempt(f"server-session:{network(client_ip(request))}") <= limit

    def wait(self) -> int:
        return seconds_until_reset()


def seconds_until_reset() -> int:
    return WINDOW_SECONDS - int(time.time()) % WINDOW_SECONDS


def count_attempt(name: str) -> int:
    """Count an attempt; return the number of those in this minute."""
    minute = int(time.time()) // WINDOW_SECONDS
    try:
        return _count(f"{settings.REDIS_STREAM_KEY}:tries:{name}:{minute}")
    except RedisError:
        return local_counter.count(name, minute)


def _count(key: str) -> int:
    with redis().pipeline(transaction=True) as pipeline:
        pipeline.incr(key)
        pipeline.expire(key, 2 * WINDOW_SECONDS)
        return int(pipeline.execute()[0])


@process.once
def redis() -> Redis:
    """Return a client that gives up soon, and never counts twice by repeating a command."""
    return client(timeout=REDIS_SECONDS)


class LocalCounter:
    """The attempts that this process has counted in this minute."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        self._minute = 0
        self._attempts: Counter[str] = Counter()

    def count(self, name: str, minute: int) -> int:
        with self._lock:
            if minute != self._minute:
                self._minute, self._attempts = minute, Counter()
            self._attempts[name] += 1
            return self._attempts[name]


local_counter = process.shared(LocalCounter())
