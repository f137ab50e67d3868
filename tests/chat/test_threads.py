"""The list of threads, what their owner may change, and how they go."""

import threading
from datetime import timedelta
from typing import Any

import pytest
from django.db import connection
from django.utils import timezone
from rest_framework.test import APIClient

from agents import inbox, retention
from agents.inbox import WhenBusy
from agents.models import Attempt, Event, Run, Usage
from agents.runs import actions, execution, memory, outcomes
from chat.models import Message, Thread
from realm.models import User
from tests import factories
from tests.chat.asgi_client import go, request
from tests.plans import explain

URL = "/api/chat/threads"
pytestmark = pytest.mark.django_db


@pytest.fixture
def alice() -> User:
    return factories.user("alice")


@pytest.fixture
def mine(api: APIClient, alice: User) -> APIClient:
    api.force_authenticate(alice)
    return api


def thread(owner: User | None, *, minutes_ago: int = 0, content: str = "Hello") -> Thread:
    run = factories.ask(content, owner=owner)
    asked = timezone.now() - timedelta(minutes=minutes_ago)
    Thread.objects.filter(pk=run.thread_id).update(updated_at=asked)
    return Thread.objects.get(pk=run.thread_id)


def ids(response: Any) -> list[str]:
    return [data["id"] for data in response.json()["threads"]]


INDEXES = {"thread_of_owner", "thread_active_of_owner"}


class TestList:
    def test_most_recent_thread_comes_first(self, mine: APIClient, alice: User) -> None:
        older, newer = thread(alice, minutes_ago=2), thread(alice, minutes_ago=1)
        assert ids(mine.get(URL)) == [newer.pk, older.pk]

        factories.ask("More", thread_id=older.pk)
        assert ids(mine.get(URL)) == [older.pk, newer.pk]

    def test_fields_of_a_thread(self, mine: APIClient, alice: User) -> None:
        first = thread(alice, content="Why is the sky blue? " * 10)
        data = mine.get(URL).json()

        assert data["ok"] is True
        assert data["next"] is None
        [one] = data["threads"]
        assert one == mine.get(f"{URL}/{first.pk}").json()["thread"]
        assert (one["id"], one["title"], one["archived"]) == (first.pk, "", False)
        assert one["preview"] == ("Why is the sky blue? " * 10)[:100]
        assert one["updatedAt"].endswith("Z")

    def test_pages_return_each_thread_once(self, mine: APIClient, alice: User) -> None:
        at = timezone.now()
        made = [Thread.objects.create(owner=alice) for _ in range(5)]
        # Of the same moment, three of them.
        Thread.objects.filter(pk__in=[one.pk for one in made[:3]]).update(updated_at=at)

        found: list[str] = []
        page = mine.get(URL, {"limit": 2}).json()
        while page["next"]:
            assert len(page["threads"]) == 2
            found += [one["id"] for one in page["threads"]]
            page = mine.get(URL, {"limit": 2, "before": page["next"]}).json()
        found += [one["id"] for one in page["threads"]]

        assert len(found) == 5
        assert set(found) == {one.pk for one in made}

    def test_threads_of_others_are_not_listed(self, mine: APIClient, alice: User) -> None:
        own = thread(alice)
        thread(factories.user("charlie"))
        thread(None)
        assert ids(mine.get(URL)) == [own.pk]

    def test_anonymous_callers_list_anonymous_threads(self, api: APIClient, alice: User) -> None:
        thread(alice)
        free = thread(None)
        assert ids(api.get(URL)) == [free.pk]

    def test_anonymous_callers_are_rejected_if_not_allowed(
        self, api: APIClient, settings: Any
    ) -> None:
        settings.CHAT_ALLOW_ANONYMOUS = False
        assert api.get(URL).status_code == 401

    @pytest.mark.parametrize(
        "query", [{"limit": "0"}, {"limit": "many"}, {"archived": "yes"}, {"archived": ""}]
    )
    def test_invalid_query_is_rejected(self, api: APIClient, query: dict[str, str]) -> None:
        assert api.get(URL, query).status_code == 400

    def test_thread_of_another_is_no_cursor(self, mine: APIClient) -> None:
        theirs = thread(factories.user("charlie"))
        assert mine.get(URL, {"before": theirs.pk}).status_code == 404

    def test_queries_do_not_grow_with_threads(
        self, mine: APIClient, alice: User, django_assert_num_queries: Any
    ) -> None:
        for _ in range(3):
            thread(alice)
        with django_assert_num_queries(1):
            mine.get(URL)
        for _ in range(9):
            thread(alice)
        with django_assert_num_queries(1):
            mine.get(URL)

    @pytest.mark.parametrize("whose", ["hers", "nobodys"])
    def test_list_uses_an_index(self, alice: User, whose: str) -> None:
        for owner in (alice, None):
            Thread.objects.bulk_create(Thread(owner=owner) for _ in range(300))
        with connection.cursor() as cursor:
            cursor.execute("ANALYZE")
        edge = Thread.objects.create(owner=alice if whose == "hers" else None)
        found = Thread.objects.listed_for(edge.owner).before(edge)

        for rows, index in (
            (found, "thread_of_owner"),
            (found.active(), "thread_active_of_owner"),
        ):
            plan = explain(rows[:50])
            # Where nothing is archived they are alike, and PostgreSQL takes the one or the other.
            usable = {index} if connection.vendor == "sqlite" else INDEXES
            assert any(name in plan for name in usable), plan
            assert "TEMP B-TREE" not in plan, plan


class TestChange:
    def test_title_is_set_and_cleared(self, mine: APIClient, alice: User) -> None:
        url = f"{URL}/{thread(alice, minutes_ago=5).pk}"
        before = mine.get(url).json()["thread"]["updatedAt"]

        data = mine.patch(url, {"title": "  The sky  "}, format="json")
        assert data.status_code == 200
        assert data.json()["thread"]["title"] == "The sky"
        # It is no activity.
        assert data.json()["thread"]["updatedAt"] == before
        assert mine.patch(url, {"title": ""}, format="json").json()["thread"]["title"] == ""

    def test_archived_thread_leaves_the_list_and_returns(
        self, mine: APIClient, alice: User
    ) -> None:
        first, second = thread(alice, minutes_ago=2), thread(alice, minutes_ago=1)
        url = f"{URL}/{first.pk}"
        assert mine.patch(url, {"archived": True}, format="json").json()["thread"]["archived"]
        assert ids(mine.get(URL)) == [second.pk]
        assert ids(mine.get(URL, {"archived": "true"})) == [second.pk, first.pk]

        assert not mine.patch(url, {"archived": False}, format="json").json()["thread"]["archived"]
        assert ids(mine.get(URL)) == [second.pk, first.pk]

    def test_archiving_twice_keeps_the_time(self, mine: APIClient, alice: User) -> None:
        first = thread(alice)
        url = f"{URL}/{first.pk}"
        mine.patch(url, {"archived": True}, format="json")
        first.refresh_from_db()
        since = first.archived_at
        mine.patch(url, {"archived": True, "title": "Old"}, format="json")
        first.refresh_from_db()
        assert (first.archived_at, first.title) == (since, "Old")

    def test_message_unarchives_the_thread(self, mine: APIClient, alice: User) -> None:
        first = thread(alice)
        mine.patch(f"{URL}/{first.pk}", {"archived": True}, format="json")
        factories.ask("Are you there?", thread_id=first.pk)
        assert ids(mine.get(URL)) == [first.pk]

    @pytest.mark.parametrize(
        "body",
        [
            {"title": None},
            {"title": 5},
            {"title": "t" * 201},
            {"archived": "true"},
            {"archived": 1},
            {"archived": None},
            [],
        ],
    )
    def test_invalid_change_is_rejected(self, mine: APIClient, alice: User, body: Any) -> None:
        first = thread(alice)
        response = mine.patch(f"{URL}/{first.pk}", body, format="json")
        assert response.status_code == 400
        assert response.json()["ok"] is False
        first.refresh_from_db()
        assert (first.title, first.archived_at) == ("", None)

    @pytest.mark.parametrize("method", ["get", "patch", "delete"])
    def test_anothers_does_not_exist(self, mine: APIClient, method: str) -> None:
        theirs = thread(factories.user("charlie"))
        for pk in (theirs.pk, "thr_none"):
            assert getattr(mine, method)(f"{URL}/{pk}").status_code == 404
        assert Thread.objects.filter(pk=theirs.pk).exists()


class TestDelete:
    @pytest.mark.django_db(transaction=True)
    def test_deletion_is_answered_without_a_body(self, redis: Any, settings: Any) -> None:
        """By the web server: Django's test client removes the body of a 204."""
        settings.CHAT_ALLOW_ANONYMOUS = True
        run = factories.ask()

        async def scene() -> None:
            async with request(f"{URL}/{run.thread_id}", "DELETE") as response:
                await response.end()
                assert (response.status, response.body) == (204, b"")

        go(scene())

    def test_deletion_removes_messages_and_runs(self, mine: APIClient, alice: User) -> None:
        merged = factories.ask(owner=alice)
        run = factories.ask(
            "And?", owner=alice, thread_id=merged.thread_id, when_busy=WhenBusy.MERGE
        )
        execution.execute(run.pk)
        kept = thread(alice)

        response = mine.delete(f"{URL}/{run.thread_id}")
        assert (response.status_code, response.content) == (204, b"")
        assert mine.get(f"{URL}/{run.thread_id}").status_code == 404
        assert mine.get(f"/api/chat/runs/{run.pk}").status_code == 404
        assert mine.delete(f"{URL}/{run.thread_id}").status_code == 404
        assert Thread.objects.get() == kept
        assert set(Message.objects.values_list("thread", flat=True)) == {kept.pk}

    def test_usage_survives_the_deletion(self, alice: User) -> None:
        done = factories.ask(owner=alice)
        execution.execute(done.pk)
        factories.ask("Another", thread_id=done.thread_id)
        retention.delete_thread(done.thread)

        assert not Attempt.objects.exists()
        assert not Event.objects.exists()
        [usage] = Usage.objects.all()
        assert (usage.user, usage.runs) == (alice.username, 2)

    @pytest.mark.django_db(transaction=True)
    def test_deletion_cancels_unfinished_runs(self, redis: Any, settings: Any) -> None:
        held = execution.claim(factories.ask("one").pk)
        assert held
        waiting = factories.ask("two", thread_id=held.thread_id)
        retention.delete_thread(held.thread)

        data = [entry[b"event"] for _, entry in redis.xrange(settings.REDIS_STREAM_KEY)]
        for run in (held, waiting):
            cancelled = [e for e in data if b"agent.run.cancelled" in e and run.pk.encode() in e]
            assert len(cancelled) == 1

    def test_worker_discards_the_result_of_a_deleted_run(self, caplog: Any) -> None:
        held = execution.claim(factories.ask().pk)
        assert held
        retention.delete_thread(held.thread)

        assert not outcomes.complete(held, "late", outcomes.EMPTY)
        assert not outcomes.record_partial(held, outcomes.EMPTY)
        assert execution.claim(held.pk) is None
        assert memory.summarise(held.thread_id) is None
        assert not Message.objects.exists()

    def test_worker_skips_a_deleted_run(self, monkeypatch: Any, caplog: Any) -> None:
        run = factories.ask()
        carry_out = execution.commands.execute

        def deleted_first(run: Run, **options: Any) -> str:
            retention.delete_thread(run.thread)
            return carry_out(run, **options)

        monkeypatch.setattr(execution.commands, "execute", deleted_first)
        assert execution.execute(run.pk) is None
        assert "unexpectedly" not in caplog.text

    @pytest.mark.django_db(transaction=True)
    def test_concurrent_messages_are_accepted_before_deletion_or_rejected(self) -> None:
        thread = factories.ask(thread_id="busy").thread
        failures: list[BaseException] = []

        def ask() -> None:
            try:
                for number in range(5):
                    factories.ask(f"q{number}", thread_id="busy")
            except Exception as error:
                failures.append(error)
            finally:
                connection.close()

        asking = threading.Thread(target=ask)
        asking.start()
        retention.delete_thread(thread)
        asking.join()

        gone = (Run.DoesNotExist, inbox.Deleted)
        assert [error for error in failures if not isinstance(error, gone)] == []
        assert not Thread.objects.exists()


class TestRetry:
    def retry(self, api: APIClient, run: Run) -> Any:
        return api.post(f"/api/chat/runs/{run.pk}/retry")

    def test_cancelled_run_is_retried(self, mine: APIClient, alice: User) -> None:
        run = factories.ask(owner=alice)
        actions.cancel(run)
        response = self.retry(mine, run)
        assert response.status_code == 202
        data = response.json()
        assert (data["ok"], data["run"]["id"], data["run"]["status"]) == (True, run.pk, "queued")
        assert execution.claim(run.pk)

    def test_unfinished_or_completed_run_is_not_retried(self, mine: APIClient, alice: User) -> None:
        run = factories.ask(owner=alice)
        response = self.retry(mine, run)
        assert response.status_code == 409
        assert response.json() == {
            "ok": False,
            "error": "The run has not ended yet: it is queued.",
        }
        execution.execute(run.pk)
        assert self.retry(mine, run).json()["error"] == "The run has been answered."

    def test_anothers_does_not_exist(self, mine: APIClient) -> None:
        run = factories.ask(owner=factories.user("charlie"))
        actions.cancel(run)
        assert self.retry(mine, run).status_code == 404
        run.refresh_from_db()
        assert run.status == Run.Status.CANCELLED
