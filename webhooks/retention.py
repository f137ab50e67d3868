"""Retention of deliveries (RETENTION_DELIVERIES_DAYS) and of their bodies."""

from collections.abc import Iterator
from datetime import timedelta

from django.conf import settings
from django.db.models import Exists, OuterRef, Q
from django.utils import timezone

from agents import retention
from webhooks.models import Delivery, DeliveryQuerySet, Outcome

# Other writers wait for at most one batch.
BATCH = 500
# Deliveries are created together with their body, or soon after.
MIN_BODY_AGE = timedelta(hours=1)


def prune(may_continue: retention.MayContinue = lambda: True) -> dict[str, int]:
    """Delete old rows while `may_continue` returns True. Return the number of rows by model."""

    def deletions() -> Iterator[dict[str, int]]:
        while keys := list(_old().order_by("created_at").values_list("pk", flat=True)[:BATCH]):
            yield retention.delete(Delivery.objects.filter(pk__in=keys))
        for outcomes in _orphans().batches():
            # Not counted: bodies are parts of deliveries.
            Outcome.objects.filter(pk__in=outcomes).delete()
            yield {}

    return retention.delete_in_steps(deletions(), may_continue)


def due() -> dict[str, int]:
    """Return the number of rows that `prune` would delete, by model."""
    return {str(Delivery._meta.verbose_name_plural): _old().count()}


def _orphans() -> retention.RetentionRule:
    """Return the bodies without deliveries."""
    delivered = Delivery.objects.filter(event=OuterRef("pk"))
    cutoff = timezone.now() - MIN_BODY_AGE
    rows = Outcome.objects.filter(~Exists(delivered))
    return retention.RetentionRule("outcomes", rows, "created_at", "created_at", cutoff)


def _old() -> DeliveryQuerySet:
    if not settings.RETENTION_DELIVERIES_DAYS:
        return Delivery.objects.none()
    cutoff = timezone.now() - timedelta(days=settings.RETENTION_DELIVERIES_DAYS)
    # Deliveries pending at a disabled subscription are deleted too.
    ended = Q(next_try_at=None) | Q(subscription__enabled=False)
    return Delivery.objects.filter(ended, created_at__lt=cutoff)
