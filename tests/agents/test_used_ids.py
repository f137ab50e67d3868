"""The id of what was deleted is never used again."""

import json
import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest
from django.core.management import call_command
from django.db import connection, transaction
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from redis import Redis
from rest_framework.test import APIClient

from agents import inbox, retention
from agents.events import stream
from agents.models import DeletedRun, Event, Run
from agents.runs import execution
from agents.usage import rollups
from agents.worker.consumer import Consumer
from chat.models import DeletedThread, Message, Thread
from realm.models import User
from tests import factories
from tests.agents.conftest import Broker
from tests.agents.test_runtime import add, dead, entries, request

pytestmark = pytest.mark.django_db


@pytest.fixture
def alice() -> User:
    return factories.user("alice")


def by_api(run: Run) -> None:
    client = APIClient()
    client.force_authenticate(run.thread.owner)
    assert client.delete(f"/api/chat/threads/{run.thread_id}").status_code == 204


def by_page(run: Run) -> None:
    client = APIClient()
    assert run.thread.owner is not None
    client.force_login(run.thread.owner)
    assert client.post(f"/threads/{run.thread_id}/delete").status_code == 302


def by_row(run: Run) -> None:
    run.thread.delete()


def by_rows(run: Run) -> None:
    Thread.objects.all().delete()


def by_retention(run: Run) -> None:
    retention.settings.RETENTION_THREADS_DAYS = 1  # put back by the fixture
    execution.execute(run.pk)
    Event.objects.update(published_at=timezone.now())
    rollups.fold()
    long_ago = timezone.now() - timedelta(days=3)
    Thread.objects.update(created_at=long_ago, updated_at=long_ago)
    call_command("prune")


WAYS = [by_api, by_page, by_row, by_rows, by_retention]


def asked(client: APIClient, thread_id: str) -> Any:
    body = {"content": "Again", "threadId": thread_id}
    return client.post("/api/chat/messages", body, format="json")


def asked_in_a_document(client: APIClient, thread_id: str) -> Any:
    thread = {"data": {"type": "threads", "id": thread_id}}
    document = {
        "type": "messages",
        "attributes": {"content": "Again"},
        "relationships": {"thread": thread},
    }
    return client.generic(
        "POST",
        "/api/messages",
        json.dumps({"data": document}),
        content_type="application/vnd.api+json",
    )


@pytest.mark.parametrize("delete", WAYS)
def test_its_owner_is_told_and_others_are_not(
    alice: User, settings: Any, delete: Callable[[Run], None]
) -> None:
    settings.RETENTION_THREADS_DAYS = 0
    run = factories.ask(owner=alice, thread_id="support")
    delete(run)
    assert not Thread.objects.exists()
    hers, his = APIClient(), APIClient()
    hers.force_authenticate(alice)
    his.force_authenticate(factories.user("bob"))

    again, stranger = asked(hers, "support"), asked(his, "support")

    assert again.status_code == 409
    assert again.json()["code"] == "id_deleted"
    assert "support" in again.json()["error"]
    assert stranger.status_code == 404
    document = asked_in_a_document(hers, "support")
    assert document.status_code == 409
    assert document.json()["errors"][0]["source"] == {
        "pointer": "/data/relationships/thread/data/id"
    }
    assert asked_in_a_document(his, "support").status_code == 404
    # As for a thread that is there and not theirs.
    factories.ask(owner=alice, thread_id="other")
    assert asked(his, "other").json()["error"] == stranger.json()["error"].replace(
        "support", "other"
    )
    assert not Message.objects.filter(content="Again").exists()
    assert Thread.objects.count() == 1


def test_it_stays_used_when_its_owner_is_gone(alice: User) -> None:
    factories.ask(owner=alice, thread_id="support")
    alice.delete()
    client = APIClient()
    client.force_authenticate(factories.user("bob"))
    assert asked(client, "support").status_code == 404


def test_threads_of_anonymous_callers_were_open_to_all(settings: Any, api: APIClient) -> None:
    settings.CHAT_ALLOW_ANONYMOUS = True
    factories.ask(thread_id="support").thread.delete()
    assert asked(api, "support").status_code == 409
    settings.CHAT_ALLOW_ANONYMOUS = False
    api.force_authenticate(factories.user("bob"))
    assert asked(api, "support").status_code == 404


def test_a_new_id_costs_no_query_where_the_server_chooses_it(
    alice: User,
) -> None:
    with CaptureQueriesContext(connection) as queries:
        factories.ask(owner=alice)
    assert not [query for query in queries if "deleted" in query["sql"]]
    factories.ask(owner=alice, thread_id="support")
    with CaptureQueriesContext(connection) as queries:
        factories.ask(owner=alice, thread_id="support")
    assert not [query for query in queries if "deleted" in query["sql"]]


@pytest.mark.django_db(transaction=True)
def test_it_cannot_be_begun_beside_its_deletion(alice: User) -> None:
    """Whoever begins it waits for the deletion, and finds the tombstone."""
    thread = factories.ask(owner=alice, thread_id="support").thread
    deleted, refused = threading.Event(), []

    def begin() -> None:
        try:
            deleted.wait(60)
            factories.ask("Again", owner=alice, thread_id="support", threads=Thread.objects.all())
        except inbox.Refused as error:
            refused.append(error)
        finally:
            connection.close()

    beginning = threading.Thread(target=begin)
    beginning.start()
    with transaction.atomic():
        thread.delete()
        deleted.set()
        beginning.join(0.5)
        assert beginning.is_alive() or refused == []
    beginning.join(60)
    assert [type(error) for error in refused] == [inbox.Deleted]
    assert not Thread.objects.exists()


@pytest.mark.django_db(transaction=True)
def test_many_that_delete_and_begin_at_once_never_bring_it_back(alice: User) -> None:
    """Of the words that were said before a deletion none are in the thread that comes after."""
    failures: list[BaseException] = []
    names = [f"support-{number}" for number in range(6)]
    for name in names:
        factories.ask("first", owner=alice, thread_id=name)
    together = threading.Barrier(4)

    def work(step: Callable[[str], object]) -> None:
        try:
            for name in names:
                together.wait(60)
                with suppress(inbox.Refused, Run.DoesNotExist, Thread.DoesNotExist):
                    step(name)
        except Exception as error:
            failures.append(error)
        finally:
            connection.close()

    def begin(name: str) -> None:
        factories.ask("second", owner=alice, thread_id=name)

    def delete(name: str) -> None:
        retention.delete_thread(Thread.objects.get(pk=name))

    workers = [threading.Thread(target=work, args=[step]) for step in (begin, delete) * 2]
    for each in workers:
        each.start()
    for each in workers:
        each.join(120)
    assert failures == []
    assert set(DeletedThread.objects.values_list("pk", flat=True)) == set(names)
    assert not Thread.objects.exists()


@pytest.mark.django_db(transaction=True)
class TestOnTheStream:
    def test_a_program_cannot_begin_a_deleted_thread(
        self, redis: Redis, broker: Broker, alice: User
    ) -> None:
        factories.ask(owner=alice, thread_id="support").thread.delete()
        redis.delete("agent_events")
        add(redis, request(runId="new-run", threadId="support"))
        stream.ensure_group()
        Consumer("w1").read()
        assert "deleted" in dead(redis)[0]
        assert not Run.objects.exists()

    def test_nor_give_a_run_the_id_of_a_deleted_one(
        self, redis: Redis, broker: Broker, alice: User
    ) -> None:
        run = factories.ask(owner=alice)
        run.thread.delete()
        assert DeletedRun.objects.filter(pk=run.pk).exists()
        redis.delete("agent_events")
        add(redis, request(runId=run.pk, threadId="another"))
        stream.ensure_group()
        Consumer("w1").read()
        assert not Run.objects.exists()
        assert not Thread.objects.exists()

    def test_the_request_of_a_deleted_run_asks_nothing_when_it_is_read_late(
        self, redis: Redis, broker: Broker, alice: User
    ) -> None:
        run = factories.ask("A secret", owner=alice)
        assert len(entries(redis)) == 1
        retention.delete_thread(run.thread)
        stream.ensure_group()
        Consumer("w1").read()
        assert not Run.objects.exists()
        # Nor is what was said kept among the entries that were of no use.
        assert dead(redis) == []

    def test_a_repeat_by_its_key_tells_nothing_of_another_run_with_that_id(
        self, alice: User, api: APIClient
    ) -> None:
        api.force_authenticate(alice)
        key = {"HTTP_IDEMPOTENCY_KEY": "1", "HTTP_PREFER": "wait=1"}
        first = api.post("/api/chat/messages", {"content": "Hi"}, format="json", **key).json()
        Thread.objects.all().delete()
        DeletedRun.objects.all().delete()
        his = factories.ask(
            owner=factories.user("bob"), run_id=first["runId"], event_id=uuid.uuid4()
        )
        execution.execute(his.pk)
        again = api.post("/api/chat/messages", {"content": "Hi"}, format="json", **key)
        assert again.status_code == 202
        assert "run" not in again.json()
