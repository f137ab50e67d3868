"""What the console forgets when it is old, and what it does not."""

from datetime import timedelta
from typing import Any

import pytest
from axes.models import AccessAttempt
from django.utils import timezone

from console import retention
from console.models import AuditEntry, BulkItem, BulkJob

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def _rules(settings: Any) -> None:
    settings.RETENTION_AUDIT_DAYS = 365
    settings.RETENTION_BULK_DAYS = 30


def entry(days: int) -> AuditEntry:
    entry: AuditEntry = AuditEntry.objects.create(
        at=timezone.now() - timedelta(days=days), name="alice", action="login"
    )
    return entry


def job(*, asked: int, ended: int | None, items: int = 1) -> BulkJob:
    """Asked for and ended so many days ago."""
    now = timezone.now()
    job: BulkJob = BulkJob.objects.create(
        title="Cancel",
        status="running" if ended is None else "done",
        created_at=now - timedelta(days=asked),
        finished_at=None if ended is None else now - timedelta(days=ended),
    )
    BulkItem.objects.bulk_create(BulkItem(job=job, object_id=str(n)) for n in range(items))
    return job


def attempt(**age: int) -> AccessAttempt:
    made: AccessAttempt = AccessAttempt.objects.create(username="alice", failures_since_start=5)
    AccessAttempt.objects.filter(pk=made.pk).update(attempt_time=timezone.now() - timedelta(**age))
    return made


def test_what_is_old_goes() -> None:
    entry(366)
    young = entry(364)
    job(asked=40, ended=31, items=5)
    lately, going_on = job(asked=40, ended=29), job(asked=40, ended=None)
    attempt(hours=25)
    tried = attempt(hours=23)

    due = {"bulk items": 5, "bulk jobs": 1, "audit entries": 1, "access attempts": 1}
    assert retention.due() == due
    assert retention.prune(batch=2) == due
    assert retention.prune() == {}
    assert AuditEntry.objects.get() == young
    assert set(BulkJob.objects.all()) == {lately, going_on}
    assert BulkItem.objects.count() == 2
    assert AccessAttempt.objects.get() == tried


def test_a_lock_is_not_forgotten_before_it_is_over(settings: Any) -> None:
    settings.AXES_COOLOFF_TIME = timedelta(hours=48)
    attempt(hours=47)

    assert retention.prune() == {}


def test_0_days_keep_it_for_good(settings: Any) -> None:
    settings.RETENTION_AUDIT_DAYS = settings.RETENTION_BULK_DAYS = 0
    entry(9999)
    job(asked=9999, ended=9999)

    assert retention.prune() == {}
    assert retention.due() == {"access attempts": 0}


def test_it_ends_when_it_is_told_to() -> None:
    for _ in range(3):
        entry(366)

    assert retention.prune(lambda: False, batch=1) == {"audit entries": 1}
