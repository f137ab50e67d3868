"""How many runs of one asker may be worked on at once: in each worker a share of its slots, so that
somebody else's question finds one free."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from django.conf import settings
from django.db.models import Count, Sum

from agents.models import Run, Worker
from lib import process
from lib.cache import TimedCache
from lib.limiter import Limiter, LimitReached

SLOTS_SECONDS = 5.0
# Set while runs may be waiting in the database that could not be handed over when they were due.
left = threading.Event()
process.on_reset(left.clear)


def of(slots: int) -> int:
    """The share of one asker."""
    return max(1, slots * settings.AGENT_USER_SHARE // 100)


class Seats:
    """Who has how many of the slots of this process."""

    def __init__(self) -> None:
        self._limiter = Limiter()
        self.slots = 0  # 0: as the settings say

    @contextmanager
    def one(self, asker: str) -> Iterator[bool]:
        """Whether the asker may have one meanwhile."""
        share = of(self.slots or settings.CELERY_WORKER_CONCURRENCY)
        try:
            self._limiter.acquire(asker, limit=share)
            is_free = True
        except LimitReached:
            is_free = False
        try:
            yield is_free
        finally:
            if is_free:
                self._limiter.release(asker)


seats = Seats()


def _count_slots() -> int:
    slots = Worker.objects.reading().aggregate(slots=Sum("concurrency"))["slots"]
    return slots or settings.CELERY_WORKER_CONCURRENCY


# Of all workers together.
slots = process.shared(TimedCache(_count_slots, SLOTS_SECONDS))


def taken() -> dict[str, int]:
    """How many of all slots each asker has."""
    in_hand = Run.objects.unfinished().filter(status=Run.Status.PROCESSING)
    return dict(in_hand.order_by().values_list("asker").annotate(count=Count("pk")))
