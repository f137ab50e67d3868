"""The queries of the hot path read an index, however many finished runs there are."""

from typing import Any

import pytest
from django.db import connection
from django.db.models import QuerySet
from django.utils import timezone

from agents import retention
from agents.models import Event, Run
from chat.models import Message, Thread
from tests import factories
from tests.plans import explain

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def _history() -> None:
    for _ in range(3):
        factories.conversation(200)
    # Indexes are alike to PostgreSQL while there is nothing in any of them.
    newest = Thread.objects.order_by("-created_at")[:2]
    Run.objects.filter(thread__in=list(newest)).update(
        status=Run.Status.QUEUED, due_at=timezone.now(), requester="@alice:localhost"
    )
    now = timezone.now()
    Event.objects.bulk_create(
        Event(type=Event.Type.COMPLETED, run=run, payload={}, published_at=now)
        for run in Run.objects.all()
    )
    with connection.cursor() as cursor:
        cursor.execute("ANALYZE")


def pages(name: str) -> QuerySet[Any]:
    """The second page of a walk through what is old."""
    kind = next(kind for kind in retention.rules() if kind.name == name)
    start = 7 if kind.order == "pk" else kind.cutoff
    return kind.page(start)


# SQLite names the index of a constraint itself.
SQLITE = connection.vendor == "sqlite"
MESSAGES = "(thread_id=? AND position<?)" if SQLITE else "message_position_is_unique"


def key_of(table: str) -> str:
    """A walk along the primary key, as a plan tells of it."""
    return f"SEARCH {table} USING INTEGER PRIMARY KEY" if SQLITE else f"{table}_pkey"


QUERIES = {
    "claim": (
        lambda: Run.objects.claimable_unchanged(
            Run(pk="run_1", thread_id="thr_1", position=398, retries=1)
        ),
        ["run_unfinished_in_thread"],
    ),
    "sweep": (
        lambda: Run.objects.dispatch_lost().order_by("due_at"),
        ["run_unfinished_due", "run_unfinished_in_thread"],
    ),
    "deadlines": (
        lambda: Run.objects.overdue().order_by("deadline_at")[:500],
        ["run_unfinished_deadline"],
    ),
    "relay": (
        lambda: (
            Event.objects.unpublished().filter(created_at__lt=timezone.now()).order_by("created_at")
        ),
        ["event_unpublished"],
    ),
    "history": (
        lambda: Message.objects.filter(thread="thr_1", position__lt=100).order_by("-position")[:9],
        [MESSAGES],
    ),
    "summaries": (
        lambda: Thread.objects.filter(summary_due_at__lt=timezone.now()).order_by("summary_due_at"),
        ["thread_summary_due"],
    ),
    "old steps": (lambda: pages("steps"), [key_of("agents_step")]),
    "old attempts": (lambda: pages("attempts"), [key_of("agents_attempt")]),
    "old events": (lambda: pages("events"), ["event_published"]),
    "old sessions": (lambda: pages("sessions"), ["django_session_expire_date"]),
    "quiet threads": (lambda: pages("threads"), ["thread_newest", "run_unfinished_in_thread"]),
    "newest runs": (
        lambda: Run.objects.order_by("-created_at", "id")[:100],
        ["run_newest"],
    ),
}


@pytest.mark.parametrize("name", QUERIES)
def test_an_index_is_used(name: str, settings: Any) -> None:
    settings.RETENTION_THREADS_DAYS = 365
    query, indexes = QUERIES[name]

    plan = explain(query())

    for index in indexes:
        assert index in plan, plan
