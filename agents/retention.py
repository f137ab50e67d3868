"""What is kept for how long, by the settings RETENTION_*; 0 days keep it for good.

Old rows go in small batches, each a transaction of its own, with a pause between them that is as long
as the batch took: on SQLite there is one writer at a time. What is needed never goes: anything of a
run that has not ended, an event that no worker has seen on the stream, what is not in the rollups
yet, and idempotency keys, which are promised for good.

An app contributes by a `retention.py` with `prune(go_on) -> dict[str, int]`, which deletes what is
too old for as long as `go_on` says so and tells how many of what; and with `due() -> dict[str, int]`,
which only counts. It is found by itself.
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
# Each brings its messages and runs.
BATCH_OF_THREADS = 50

GoOn = Callable[[], bool]


@dataclass(frozen=True)
class Ageing:
    """Rows that may go once `age` lies before `cutoff`. `order` is a column with an index, along
    which age falls: whoever walks along it may stop at the first young row, and needs no index on
    `age` itself."""

    name: str
    rows: QuerySet[Any]
    order: str
    age: str
    cutoff: datetime

    def count(self) -> int:
        return self.rows.filter(**{f"{self.age}__lt": self.cutoff}).count()

    def page(self, start: Any = None) -> QuerySet[Any, tuple[Any, Any, datetime]]:
        """The next rows from `start` on, old ones or not: key, place in the order, age."""
        rows = self.rows if start is None else self.rows.filter(**{f"{self.order}__gte": start})
        return rows.order_by(self.order).values_list("pk", self.order, self.age)[:BATCH]

    def batches(self) -> Iterator[list[Any]]:
        """The keys of what is old; each batch is to be deleted before the next is asked for."""
        start = None
        while page := list(self.page(start)):
            if old := [key for key, _, age in page if age < self.cutoff]:
                yield old
            _, start, youngest = page[-1]
            if youngest >= self.cutoff or len(page) < BATCH:
                return


def ageing() -> list[Ageing]:
    """What is not kept for good, as the settings have it."""
    now = timezone.now()
    quiet_since = now - timedelta(days=settings.RETENTION_THREADS_DAYS)
    found = [
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
            # Old ones that are still asked something stand between those that are not.
            _quiet_threads(quiet_since),
            "created_at",
            "updated_at",
            settings.RETENTION_THREADS_DAYS,
        ),
    ]
    return [
        Ageing("sessions", Session.objects.all(), "expire_date", "expire_date", now),
        *(
            Ageing(name, rows, order, age, now - timedelta(days=days))
            for name, rows, order, age, days in found
            if days
        ),
    ]


def _of_finished_runs(model: type[Step] | type[Attempt] | type[Event]) -> QuerySet[Any]:
    # Not by a join, which SQLite would begin at the runs, all of them.
    unfinished = Run.objects.unfinished().filter(pk=OuterRef("run"))
    return model._default_manager.filter(~Exists(unfinished))


def _quiet_threads(since: datetime) -> QuerySet[Thread]:
    """Where nothing was asked since, nothing is going on, nor still to be told, nor to be counted."""
    unfinished = Run.objects.unfinished().filter(thread=OuterRef("pk"))
    untold = Event.objects.unpublished().filter(run__thread=OuterRef("pk"))
    uncounted = [
        Attempt.objects.filter(to_count=True, run__thread=OuterRef("pk")),
        Event.objects.filter(to_count=True, run__thread=OuterRef("pk")),
        Summary.objects.filter(to_count=True, thread=OuterRef("pk")),
    ]
    undelivered = Event.objects.filter(to_deliver=True, run__thread=OuterRef("pk"))
    left = [unfinished, untold, undelivered, *uncounted]
    return Thread.objects.filter(*(~Exists(rows) for rows in left), updated_at__lt=since)


def prune(go_on: GoOn = lambda: True) -> dict[str, int]:
    """Delete what is too old, for as long as `go_on` says so. How many rows of what."""
    return at_leisure((deleted for kind in ageing() for deleted in _deletions(kind)), go_on)


def at_leisure(deletions: Iterable[dict[str, int]], go_on: GoOn) -> dict[str, int]:
    """What they have deleted, with a pause after each, for as long as `go_on` says so."""
    gone: Counter[str] = Counter()
    started = time.monotonic()
    for deleted in deletions:
        gone.update(deleted)
        if not go_on():
            break
        # Whoever else wants to write comes in between; the longer it took, the more may wait.
        time.sleep(time.monotonic() - started)
        started = time.monotonic()
    return dict(gone)


def due() -> dict[str, int]:
    """How many rows `prune` would delete; what goes with a thread is not counted."""
    return {kind.name: kind.count() for kind in ageing()}


def prune_everything(go_on: GoOn = lambda: True) -> dict[str, int]:
    """`prune`, and what the other apps have to prune."""
    gone = Counter(prune(go_on))
    for module in _others():
        if go_on():
            gone.update(module.prune(go_on))
    return {name: count for name, count in gone.items() if count}


def everything_due() -> dict[str, int]:
    """What `prune_everything` would delete."""
    found = Counter(due())
    for module in _others():
        found.update(module.due())
    return dict(found)


def _others() -> Iterator[ModuleType]:
    for app in apps.get_app_configs():
        if app.name != "agents" and module_has_submodule(app.module, "retention"):
            yield import_module(f"{app.name}.retention")


def _deletions(kind: Ageing) -> Iterator[dict[str, int]]:
    """What was deleted, transaction by transaction."""
    for keys in kind.batches():
        if kind.rows.model is Thread:
            for first in range(0, len(keys), BATCH_OF_THREADS):
                chunk = keys[first : first + BATCH_OF_THREADS]
                yield from _delete_threads(chunk, kind.cutoff)
        else:
            yield _delete_rows(kind.rows.model._default_manager.filter(pk__in=keys))


def _delete_threads(thread_ids: list[str], cutoff: datetime) -> Iterator[dict[str, int]]:
    """The traces of their runs first, as they may be many, then the threads with all that is left."""
    quiet = _quiet_threads(cutoff).filter(pk__in=thread_ids)
    yield from _delete_traces(quiet)
    yield _delete_quiet(quiet)


@db.retry_on_conflict
def _delete_quiet(quiet: QuerySet[Thread]) -> dict[str, int]:
    with transaction.atomic():
        # A question that comes now waits, and then begins the thread anew.
        _lock(quiet)
        # Once more: a run may have been asked for again until it was locked.
        return _delete_locked(list(quiet.values_list("pk", flat=True)))


def _lock(threads: QuerySet[Thread]) -> list[str]:
    """Lock threads, then their runs. The keys of the threads."""
    locked = db.lock(threads)
    db.lock(Run.objects.filter(thread__in=locked), "thread", "position")
    return locked


def _delete_traces(threads: list[str] | QuerySet[Thread]) -> Iterator[dict[str, int]]:
    """Those of a queryset's threads for as long as they are in it."""
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
    """Delete a thread at once, because its owner wants it. What goes on in it is cancelled and told
    so; what it took stays in the figures. One that is gone already is left at that."""
    _close(thread.pk)
    for _ in _delete_traces([thread.pk]):
        pass
    _delete_threads_now(Thread.objects.filter(pk=thread.pk))


@db.retry_on_conflict
def _delete_threads_now(threads: QuerySet[Thread]) -> None:
    with transaction.atomic():
        # A question that comes now waits, and then begins the thread anew; and so does a worker that
        # still has something to write of a run, and finds it gone.
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
    """Delete what a user owns, in the transaction that deletes the user: Django alone would lock the
    rows in an order of its own, and know nothing of workers."""
    # A thread that is begun meanwhile waits for this transaction, and finds its owner gone.
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
    """How many rows of what, in words."""
    _, deleted = rows.delete()
    names = {apps.get_model(label)._meta.verbose_name_plural: n for label, n in deleted.items()}
    return {str(name): count for name, count in names.items()}
