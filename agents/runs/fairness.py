"""Limit the concurrent runs of one user: to a share of the slots of each worker, so that another user's
message finds one free."""

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
# Set while the database may hold due runs that could not be dispatched.
backlog = threading.Event()
process.on_reset(backlog.clear)


def slots_per_user(slots: int) -> int:
    return max(1, slots * settings.AGENT_USER_SHARE // 100)


class SlotLimiter:
    """The slots of this process that each user occupies."""

    def __init__(self) -> None:
        self._limiter = Limiter()
        self.slots = 0  # 0: CELERY_WORKER_CONCURRENCY

    @contextmanager
    def acquire(self, user: str) -> Iterator[bool]:
        """Occupy a slot for the block; yield False if the user has none left."""
        limit = slots_per_user(self.slots or settings.CELERY_WORKER_CONCURRENCY)
        try:
            self._limiter.acquire(user, limit=limit)
            acquired = True
        except LimitReached:
            acquired = False
        try:
            yield acquired
        finally:
            if acquired:
                self._limiter.release(user)


slot_limiter = SlotLimiter()


def _count_slots() -> int:
    slots = Worker.objects.reading().aggregate(slots=Sum("concurrency"))["slots"]
    return slots or settings.CELERY_WORKER_CONCURRENCY


# Of all workers together.
total_slots = process.shared(TimedCache(_count_slots, SLOTS_SECONDS))


def slots_in_use() -> dict[str, int]:
    """Return the slots of all workers that each user occupies."""
    processing = Run.objects.unfinished().filter(status=Run.Status.PROCESSING)
    return dict(processing.order_by().values_list("requester").annotate(count=Count("pk")))
