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
    return [told["id"] for told in response.json()["threads"]]


INDEXES = {"thread_of_owner", "thread_active_of_owner"}


class TestList:
    def test_the_last_asked_in_comes_first(self, mine: APIClient, alice: User) -> None:
        older, newer = thread(alice, minutes_ago=2), thread(alice, minutes_ago=1)
        assert ids(mine.get(URL)) == [newer.pk, older.pk]

        factories.ask("More", thread_id=older.pk)
        assert ids(mine.get(URL)) == [older.pk, newer.pk]

    def test_what_is_told_of_one(self, mine: APIClient, alice: User) -> None:
        first = thread(alice, content="Why is the sky blue? " * 10)
        told = mine.get(URL).json()

        assert told["ok"] is True
        assert told["next"] is None
        [one] = told["threads"]
        assert one == mine.get(f"{URL}/{first.pk}").json()["thread"]
        assert (one["id"], one["title"], one["archived"]) == (first.pk, "", False)
        assert one["preview"] == ("Why is the sky blue? " * 10)[:100]
        assert one["updatedAt"].endswith("Z")

    def test_page_after_page_brings_each_once(self, mine: APIClient, alice: User) -> None:
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

    def test_others_threads_are_not_in_it(self, mine: APIClient, alice: User) -> None:
        own = thread(alice)
        thread(factories.user("charlie"))
        thread(None)
        assert ids(mine.get(URL)) == [own.pk]

    def test_nobody_sees_nobodys(self, api: APIClient, alice: User) -> None:
        thread(alice)
        free = thread(None)
        assert ids(api.get(URL)) == [free.pk]

    def test_nobody_is_turned_away_where_nobody_may_chat(
        self, api: APIClient, settings: Any
    ) -> None:
        settings.CHAT_ALLOW_ANONYMOUS = False
        assert api.get(URL).status_code == 401

    @pytest.mark.parametrize(
        "query", [{"limit": "0"}, {"limit": "many"}, {"archived": "yes"}, {"archived": ""}]
    )
    def test_what_makes_no_sense_is_said(self, api: APIClient, query: dict[str, str]) -> None:
        assert api.get(URL, query).status_code == 400

    def test_anothers_thread_is_no_place_to_go_on_from(self, mine: APIClient) -> None:
        theirs = thread(factories.user("charlie"))
        assert mine.get(URL, {"before": theirs.pk}).status_code == 404

    def test_as_many_queries_for_many_as_for_few(
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
    def test_it_is_read_along_an_index(self, alice: User, whose: str) -> None:
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
    def test_a_title_is_given_and_taken_away(self, mine: APIClient, alice: User) -> None:
        url = f"{URL}/{thread(alice, minutes_ago=5).pk}"
        before = mine.get(url).json()["thread"]["updatedAt"]

        told = mine.patch(url, {"title": "  The sky  "}, format="json")
        assert told.status_code == 200
        assert told.json()["thread"]["title"] == "The sky"
        # It is no activity.
        assert told.json()["thread"]["updatedAt"] == before
        assert mine.patch(url, {"title": ""}, format="json").json()["thread"]["title"] == ""

    def test_an_archived_one_leaves_the_list_and_comes_back(
        self, mine: APIClient, alice: User
    ) -> None:
        first, second = thread(alice, minutes_ago=2), thread(alice, minutes_ago=1)
        url = f"{URL}/{first.pk}"
        assert mine.patch(url, {"archived": True}, format="json").json()["thread"]["archived"]
        assert ids(mine.get(URL)) == [second.pk]
        assert ids(mine.get(URL, {"archived": "true"})) == [second.pk, first.pk]

        assert not mine.patch(url, {"archived": False}, format="json").json()["thread"]["archived"]
        assert ids(mine.get(URL)) == [second.pk, first.pk]

    def test_it_stays_archived_since_the_first_time(self, mine: APIClient, alice: User) -> None:
        first = thread(alice)
        url = f"{URL}/{first.pk}"
        mine.patch(url, {"archived": True}, format="json")
        first.refresh_from_db()
        since = first.archived_at
        mine.patch(url, {"archived": True, "title": "Old"}, format="json")
        first.refresh_from_db()
        assert (first.archived_at, first.title) == (since, "Old")

    def test_a_question_takes_it_out_of_the_archive(self, mine: APIClient, alice: User) -> None:
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
    def test_what_is_wrong_changes_nothing(self, mine: APIClient, alice: User, body: Any) -> None:
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
    def test_it_goes_with_all_that_was_said(self, mine: APIClient, alice: User) -> None:
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

    def test_what_it_took_stays_in_the_figures(self, alice: User) -> None:
        done = factories.ask(owner=alice)
        execution.execute(done.pk)
        factories.ask("Another", thread_id=done.thread_id)
        retention.delete_thread(done.thread)

        assert not Attempt.objects.exists()
        assert not Event.objects.exists()
        [usage] = Usage.objects.all()
        assert (usage.user, usage.runs) == (alice.username, 2)

    @pytest.mark.django_db(transaction=True)
    def test_what_goes_on_in_it_is_cancelled_and_told_so(self, redis: Any, settings: Any) -> None:
        held = execution.claim(factories.ask("one").pk)
        assert held
        waiting = factories.ask("two", thread_id=held.thread_id)
        retention.delete_thread(held.thread)

        told = [entry[b"event"] for _, entry in redis.xrange(settings.REDIS_STREAM_KEY)]
        for run in (held, waiting):
            cancelled = [e for e in told if b"agent.run.cancelled" in e and run.pk.encode() in e]
            assert len(cancelled) == 1

    def test_whoever_works_on_it_writes_nothing_and_goes_on(self, caplog: Any) -> None:
        held = execution.claim(factories.ask().pk)
        assert held
        retention.delete_thread(held.thread)

        assert not outcomes.complete(held, "late", outcomes.EMPTY)
        assert not outcomes.record_partial(held, outcomes.EMPTY)
        assert execution.claim(held.pk) is None
        assert memory.summarise(held.thread_id) is None
        assert not Message.objects.exists()

    def test_a_worker_that_was_about_to_begin_gives_up(self, monkeypatch: Any, caplog: Any) -> None:
        run = factories.ask()
        carry_out = execution.commands.execute

        def deleted_first(run: Run, **options: Any) -> str:
            retention.delete_thread(run.thread)
            return carry_out(run, **options)

        monkeypatch.setattr(execution.commands, "execute", deleted_first)
        assert execution.execute(run.pk) is None
        assert "unexpectedly" not in caplog.text

    @pytest.mark.django_db(transaction=True)
    def test_questions_that_come_at_the_same_time_are_asked_before_it_or_refused(self) -> None:
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

    def test_a_cancelled_run_begins_anew(self, mine: APIClient, alice: User) -> None:
        run = factories.ask(owner=alice)
        actions.cancel(run)
        response = self.retry(mine, run)
        assert response.status_code == 202
        told = response.json()
        assert (told["ok"], told["run"]["id"], told["run"]["status"]) == (True, run.pk, "queued")
        assert execution.claim(run.pk)

    def test_one_that_goes_on_or_was_answered_does_not(self, mine: APIClient, alice: User) -> None:
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
