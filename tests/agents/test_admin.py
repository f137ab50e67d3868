from typing import Any

import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext

from agents.models import Run
from agents.runs import execution, memory
from chat.models import Message, Thread
from tests import factories
from tests.fakes.llm import FakeLLM

pytestmark = pytest.mark.django_db
LISTS = [
    "agents/run",
    "agents/event",
    "agents/summary",
    "chat/thread",
    "chat/message",
    "realm/user",
]


def test_a_run_is_shown_with_all_that_happened(admin_client: Client, model: FakeLLM) -> None:
    run = factories.ask("What is new?")
    execution.execute(run.pk)

    page = admin_client.get(f"/admin/agents/run/{run.pk}/change/").content.decode()

    for text in ("completed", "What is new?", "agent.run.requested", str(run.message_id)):
        assert text in page


def test_what_the_system_writes_is_read_only(admin_client: Client) -> None:
    run = factories.ask()

    assert admin_client.get("/admin/agents/run/add/").status_code == 403
    assert admin_client.post(f"/admin/agents/run/{run.pk}/delete/").status_code == 403
    admin_client.post(f"/admin/agents/run/{run.pk}/change/", {"status": "completed"})
    run.refresh_from_db()
    assert run.status == Run.Status.QUEUED


def test_a_thread_and_its_summary_are_shown(admin_client: Client, model: FakeLLM) -> None:
    thread = factories.conversation(6)
    Thread.objects.update(summary_due_at=thread.created_at)
    summary = memory.summarise(thread.pk)
    assert summary

    for path in (
        f"chat/thread/{thread.pk}",
        f"chat/message/{Message.objects.all()[0].pk}",
        f"agents/summary/{summary.pk}",
    ):
        assert admin_client.get(f"/admin/{path}/change/").status_code == 200


@pytest.mark.parametrize("path", LISTS)
def test_a_list_costs_the_same_with_three_rows_and_with_thirty(
    admin_client: Client, path: str
) -> None:
    counts = []
    admin_client.get(f"/admin/{path}/")  # leaves an audit entry the first time
    for _ in (3, 30):
        for number in range(3 if not counts else 27):
            run = factories.ask(owner=factories.user(f"user-{len(counts)}-{number}"))
            execution.execute(run.pk)
        counts.append(queries_of(admin_client, f"/admin/{path}/"))

    assert counts[0] == counts[1] <= 12


@pytest.mark.parametrize("path", LISTS)
def test_searching_finds_by_id(admin_client: Client, path: str) -> None:
    assert admin_client.get(f"/admin/{path}/", {"q": "run_1"}).status_code == 200


def queries_of(client: Client, url: str) -> int:
    with CaptureQueriesContext(connection) as captured:
        response: Any = client.get(url)
    assert response.status_code == 200
    return len(captured)
