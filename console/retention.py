"""Retention of audit entries (RETENTION_AUDIT_DAYS), bulk jobs (RETENTION_BULK_DAYS) and django-axes'
failed logins."""

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from axes.models import AccessAttempt
from django.conf import settings
from django.db.models import QuerySet
from django.utils import timezone

from agents import retention
from console.models import AuditEntry, BulkItem, BulkJob

# Other writers wait for at most one batch.
BATCH = 500
# Failed logins are kept for an investigation, longer than their lockout lasts.
MIN_ATTEMPT_AGE = timedelta(days=1)


def prune(
    may_continue: retention.MayContinue = lambda: True, *, batch: int = BATCH
) -> dict[str, int]:
    """Delete old rows while `may_continue` returns True. Return the number of rows by model."""
    deletions = (deleted for rows in _old() for deleted in _deletions(rows, batch))
    return retention.delete_in_steps(deletions, may_continue)


def due() -> dict[str, int]:
    """Return the number of rows that `prune` would delete, by model."""
    return {str(rows.model._meta.verbose_name_plural): rows.count() for rows in _old()}


def _old() -> Iterator[QuerySet[Any]]:
    now = timezone.now()
    if days := settings.RETENTION_BULK_DAYS:
        cutoff = now - timedelta(days=days)
        # created_at has an index, and is earlier than finished_at.
        jobs = BulkJob.objects.filter(created_at__lt=cutoff, finished_at__lt=cutoff)
        # Items first: a job may have a million.
        yield BulkItem.objects.filter(job__in=jobs.values("pk")).order_by("job")
        yield jobs.order_by("created_at")
    if days := settings.RETENTION_AUDIT_DAYS:
        yield AuditEntry.objects.filter(at__lt=now - timedelta(days=days)).order_by("at")
    cutoff = now - max(MIN_ATTEMPT_AGE, settings.AXES_COOLOFF_TIME)
    yield AccessAttempt.objects.filter(attempt_time__lt=cutoff).order_by("pk")


def _deletions(rows: QuerySet[Any], batch: int) -> Iterator[dict[str, int]]:
    while keys := list(rows.values_list("pk", flat=True)[:batch]):
        yield retention.delete(rows.model._default_manager.filter(pk__in=keys))
