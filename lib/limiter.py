"""Bounded counters of what a process does at once, by holder."""

import threading
from collections import Counter


class LimitReached(Exception):
    pass


class TotalReached(LimitReached):
    """All holders together have as many as are allowed."""


class HolderReached(LimitReached):
    """This holder has as many as one is allowed."""


class Limiter:
    """Counts what each holder has taken and not yet released."""

    def __init__(self) -> None:
        # Reentrant: the garbage collector, which may run at any point, releases too.
        self._lock = threading.RLock()
        self.taken: Counter[str] = Counter()

    def acquire(self, holder: str, *, limit: int | None = None, total: int | None = None) -> None:
        """Take one, of at most `limit` for the holder and `total` for all. Raises `LimitReached`."""
        with self._lock:
            if total is not None and self.taken.total() >= total:
                raise TotalReached
            if limit is not None and self.taken[holder] >= limit:
                raise HolderReached
            self.taken[holder] += 1

    def release(self, holder: str) -> None:
        with self._lock:
            self.taken[holder] -= 1
            if not self.taken[holder]:
                del self.taken[holder]
