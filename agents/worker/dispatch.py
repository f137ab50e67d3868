"""Which runs the workers are told of, and when.

What is asked while there are free slots is handed to Celery at once. What comes when its queue is as
long as it should be waits in the database instead, and goes in turns: next is a run of whoever has the
fewest in hand. So a question waits for a short queue, and not for all that somebody else has asked
before. A look at a long queue takes a while, so it is not taken at every opportunity.
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

# The part of the time that a reader spends on looking for whose turn it is.
LOOKING = 0.25
# More are not looked at: those of each asker that come first.
CANDIDATES = 1000
MOST_AHEAD = 500
# In which runs of several threads are locked.
ORDER = ("thread", "position")


def hand_over(run_ids: Iterable[str]) -> None:
    """Tell the workers of runs. Raises `OperationalError` of kombu when the broker is away."""
    run_ids = list(run_ids)
    if not run_ids:
        return
    with current_app.producer_pool.acquire(block=True) as producer:
        for run_id in run_ids:
            tasks.execute.apply_async((run_id,), producer=producer, retry=False)


def queued() -> int:
    """Tasks in Celery's queue. Raises `RedisError`."""
    return int(stream.consumer().llen(settings.CELERY_TASK_DEFAULT_QUEUE))


def least() -> int:
    """How many tasks Celery's queue should have: a slot that becomes free shall find one."""
    return max(4, settings.CELERY_WORKER_CONCURRENCY)


def room() -> int:
    """How many runs it should have beside those that it has. Raises `RedisError`."""
    return max(0, least() - queued())


class Turns:
    """Hands runs over, each asker's in turn."""

    def __init__(self) -> None:
        self._look_at = 0.0
        # More than the least where so many go between two looks that the queue runs empty.
        self._ahead = 0
        self._found_enough = False

    def hand(self, run_ids: Collection[str]) -> None:
        """Hand over runs that are due, or leave them to their turn. Raises `RedisError`,
        `DatabaseError`, `OperationalError` of kombu."""
        if not run_ids and not fairness.left.is_set():
            return
        waiting = queued()
        if len(run_ids) <= least() - waiting and not fairness.left.is_set():
            hand_over(run_ids)
            return
        if run_ids:
            with transaction.atomic():
                asked = Run.objects.filter(pk__in=run_ids, status=Run.Status.QUEUED)
                db.in_order(asked, *ORDER).update(dispatched_at=None)
            fairness.left.set()
        ran_empty = self._found_enough and not waiting
        is_short = waiting <= max(least(), self._ahead) // 2
        if ran_empty or (is_short and time.monotonic() >= self._look_at):
            self._look(waiting, ran_empty=ran_empty)

    def _look(self, waiting: int, *, ran_empty: bool) -> None:
        if ran_empty:
            self._ahead = min(MOST_AHEAD, 2 * self._ahead)
        elif waiting > self._ahead // 4:
            self._ahead //= 2
        self._ahead = max(least(), self._ahead)
        free = self._ahead - waiting
        started = time.monotonic()
        self._found_enough = hand_over_fairly(Run.objects.undispatched(), free) == free
        now = time.monotonic()
        self._look_at = now + (now - started) / LOOKING


def hand_over_fairly(runs: RunQuerySet, free: int) -> int:
    """Hand over so many of these runs, those of askers with few in hand first. How many."""
    fairness.left.clear()
    number = Window(RowNumber(), partition_by=F("asker"), order_by=["due_at", "pk"])
    numbered = runs.annotate(number=number).order_by("number", "due_at")
    rows = list(numbered.values_list("pk", "asker", "number")[:CANDIDATES])
    if not rows:
        return 0
    taken, most = fairness.taken(), fairness.of(fairness.slots.get())
    bounded = settings.AGENT_USER_SHARE < 100
    ranked = [(taken.get(asker, 0) + number, pk) for pk, asker, number in rows]
    # What came first goes first where two have the same number in hand: sorting keeps the order.
    ranked.sort(key=lambda each: each[0])
    chosen = [pk for rank, pk in ranked if rank <= most or not bounded][:free]
    if len(chosen) < len(rows):
        fairness.left.set()
    _mark_and_hand_over(chosen)
    return len(chosen)


def _mark_and_hand_over(run_ids: list[str]) -> None:
    """The mark goes first: a claim that finds the asker's share taken unmarks its run."""
    if not run_ids:
        return
    marked = Run.objects.filter(pk__in=run_ids)
    with transaction.atomic():
        db.in_order(marked, *ORDER).update(dispatched_at=Now())
    try:
        hand_over(run_ids)
    except BrokerError:
        with transaction.atomic():
            queued = marked.filter(status=Run.Status.QUEUED)
            db.in_order(queued, *ORDER).update(dispatched_at=None)
        raise
