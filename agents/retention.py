"""Deletion of old rows, by the settings RETENTION_*; 0 days keep them for good.

Old rows go in small batches, each a transaction of its own, with a pause between them that is as long
as the batch took: on SQLite there is one writer at a time. Rows that are needed stay: those of an
unfinished run, events that no worker has seen on the stream, rows that the rollups have not counted,
and idempotency keys, which never expire.

An app contributes by a `retention.py`, found automatically: `prune(may_continue)` deletes old rows
while `may_continue()` is true and returns their number by name; `due()` only counts them.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from importlib import import_module
from types import ModuleType
from typing import Any

from django.apps import apps
from django.conf import settings
from django.contrib.sessions.models import Session
from django.db import transaction
from django.db.models import Exists, OuterRef, QuerySet
from django.utils import timezone
from django.utils.module_loading import module_has_submodule

from agents.models import Attempt, Event, Run, Step, Summary
from agents.runs import actions
from agents.usage import rollups
from chat.models import Thread
from lib import db
from realm.models import User

BATCH = 500
# Each has messages and runs.
BATCH_OF_THREADS = 50

MayContinue = Callable[[], bool]


@dataclass(frozen=True)
class RetentionRule:
    """Rows that may be deleted once `age` is before `cutoff`. `order` is a column with an index, along
    which age falls: a walk along it may stop at the first young row, without an index on `age`."""

    name: str
    rows: QuerySet[Any]
    order: str
    age: str
    cutoff: datetime

    def count(self) -> int:
        return self.rows.filter(**{f"{self.age}__lt": self.cutoff}).count()

    def page(self, start: Any = None) -> QuerySet[Any, tuple[Any, Any, datetime]]:
        """Return the next rows from `start` on, old or not: key, place in the order, age."""
        rows = self.rows if start is None else self.rows.filter(**{f"{self.order}__gte": start})
        return rows.order_by(self.order).values_list("pk", self.order, self.age)[:BATCH]

    def batches(self) -> Iterator[list[Any]]:
        """Yield the keys of old rows; delete each batch before the next is read."""
        start = None
        while page := list(self.page(start)):
            if old := [key for key, _, age in page if age < self.cutoff]:
                yield old
            _, start, youngest = page[-1]
            if youngest >= self.cutoff or len(page) < BATCH:
                return


def rules() -> list[RetentionRule]:
    """Return the rules of the settings."""
    now = timezone.now()
    quiet_since = now - timedelta(days=settings.RETENTION_THREADS_DAYS)
    kinds = [
        # A step's and an attempt's key grows with time.
        ("steps", _of_finished_runs(Step), "pk", "created_at", settings.RETENTION_STEPS_DAYS),
        (
            "attempts",
            _of_finished_runs(Attempt).exclude(to_count=True),
            "pk",
            "ended_at",
            settings.RETENTION_ATTEMPTS_DAYS,
        ),
        (
            "events",
            _of_finished_runs(Event)
            .filter(published_at__isnull=False)
            .exclude(to_count=True)
            .exclude(to_deliver=True),
            "published_at",
            "published_at",
            settings.RETENTION_EVENTS_DAYS,
        ),
        (
            "threads",
            # Old threads in use stand between quiet ones.
            _quiet_threads(quiet_since),
            "created_at",
            "updated_at",
            settings.RETENTION_THREADS_DAYS,
        ),
    ]
    return [
        RetentionRule("sessions", Session.objects.all(), "expire_date", "expire_date", now),
        *(
            RetentionRule(name, rows, order, age, now - timedelta(days=days))
            for name, rows, order, age, days in kinds
            if days
        ),
    ]


def _of_finished_runs(model: type[Step] | type[Attempt] | type[Event]) -> QuerySet[Any]:
    # Not by a join, which SQLite would start at the runs, all of them.
    unfinished = Run.objects.unfinished().filter(pk=OuterRef("run"))
    return model._default_manager.filter(~Exists(unfinished))


def _quiet_threads(since: datetime) -> QuerySet[Thread]:
    """Return threads without new messages, unfinished runs, unpublished events or uncounted rows."""
    unfinished = Run.objects.unfinished().filter(thread=OuterRef("pk"))
    unpublished = Event.objects.unpublished().filter(run__thread=OuterRef("pk"))
    uncounted = [
        Attempt.objects.filter(to_count=True, run__thread=OuterRef("pk")),
        Event.objects.filter(to_count=True, run__thread=OuterRef("pk")),
        Summary.objects.filter(to_count=True, thread=OuterRef("pk")),
    ]
    undelivered = Event.objects.filter(to_deliver=True, run__thread=OuterRef("pk"))
    needed = [unfinished, unpublished, undelivered, *uncounted]
    return Thread.objects.filter(*(~Exists(rows) for rows in needed), updated_at__lt=since)


def prune(may_continue: MayContinue = lambda: True) -> dict[str, int]:
    """Delete old rows while `may_continue` returns True. Return the number of rows by name."""
    return delete_in_steps(
        (deleted for kind in rules() for deleted in _deletions(kind)), may_continue
    )


def delete_in_steps(
    deletions: Iterable[dict[str, int]], may_continue: MayContinue
) -> dict[str, int]:
    """Add up deletions, with a pause after each, while `may_continue` returns True."""
    gone: Counter[str] = Counter()
    started = time.monotonic()
    for deleted in deletions:
        gone.update(deleted)
        if not may_continue():
            break
        # Lets other writers in; the longer the deletion took, the more of them wait.
        time.sleep(time.monotonic() - started)
        started = time.monotonic()
    return dict(gone)


def due() -> dict[str, int]:
    """Count the rows that `prune` would delete, without the rows of deleted threads."""
    return {kind.name: kind.count() for kind in rules()}


def prune_everything(may_continue: MayContinue = lambda: True) -> dict[str, int]:
    """Prune the rows of all apps."""
    gone = Counter(prune(may_continue))
    for module in _others():
        if may_continue():
            gone.update(module.prune(may_continue))
    return {name: count for name, count in gone.items() if count}


def everything_due() -> dict[str, int]:
    """Count the rows that `prune_everything` would delete."""
    counts = Counter(due())
    for module in _others():
        counts.update(module.due())
    return dict(counts)


def _others() -> Iterator[ModuleType]:
    for app in apps.get_app_configs():
        if app.name != "agents" and module_has_submodule(app.module, "retention"):
            yield import_module(f"{app.name}.retention")


def _deletions(kind: RetentionRule) -> Iterator[dict[str, int]]:
    """Delete the rows of a rule; yield the counts of each transaction."""
    for keys in kind.batches():
        if kind.rows.model is Thread:
            for first in range(0, len(keys), BATCH_OF_THREADS):
                chunk = keys[first : first + BATCH_OF_THREADS]
                yield from _delete_threads(chunk, kind.cutoff)
        else:
            yield _delete_rows(kind.rows.model._default_manager.filter(pk__in=keys))


def _delete_threads(thread_ids: list[str], cutoff: datetime) -> Iterator[dict[str, int]]:
    """Delete the traces of their runs, which may be many, then the threads with the rest."""
    quiet = _quiet_threads(cutoff).filter(pk__in=thread_ids)
    yield from _delete_traces(quiet)
    yield _delete_quiet(quiet)


@db.retry_on_conflict
def _delete_quiet(quiet: QuerySet[Thread]) -> dict[str, int]:
    with transaction.atomic():
        # A concurrent message waits, and then begins the thread again.
        _lock(quiet)
        # Read again: a run may have been retried before it was locked.
        return _delete_locked(list(quiet.values_list("pk", flat=True)))


def _lock(threads: QuerySet[Thread]) -> list[str]:
    """Lock threads, then their runs. Return the keys of the threads."""
    locked = db.lock(threads)
    db.lock(Run.objects.filter(thread__in=locked), "thread", "position")
    return locked


def _delete_traces(threads: list[str] | QuerySet[Thread]) -> Iterator[dict[str, int]]:
    """Delete steps, attempts and events of threads; of a queryset, while the threads are in it."""
    traces: list[QuerySet[Any]] = [
        Step.objects.all(),
        Attempt.objects.exclude(to_count=True),
        Event.objects.exclude(to_count=True),
    ]
    for rows in traces:
        of_these = rows.filter(run__thread__in=threads)
        while keys := list(of_these.values_list("pk", flat=True)[:BATCH]):
            yield _delete_rows(rows.filter(pk__in=keys))


def delete_thread(thread: Thread) -> None:
    """Delete a thread at once, for its owner. Its unfinished runs are cancelled, with their events; its
    usage stays in the rollups. A thread that was deleted before is ignored."""
    _close(thread.pk)
    for _ in _delete_traces([thread.pk]):
        pass
    _delete_threads_now(Thread.objects.filter(pk=thread.pk))


@db.retry_on_conflict
def _delete_threads_now(threads: QuerySet[Thread]) -> None:
    with transaction.atomic():
        # A concurrent message waits, and then begins the thread again; a worker with an outcome waits
        # too, and finds the run deleted.
        locked = _lock(threads)
        for thread_id in locked:
            _close(thread_id)
        _delete_locked(locked)


def _delete_locked(thread_ids: list[str]) -> dict[str, int]:
    # After the rollups' own row (agents.usage.rollups), which is locked before the events that it
    # counts.
    db.lock(Event.objects.filter(run__thread__in=thread_ids))
    return delete(Thread.objects.filter(pk__in=thread_ids))


def delete_threads_of(user: User) -> None:
    """Delete the threads of a user, in the transaction that deletes the user: Django alone would lock
    the rows in another order, and would not cancel runs."""
    # The insertion of a new thread waits for this transaction, and finds its owner deleted.
    db.lock(User.objects.filter(pk=user.pk))
    _delete_threads_now(Thread.objects.filter(owner=user))


def _close(thread_id: str) -> None:
    for run in Run.objects.unfinished().filter(thread=thread_id).order_by("position"):
        actions.cancel(run)
    rollups.fold_thread(thread_id)


@db.retry_on_conflict
def _delete_rows(rows: QuerySet[Any]) -> dict[str, int]:
    with transaction.atomic():
        db.lock(rows)
        return delete(rows)


def delete(rows: QuerySet[Any]) -> dict[str, int]:
    """Delete rows. Return the number of rows by the names of their models."""
    _, deleted = rows.delete()
    names = {apps.get_model(label)._meta.verbose_name_plural: n for label, n in deleted.items()}
    return {str(name): count for name, count in names.items()}
