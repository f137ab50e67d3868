"""Log lines of what may happen ten thousand times a second."""

import threading
import time
from collections.abc import Callable
from typing import Any

SECONDS = 10.0


class Seldom:
    """Logs the first event of each kind, and then one line in `SECONDS` with the number of those that
    had none."""

    def __init__(self, log: Callable[..., Any]) -> None:
        self._log = log
        self._lock = threading.Lock()
        self._next: dict[str, float] = {}
        self._without: dict[str, int] = {}

    def __call__(self, event: str, kind: str = "", **fields: Any) -> None:
        """`kind`: one of a few, where events of one text are of several kinds."""
        key = f"{event}\0{kind}"
        with self._lock:
            now = time.monotonic()
            if now < self._next.get(key, 0.0):
                self._without[key] = self._without.get(key, 0) + 1
                return
            self._next[key] = now + SECONDS
            without = self._without.pop(key, 0)
        if without:
            fields["unlogged"] = without
        self._log(event, **fields)
