"""How many runs of one asker may be worked on at once: a share of all the workers' slots, so that
somebody else's question finds one free."""

import threading
import time

from django.conf import settings
from django.db.models import Count, Sum

from agents.models import Run, RunQuerySet, Worker

SLOTS_SECONDS = 5.0
# Set while runs may be waiting in the database that could not be handed over when they were due.
left = threading.Event()


class Slots:
    """How many there are, read again every few seconds."""

    def __init__(self) -> None:
        self._slots = 0
        self._stale_at = 0.0

    def count(self) -> int:
        if time.monotonic() >= self._stale_at:
            told = Worker.objects.reading().aggregate(slots=Sum("concurrency"))["slots"]
            self._slots = told or settings.CELERY_WORKER_CONCURRENCY
            self._stale_at = time.monotonic() + SLOTS_SECONDS
        return self._slots


slots = Slots()


def most() -> int:
    """Runs of one asker at once; 0: as many as there are slots."""
    if settings.AGENT_USER_SHARE >= 100:
        return 0
    return max(1, slots.count() * settings.AGENT_USER_SHARE // 100)


def in_hand() -> RunQuerySet:
    return Run.objects.unfinished().filter(status=Run.Status.PROCESSING)


def taken() -> dict[str, int]:
    """How many each asker has."""
    counts = in_hand().order_by().values_list("asker").annotate(count=Count("pk"))
    return dict(counts)
