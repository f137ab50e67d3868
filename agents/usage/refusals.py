"""How many questions were refused because a limit was reached: by every process, counted in Redis.

What Redis does not take is kept here and goes with the next; a process that ends before takes it along.
A Redis that is wiped begins anew at zero, as counters may.
"""

import threading
from collections import Counter

from django.conf import settings

from agents.events import stream
from lib import process

# As `agents.usage.limits.Reached` has them.
CODES = ("rate_limited", "too_many_waiting", "bytes_exhausted", "budget_exhausted")

_lock = threading.Lock()
_untold: Counter[str] = Counter()
process.on_reset(_untold.clear)


def count(source: str, code: str) -> None:
    """Count one more; after the transaction that found it out, as it talks to Redis."""
    with _lock:
        _untold[f"{source}:{code}"] += 1
        told = dict(_untold)
        _untold.clear()
    if not stream.increment(_key(), told):
        with _lock:
            _untold.update(told)


def counted() -> dict[tuple[str, str], int]:
    """By source and code, those that Redis knows. Raises `RedisError`."""
    found: dict[bytes, bytes] = stream.probe_client().hgetall(_key())  # type: ignore[assignment]
    return {_names(field): int(number) for field, number in found.items()}


def _names(field: bytes) -> tuple[str, str]:
    source, _, code = field.decode().partition(":")
    return source, code


def _key() -> str:
    return f"{settings.REDIS_STREAM_KEY}:refusals"
