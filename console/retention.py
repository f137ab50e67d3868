"""What the console forgets, and when: by the settings RETENTION_AUDIT_DAYS and RETENTION_BULK_DAYS,
and what django-axes has of log-ins that failed."""

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from axes.models import AccessAttempt
from django.conf import settings
from django.db.models import QuerySet
from django.utils import timezone

from agents import retention
from console.models import AuditEntry, BulkItem, BulkJob

# What else wants to write waits for one batch at the most.
BATCH = 500
# A failed log-in is of no use once its lock is over; this much longer it tells what somebody tried.
ATTEMPTS_KEPT = timedelta(days=1)


def prune(go_on: retention.GoOn = lambda: True, *, batch: int = BATCH) -> dict[str, int]:
    """Delete what is too old, for as long as `go_on` says so; how many rows of what."""
    deletions = (deleted for rows in _old() for deleted in _deletions(rows, batch))
    return retention.at_leisure(deletions, go_on)


def due() -> dict[str, int]:
    """How many rows `prune` would delete."""
    return {str(rows.model._meta.verbose_name_plural): rows.count() for rows in _old()}


def _old() -> Iterator[QuerySet[Any]]:
    now = timezone.now()
    if days := settings.RETENTION_BULK_DAYS:
        cutoff = now - timedelta(days=days)
        # A job was asked for before it ended, and by that there is an index.
        jobs = BulkJob.objects.filter(created_at__lt=cutoff, finished_at__lt=cutoff)
        # The items first, as there may be a million of them to a job.
        yield BulkItem.objects.filter(job__in=jobs.values("pk")).order_by("job")
        yield jobs.order_by("created_at")
    if days := settings.RETENTION_AUDIT_DAYS:
        yield AuditEntry.objects.filter(at__lt=now - timedelta(days=days)).order_by("at")
    lapsed = now - max(ATTEMPTS_KEPT, settings.AXES_COOLOFF_TIME)
    yield AccessAttempt.objects.filter(attempt_time__lt=lapsed).order_by("pk")


def _deletions(rows: QuerySet[Any], batch: int) -> Iterator[dict[str, int]]:
    while keys := list(rows.values_list("pk", flat=True)[:batch]):
        yield retention.delete(rows.model._default_manager.filter(pk__in=keys))
