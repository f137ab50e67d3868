"""Bulk jobs: a worker applies an action to many rows, one at a time; users can watch and stop it.

The rows are chosen when the job starts and stored as items. The change of a row and the result of its
item are one transaction: a worker that dies leaves no row half done, and the next one repeats none.
"""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

from celery import shared_task
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
# Longer than a batch takes. Two workers on one job are harmless.
LEASE = timedelta(seconds=10)
SWEEP_SECONDS = 5.0


@dataclass(frozen=True)
class BulkAction:
    """An action on the rows of a model. `perform` takes a row and returns whether it changed anything.
    It must be safe under concurrent changes of the row, and complete when it returns."""

    name: str  # also the required permission
    model: type[Model]
    title: str
    action: str  # in the audit trail
    perform: Callable[[Any], bool]
    explanation: str = ""
    order: str = "pk"


ACTIONS: dict[str, BulkAction] = {}


def register(action: BulkAction) -> None:
    ACTIONS[action.name] = action


def actions_for(request: HttpRequest, model: type[Model]) -> list[BulkAction]:
    return [
        action
        for action in ACTIONS.values()
        if action.model is model and request.user.has_perm(action.name)
    ]


def start(
    request: HttpRequest, action: BulkAction, rows: QuerySet[Any], *, reason: str = ""
) -> BulkJob:
    """Create a job that applies `action` to all of `rows`, and dispatch it."""
    user: Any = request.user
    with transaction.atomic():
        job = BulkJob.objects.create(
            action=action.name,
            title=action.title,
            kind=action.model._meta.label_lower,
            filter=request.GET.urlencode(),
            reason=reason,
            who=user,
            name=user.get_username(),
            ip=client_ip(request),
        )
        job.total = _add_items(job, rows.order_by(action.order))
        job.save(update_fields=["total"])
        audit.record(request, audit.Action.BULK, job, reason, f"{action.title}: {job.total} rows")
        transaction.on_commit(partial(dispatch, job.pk), robust=True)
    return job


def _add_items(job: BulkJob, rows: QuerySet[Any]) -> int:
    """Store the ids of `rows` in one statement, as there may be a million. Return their number."""
    pk = rows.model._meta.pk
    try:
        sql, params = rows.values(pk.name).query.sql_with_params()
    except EmptyResultSet:
        return 0
    table, column = map(connection.ops.quote_name, (BulkItem._meta.db_table, pk.column))
    with connection.cursor() as cursor:
        cursor.execute(
            f"INSERT INTO {table} (job_id, object_id, outcome, error) "  # noqa: S608
            f"SELECT %s, CAST(chosen.{column} AS varchar(255)), '', '' FROM ({sql}) chosen",
            [job.pk, *params],
        )
        return int(cursor.rowcount)


def dispatch(job_id: int) -> None:
    """Queue a job. If the broker is unavailable, `dispatch_abandoned` queues it later."""
    run.apply_async((job_id,), retry=False)


def dispatch_abandoned() -> None:
    """Queue the jobs that no worker runs."""
    for job_id in BulkJob.objects.abandoned().values_list("pk", flat=True):
        dispatch(job_id)


def stop(request: HttpRequest, job: BulkJob) -> bool:
    """Stop a job before its remaining rows. Return False if it had already ended."""
    stopped = BulkJob.objects.unfinished().filter(pk=job.pk).update(stop_requested=True)
    if stopped:
        audit.record(request, audit.Action.STOP, job, result=job.title)
    return bool(stopped)


@shared_task
def run(job_id: int) -> None:
    """Process the remaining items of a job, unless another worker does."""
    if not _claim(job_id):
        return
    job = BulkJob.objects.select_related("who").get(pk=job_id)
    action = ACTIONS.get(job.action)
    if action is None:
        logger.error("Bulk job %d stopped: there is no bulk action %s", job.pk, job.action)
        _end(job, BulkJob.Status.STOPPED)
        return
    _recount(job)  # a worker that died has not counted its last batch
    while _renew(job):
        items = list(job.items.filter(outcome="").order_by("id")[:BATCH])
        if items and not _is_permitted(job):
            logger.warning("Bulk job %d stopped: %s lost the permission", job.pk, job.name)
            _end(job, BulkJob.Status.STOPPED)
            return
        if not items:
            _end(job, BulkJob.Status.DONE)
            return
        _process_batch(job, action, items)
    job.refresh_from_db()
    if job.stop_requested:
        _end(job, BulkJob.Status.STOPPED)


def _is_permitted(job: BulkJob) -> bool:
    """Return False once the job's user is deactivated, deleted or without the permission."""
    if job.who_id is None:
        return False
    user = get_user_model()._default_manager.filter(pk=job.who_id).first()
    return user is not None and user.has_perm(job.action)


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
        .filter(pk=job.pk, stop_requested=False)
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


def _process_batch(job: BulkJob, action: BulkAction, items: list[BulkItem]) -> None:
    counts: Counter[str] = Counter()
    try:
        for item in items:
            if outcome := _process(job, action, item):
                counts[outcome] += 1
    finally:
        if counts:
            BulkJob.objects.filter(pk=job.pk).update(
                **{name: F(name) + number for name, number in counts.items()}
            )


def _process(job: BulkJob, action: BulkAction, item: BulkItem) -> str:
    """Return the outcome of an item; an empty string if another worker has processed it."""
    try:
        with transaction.atomic():
            # First, so that another worker waits here and then skips the item.
            if not _conclude(item, BulkItem.Outcome.DONE):
                return ""
            row = action.model._default_manager.filter(pk=item.object_id).first()
            if row is None or not action.perform(row):
                BulkItem.objects.filter(pk=item.pk).update(outcome=BulkItem.Outcome.SKIPPED)
                return BulkItem.Outcome.SKIPPED.value
            entry = audit.new_entry(
                job.who, action.action, row, job.reason, f"bulk job {job.pk}", ip=job.ip
            )
            entry.name = job.name
            entry.save(force_insert=True)
            return BulkItem.Outcome.DONE.value
    except TRANSIENT_ERRORS:
        raise  # the database is unavailable: `dispatch_abandoned` resumes the job
    except Exception as error:
        # A failure of one row must not stop the others.
        logger.exception("Bulk job %d failed at %s", job.pk, item.object_id)
        _conclude(item, BulkItem.Outcome.FAILED, error=f"{type(error).__name__}: {error}"[:500])
        return BulkItem.Outcome.FAILED.value


def _conclude(item: BulkItem, outcome: BulkItem.Outcome, error: str = "") -> bool:
    pending = BulkItem.objects.filter(pk=item.pk, outcome="")
    return bool(pending.update(outcome=outcome, error=error))
