"""Dispatch queued runs to Celery, fairly between users.

While Celery's queue is short, a run is dispatched as soon as it is requested. Otherwise it waits in the
database, and the user with the fewest active runs is next: a message waits for a short
queue, not for all earlier messages of another user. Ranking a long backlog takes a while, so it takes a
bounded part of the time.
"""

import time
from collections.abc import Collection, Iterable

from celery import current_app
from django.conf import settings
from django.db import transaction
from django.db.models import F, Window
from django.db.models.functions import Now, RowNumber
from kombu.exceptions import OperationalError as BrokerError

from agents import tasks
from agents.events import stream
from agents.models import Run, RunQuerySet
from agents.runs import fairness
from lib import db

# The part of the time that a consumer spends on ranking the backlog.
RANKING_SHARE = 0.25
# The runs that are ranked: the first ones of each user.
CANDIDATES = 1000
MAX_AHEAD = 500
# The order in which runs of several threads are locked.
ORDER = ("thread", "position")


def enqueue(run_ids: Iterable[str]) -> None:
    """Send runs to Celery. Raises `OperationalError` of kombu if the broker is unavailable."""
    run_ids = list(run_ids)
    if not run_ids:
        return
    with current_app.producer_pool.acquire(block=True) as producer:
        for run_id in run_ids:
            tasks.execute.apply_async((run_id,), producer=producer, retry=False)


def queue_length() -> int:
    """Return the number of tasks in Celery's queue. Raises `RedisError`."""
    return int(stream.consumer().llen(settings.CELERY_TASK_DEFAULT_QUEUE))


def target_length() -> int:
    """Return the length that Celery's queue should have, so that a free slot finds a task."""
    return max(4, settings.CELERY_WORKER_CONCURRENCY)


def shortfall() -> int:
    """Return the number of tasks that Celery's queue lacks. Raises `RedisError`."""
    return max(0, target_length() - queue_length())


class Dispatcher:
    """Dispatches runs, in turn between users."""

    def __init__(self) -> None:
        self._rank_at = 0.0
        # Above the target where so many runs start between two rankings that the queue runs empty.
        self._ahead = 0
        self._filled = False

    def dispatch(self, run_ids: Collection[str]) -> None:
        """Dispatch due runs, or leave them in the backlog. Raises `RedisError`, `DatabaseError`,
        `OperationalError` of kombu."""
        if not run_ids and not fairness.backlog.is_set():
            return
        queued = queue_length()
        if len(run_ids) <= target_length() - queued and not fairness.backlog.is_set():
            enqueue(run_ids)
            return
        if run_ids:
            with transaction.atomic():
                requested = Run.objects.filter(pk__in=run_ids, status=Run.Status.QUEUED)
                db.in_order(requested, *ORDER).update(dispatched_at=None)
            fairness.backlog.set()
        ran_empty = self._filled and not queued
        is_short = queued <= max(target_length(), self._ahead) // 2
        if ran_empty or (is_short and time.monotonic() >= self._rank_at):
            self._dispatch_backlog(queued, ran_empty=ran_empty)

    def _dispatch_backlog(self, queued: int, *, ran_empty: bool) -> None:
        if ran_empty:
            self._ahead = min(MAX_AHEAD, 2 * self._ahead)
        elif queued > self._ahead // 4:
            self._ahead //= 2
        self._ahead = max(target_length(), self._ahead)
        free = self._ahead - queued
        started = time.monotonic()
        self._filled = dispatch_fairly(Run.objects.undispatched(), free) == free
        now = time.monotonic()
        self._rank_at = now + (now - started) / RANKING_SHARE


def dispatch_fairly(runs: RunQuerySet, free: int) -> int:
    """Dispatch up to `free` of these runs, users with few active runs first. Return their number."""
    fairness.backlog.clear()
    number = Window(RowNumber(), partition_by=F("requester"), order_by=["due_at", "pk"])
    numbered = runs.annotate(number=number).order_by("number", "due_at")
    rows = list(numbered.values_list("pk", "requester", "number")[:CANDIDATES])
    if not rows:
        return 0
    in_use = fairness.slots_in_use()
    limit = fairness.slots_per_user(fairness.total_slots.get())
    is_limited = settings.AGENT_USER_SHARE < 100
    ranked = [(in_use.get(user, 0) + number, pk) for pk, user, number in rows]
    # Sorting is stable: equal ranks keep the order in which they are due.
    ranked.sort(key=lambda each: each[0])
    chosen = [pk for rank, pk in ranked if rank <= limit or not is_limited][:free]
    if len(chosen) < len(rows):
        fairness.backlog.set()
    _mark_and_enqueue(chosen)
    return len(chosen)


def _mark_and_enqueue(run_ids: list[str]) -> None:
    """Mark runs before they are enqueued: a claim that finds its user at the limit removes the mark."""
    if not run_ids:
        return
    marked = Run.objects.filter(pk__in=run_ids)
    with transaction.atomic():
        db.in_order(marked, *ORDER).update(dispatched_at=Now())
    try:
        enqueue(run_ids)
    except BrokerError:
        with transaction.atomic():
            queued = marked.filter(status=Run.Status.QUEUED)
            db.in_order(queued, *ORDER).update(dispatched_at=None)
        raise
