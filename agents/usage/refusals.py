"""Count the messages refused because of a limit, by all processes together, in Redis.

Counts that Redis does not take go with the next refusal, or are lost if the process ends before. A
wiped Redis starts again at zero, as counters may.
"""

import threading
from collections import Counter

from django.conf import settings

from agents.events import stream
from lib import process

# As `agents.usage.limits.LimitExceeded` has them.
CODES = ("rate_limited", "too_many_waiting", "bytes_exhausted", "budget_exhausted")

_lock = threading.Lock()
_pending: Counter[str] = Counter()
process.on_reset(_pending.clear)


def count(source: str, code: str) -> None:
    """Count a refusal. Call it outside a transaction: it talks to Redis."""
    with _lock:
        _pending[f"{source}:{code}"] += 1
        counts = dict(_pending)
        _pending.clear()
    if not stream.increment(_key(), counts):
        with _lock:
            _pending.update(counts)


def counted() -> dict[tuple[str, str], int]:
    """Return the counts in Redis by source and code. Raises `RedisError`."""
    fields: dict[bytes, bytes] = stream.probe_client().hgetall(_key())  # type: ignore[assignment]
    return {_names(field): int(number) for field, number in fields.items()}


def _names(field: bytes) -> tuple[str, str]:
    source, _, code = field.decode().partition(":")
    return source, code


def _key() -> str:
    return f"{settings.REDIS_STREAM_KEY}:refusals"
