"""The queries of the hot path read an index, however many finished runs there are."""

from datetime import timedelta

import pytest
from django.db import connection
from django.utils import timezone

from agents.models import Event, Run
from chat.models import Message, Thread
from tests import factories
from tests.plans import explain

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def _history() -> None:
    for _ in range(3):
        factories.conversation(200)
    with connection.cursor() as cursor:
        cursor.execute("ANALYZE")


# SQLite names the index of a constraint itself.
SQLITE = connection.vendor == "sqlite"
MESSAGES = "(thread_id=? AND position<?)" if SQLITE else "message_position_is_unique"

QUERIES = {
    "claim": (
        lambda: Run.objects.claimable().filter(pk="run_1"),
        ["run_unfinished_in_thread"],
    ),
    "sweep": (
        lambda: Run.objects.overlooked(after=timedelta(seconds=15)).order_by("due_at"),
        ["run_unfinished_due", "run_unfinished_in_thread"],
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
    "newest runs": (
        lambda: Run.objects.order_by("-created_at", "id")[:100],
        ["run_newest"],
    ),
}


@pytest.mark.parametrize("name", QUERIES)
def test_an_index_is_used(name: str) -> None:
    query, indexes = QUERIES[name]

    plan = explain(query())

    for index in indexes:
        assert index in plan, plan
