"""How often an address may try what is no secret to try: counted in Redis, by all web processes
together.

While Redis is away each process counts by itself. To refuse everybody then would keep out whoever's
token has run out, through an outage that all the rest of the server gets over; and a flood is bounded
still, by as many times the limit as there are processes.
"""

import functools
import ipaddress
import threading
import time
from collections import Counter

from django.conf import settings
from redis import Redis
from redis.exceptions import RedisError
from rest_framework.request import Request
from rest_framework.throttling import BaseThrottle
from rest_framework.views import APIView

from console.audit import client_ip
from lib.redis import client

WINDOW_SECONDS = 60
REDIS_SECONDS = 0.3


class ServerSessions(BaseThrottle):
    """`SERVER_SESSIONS_PER_MINUTE`: each try costs the homeserver a request."""

    def allow_request(self, request: Request, view: APIView) -> bool:
        most: int = settings.SERVER_SESSIONS_PER_MINUTE
        return not most or tries(f"server-session:{network(client_ip(request))}") <= most

    def wait(self) -> int:
        return seconds_left()


def seconds_left() -> int:
    """Until tries are counted anew."""
    return WINDOW_SECONDS - int(time.time()) % WINDOW_SECONDS


def network(address: str | None) -> str:
    """Whose an address is: with IPv6 one has a whole /64 of them."""
    if address is None:
        return "unknown"
    found = ipaddress.ip_address(address)
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    if found.ipv4_mapped:
        return str(found.ipv4_mapped)
    return str(ipaddress.ip_network((found, 64), strict=False))


def tries(name: str) -> int:
    """Count one more; how many there have been in this minute."""
    minute = int(time.time()) // WINDOW_SECONDS
    try:
        return _count(f"{settings.REDIS_STREAM_KEY}:tries:{name}:{minute}")
    except RedisError:
        return _alone.count(name, minute)


def _count(key: str) -> int:
    with redis().pipeline(transaction=True) as both:
        both.incr(key)
        both.expire(key, 2 * WINDOW_SECONDS)
        return int(both.execute()[0])


@functools.cache
def redis() -> Redis:
    """Gives up soon, and never counts twice by repeating a command."""
    return client(timeout=REDIS_SECONDS)


class Alone:
    """What this process has counted in this minute."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.forget()

    def forget(self) -> None:
        self._minute = 0
        self._tries: Counter[str] = Counter()

    def count(self, name: str, minute: int) -> int:
        with self._lock:
            if minute != self._minute:
                self._minute, self._tries = minute, Counter()
            self._tries[name] += 1
            return self._tries[name]


_alone = Alone()
