"""How many runs of one asker may be worked on at once: in each worker a share of its slots, so that
somebody else's question finds one free."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from django.conf import settings
from django.db.models import Count, Sum

from agents.models import Run, Worker

SLOTS_SECONDS = 5.0
# Set while runs may be waiting in the database that could not be handed over when they were due.
left = threading.Event()


def of(slots: int) -> int:
    """The share of one asker."""
    return max(1, slots * settings.AGENT_USER_SHARE // 100)


class Seats:
    """Who has how many of the slots of this process."""

    def __init__(self) -> None:
        self._taken: Counter[str] = Counter()
        self._lock = threading.Lock()
        self.slots = 0  # 0: as the settings say

    @contextmanager
    def one(self, asker: str) -> Iterator[bool]:
        """Whether the asker may have one meanwhile."""
        with self._lock:
            free = self._taken[asker] < of(self.slots or settings.CELERY_WORKER_CONCURRENCY)
            self._taken[asker] += free
        try:
            yield free
        finally:
            with self._lock:
                self._taken[asker] -= free
                if not self._taken[asker]:
                    del self._taken[asker]


seats = Seats()


class Slots:
    """How many there are in all, read again every few seconds."""

    def __init__(self) -> None:
        self._slots = 0
        self._stale_at = 0.0

    def count(self) -> int:
        if time.monotonic() >= self._stale_at:
            told = Worker.objects.reading().aggregate(slots=Sum("concurrency"))["slots"]
            self._slots = told or settings.CELERY_WORKER_CONCURRENCY
            self._stale_at = time.monotonic() + SLOTS_SECONDS
        return self._slots

    def forget(self) -> None:
        self._stale_at = 0.0


slots = Slots()


def taken() -> dict[str, int]:
    """How many of all slots each asker has."""
    in_hand = Run.objects.unfinished().filter(status=Run.Status.PROCESSING)
    return dict(in_hand.order_by().values_list("asker").annotate(count=Count("pk")))
