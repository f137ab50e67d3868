"""How long deliveries are kept: RETENTION_DELIVERIES_DAYS. Their bodies go with the last of them."""

from collections.abc import Iterator
from datetime import timedelta

from django.conf import settings
from django.db.models import Exists, OuterRef, Q
from django.utils import timezone

from agents import retention
from webhooks.models import Delivery, DeliveryQuerySet, Outcome

# What else wants to write waits for one batch at the most.
BATCH = 500
# An outcome's deliveries are written together with it, or soon after.
UNTOLD_FOR = timedelta(hours=1)


def prune(go_on: retention.GoOn = lambda: True) -> dict[str, int]:
    """Delete what is too old, for as long as `go_on` says so; how many rows of what."""

    def deletions() -> Iterator[dict[str, int]]:
        while keys := list(_old().order_by("created_at").values_list("pk", flat=True)[:BATCH]):
            yield retention.delete(Delivery.objects.filter(pk__in=keys))
        for outcomes in _untold().batches():
            # Not counted: a body is a part of its deliveries, which are gone.
            Outcome.objects.filter(pk__in=outcomes).delete()
            yield {}

    return retention.at_leisure(deletions(), go_on)


def due() -> dict[str, int]:
    """How many rows `prune` would delete."""
    return {str(Delivery._meta.verbose_name_plural): _old().count()}


def _untold() -> retention.Ageing:
    """The bodies that belong to no delivery any more."""
    delivered = Delivery.objects.filter(event=OuterRef("pk"))
    cutoff = timezone.now() - UNTOLD_FOR
    rows = Outcome.objects.filter(~Exists(delivered))
    return retention.Ageing("outcomes", rows, "created_at", "created_at", cutoff)


def _old() -> DeliveryQuerySet:
    if not settings.RETENTION_DELIVERIES_DAYS:
        return Delivery.objects.none()
    cutoff = timezone.now() - timedelta(days=settings.RETENTION_DELIVERIES_DAYS)
    # What waits for a subscription that nobody enables again is not waited for.
    ended = Q(next_try_at=None) | Q(subscription__enabled=False)
    return Delivery.objects.filter(ended, created_at__lt=cutoff)
