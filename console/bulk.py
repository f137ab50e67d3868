"""Do one thing to many rows: in a worker, one row at a time, to be watched and stopped.

Which rows is settled when it is asked for, as rows of their own. What is done to a row and the note
that it was done are one transaction, so a worker that dies leaves nothing half done, and whoever
carries on does nothing twice.
"""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

from django.contrib.auth import get_user_model
from django.core.exceptions import EmptyResultSet
from django.db import connection, transaction
from django.db.models import Count, F, Model, QuerySet
from django.db.models.functions import Coalesce, Now
from django.http import HttpRequest
from django.utils import timezone

from console import audit
from console.models import BulkItem, BulkJob
from lib.clients import client_ip
from lib.db import TRANSIENT_ERRORS

logger = logging.getLogger(__name__)

BATCH = 20
# Longer than a batch takes. Two workers at once do no harm.
LEASE = timedelta(seconds=10)
SWEEP_SECONDS = 5.0


@dataclass(frozen=True)
class Deed:
    """What can be done to the rows of a model: `do` takes one and tells whether it changed anything.
    It must be safe against whatever else happens to the row, and be done when it returns."""

    name: str  # also the permission that it takes
    model: type[Model]
    title: str
    action: str  # in the audit trail
    do: Callable[[Any], bool]
    explanation: str = ""
    order: str = "pk"


DEEDS: dict[str, Deed] = {}


def register(deed: Deed) -> None:
    DEEDS[deed.name] = deed


def deeds_for(request: HttpRequest, model: type[Model]) -> list[Deed]:
    return [
        deed for deed in DEEDS.values() if deed.model is model and request.user.has_perm(deed.name)
    ]


def start(request: HttpRequest, deed: Deed, rows: QuerySet[Any], *, reason: str = "") -> BulkJob:
    """Have `deed` done to all of `rows`."""
    user: Any = request.user
    with transaction.atomic():
        job = BulkJob.objects.create(
            deed=deed.name,
            title=deed.title,
            kind=deed.model._meta.label_lower,
            filter=request.GET.urlencode(),
            reason=reason,
            who=user,
            name=user.get_username(),
            ip=client_ip(request),
        )
        job.total = _settle(job, rows.order_by(deed.order))
        job.save(update_fields=["total"])
        audit.note(request, audit.Action.BULK, job, reason, f"{deed.title}: {job.total} rows")
        transaction.on_commit(partial(wake, job.pk), robust=True)
    return job


def _settle(job: BulkJob, rows: QuerySet[Any]) -> int:
    """Write down the ids of `rows`, in one statement: there may be a million. How many."""
    pk = rows.model._meta.pk
    try:
        sql, params = rows.values(pk.name).query.sql_with_params()
    except EmptyResultSet:
        return 0
    table, column = map(connection.ops.quote_name, (BulkItem._meta.db_table, pk.column))
    with connection.cursor() as cursor:
        cursor.execute(
            f"INSERT INTO {table} (job_id, object_id, outcome, error) "  # noqa: S608
            f"SELECT %s, CAST(found.{column} AS varchar(255)), '', '' FROM ({sql}) found",
            [job.pk, *params],
        )
        return int(cursor.rowcount)


def wake(job_id: int) -> None:
    """Tell a worker. Where the broker is away the sweep does it later."""
    from console.tasks import carry_on as task  # it imports this module

    task.apply_async((job_id,), retry=False)


def sweep() -> None:
    """Tell a worker of the jobs that nobody works on."""
    for job_id in BulkJob.objects.abandoned().values_list("pk", flat=True):
        wake(job_id)


def stop(request: HttpRequest, job: BulkJob) -> bool:
    """Let the rest of a job be. False when it had ended."""
    wanted = BulkJob.objects.unfinished().filter(pk=job.pk).update(stop_wanted=True)
    if wanted:
        audit.note(request, audit.Action.STOP, job, result=job.title)
    return bool(wanted)


def carry_on(job_id: int) -> None:
    """Do what is left of a job, unless somebody else is at it."""
    if not _claim(job_id):
        return
    job = BulkJob.objects.select_related("who").get(pk=job_id)
    deed = DEEDS.get(job.deed)
    if deed is None:
        logger.error("There is no bulk action %s any more", job.deed)
        _end(job, BulkJob.Status.STOPPED)
        return
    _recount(job)  # whoever had it before has not counted its last batch
    while _renew(job):
        left = job.items.filter(outcome="").order_by("id")[:BATCH]
        items = list(left)
        if items and not _may_go_on(job):
            logger.warning("Bulk job %d stops: %s may not do this any more", job.pk, job.name)
            _end(job, BulkJob.Status.STOPPED)
            return
        if not items:
            _end(job, BulkJob.Status.DONE)
            return
        _do_batch(job, deed, items)
    job.refresh_from_db()
    if job.stop_wanted:
        _end(job, BulkJob.Status.STOPPED)


def _may_go_on(job: BulkJob) -> bool:
    """False once the account that asked for it is deactivated, deleted or without the permission."""
    if job.who_id is None:
        return False
    who = get_user_model()._default_manager.filter(pk=job.who_id).first()
    return who is not None and who.has_perm(job.deed)


def _claim(job_id: int) -> bool:
    abandoned = BulkJob.objects.abandoned().filter(pk=job_id)
    return bool(
        abandoned.update(
            status=BulkJob.Status.RUNNING,
            lease_expires_at=Now() + LEASE,
            started_at=Coalesce("started_at", Now()),
        )
    )


def _renew(job: BulkJob) -> bool:
    return bool(
        BulkJob.objects.unfinished()
        .filter(pk=job.pk, stop_wanted=False)
        .update(lease_expires_at=Now() + LEASE)
    )


def _recount(job: BulkJob) -> None:
    outcomes = job.items.values_list("outcome").annotate(Count("id"))
    counts = dict.fromkeys(BulkItem.Outcome.values, 0) | dict(outcomes)
    counts.pop("", None)
    BulkJob.objects.filter(pk=job.pk).update(**counts)


def _end(job: BulkJob, status: BulkJob.Status) -> None:
    _recount(job)
    ended = BulkJob.objects.unfinished().filter(pk=job.pk)
    if ended.update(status=status, finished_at=timezone.now(), lease_expires_at=None):
        job.refresh_from_db()
        logger.info(
            "Bulk job %d %s: %d done, %d skipped, %d failed",
            job.pk,
            status.value,
            job.done,
            job.skipped,
            job.failed,
        )


def _do_batch(job: BulkJob, deed: Deed, items: list[BulkItem]) -> None:
    counts: Counter[str] = Counter()
    try:
        for item in items:
            if outcome := _do(job, deed, item):
                counts[outcome] += 1
    finally:
        if counts:
            BulkJob.objects.filter(pk=job.pk).update(
                **{name: F(name) + number for name, number in counts.items()}
            )


def _do(job: BulkJob, deed: Deed, item: BulkItem) -> str:
    """What became of an item; nothing when another worker has seen to it."""
    try:
        with transaction.atomic():
            # First of all, so that another worker waits here and then finds it done.
            if not _conclude(item, BulkItem.Outcome.DONE):
                return ""
            row = deed.model._default_manager.filter(pk=item.object_id).first()
            if row is None or not deed.do(row):
                BulkItem.objects.filter(pk=item.pk).update(outcome=BulkItem.Outcome.SKIPPED)
                return BulkItem.Outcome.SKIPPED.value
            entry = audit.entry_of(
                job.who, deed.action, row, job.reason, f"bulk job {job.pk}", ip=job.ip
            )
            entry.name = job.name
            entry.save(force_insert=True)
            return BulkItem.Outcome.DONE.value
    except TRANSIENT_ERRORS:
        raise  # the database is unavailable: the sweep continues the job
    except Exception as error:
        # Whatever is wrong with one row, the others are not to suffer from it.
        logger.exception("Bulk job %d fails at %s", job.pk, item.object_id)
        _conclude(item, BulkItem.Outcome.FAILED, error=f"{type(error).__name__}: {error}"[:500])
        return BulkItem.Outcome.FAILED.value


def _conclude(item: BulkItem, outcome: BulkItem.Outcome, error: str = "") -> bool:
    left = BulkItem.objects.filter(pk=item.pk, outcome="")
    return bool(left.update(outcome=outcome, error=error))
