"""Recent activity of bot registrations, for lists."""

from datetime import timedelta

from django.db.models import Count, IntegerField, OuterRef, QuerySet, Subquery
from django.db.models.functions import Coalesce
from django.utils import timezone

from agents.models import Run
from botrunner.models import Reply
from realm.models import BotRegistration

DAY = timedelta(days=1)


def with_activity(
    registrations: QuerySet[BotRegistration], *, within: timedelta = DAY
) -> QuerySet[BotRegistration]:
    """Annotate with `last_fired_at`, and with `rooms_lately`, `runs_lately` and `failures_lately`: the
    rooms, the runs and the failed runs within that time. Nothing is counted in advance."""
    fired = Reply.objects.filter(registration=OuterRef("pk"))
    lately = fired.filter(created_at__gt=timezone.now() - within, run__isnull=False)
    newest = fired.order_by("-created_at").values("created_at")[:1]
    return registrations.annotate(
        last_fired_at=Subquery(newest),
        rooms_lately=_count(lately, "room"),
        runs_lately=_count(lately),
        failures_lately=_count(lately.filter(run__status=Run.Status.FAILED)),
    )


def _count(replies: QuerySet[Reply], of: str = "run") -> Coalesce:
    # A retried run has several replies.
    by_registration = replies.order_by().values("registration")
    counts = by_registration.annotate(n=Count(of, distinct=True)).values("n")
    return Coalesce(Subquery(counts, output_field=IntegerField()), 0)
