"""Log lines of events that may happen ten thousand times a second."""

import threading
import time
from collections.abc import Callable
from typing import Any

SECONDS = 10.0


class RateLimitedLog:
    """Logs the first event of each kind, then one line in `SECONDS` with the number of those that were
    not logged."""

    def __init__(self, log: Callable[..., Any]) -> None:
        self._log = log
        self._lock = threading.Lock()
        self._next: dict[str, float] = {}
        self._unlogged: dict[str, int] = {}

    def __call__(self, event: str, kind: str = "", **fields: Any) -> None:
        """Log an event. `kind`: one of a few, to separate events with the same text."""
        key = f"{event}\0{kind}"
        with self._lock:
            now = time.monotonic()
            if now < self._next.get(key, 0.0):
                self._unlogged[key] = self._unlogged.get(key, 0) + 1
                return
            self._next[key] = now + SECONDS
            unlogged = self._unlogged.pop(key, 0)
        if unlogged:
            fields["unlogged"] = unlogged
        self._log(event, **fields)
