"""How fast one user or one room may ask, and how many of their runs may wait."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import Mock

import orjson
import pytest
from django.db import connection, connections
from django.test.utils import CaptureQueriesContext
from rest_framework.test import APIClient

from agents import inbox
from agents.models import Limit, Pace, Run
from agents.runs import actions, execution
from agents.usage import limits
from chat.models import Message
from tests import factories

pytestmark = pytest.mark.django_db
URL = "/api/chat/messages"


def statements(ask: Callable[[], Any]) -> list[str]:
    with CaptureQueriesContext(connection) as queries:
        ask()
    return [query["sql"] for query in queries]


def accepted(ask: Callable[[], Any], times: int) -> int:
    """How many of so many at once were accepted."""

    def one(_: int) -> bool:
        try:
            ask()
        except inbox.Limited:
            return False
        finally:
            connections.close_all()
        return True

    with ThreadPoolExecutor(times) as pool:
        return sum(pool.map(one, range(times)))


def let_pass(seconds: float) -> None:
    """As if all had asked so much earlier."""
    for pace in Pace.objects.all():
        pace.free_at -= int(seconds * limits.SECOND)
        pace.save()


def test_whoever_asks_too_fast_is_told_when_to_come_back(
    api: APIClient, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged = Mock()
    monkeypatch.setattr(inbox, "log_info", logged)
    settings.LIMIT_USER_MESSAGES_PER_MINUTE = 3
    said = [api.post(URL, {"content": "Hello"}, format="json") for _ in range(4)]
    assert [each.status_code for each in said] == [202, 202, 202, 429]
    refused = said[-1]
    assert 1 <= int(refused["Retry-After"]) <= 20
    assert refused.json()["code"] == "rate_limited"
    assert "You may send 3 messages a minute." in refused.json()["error"]
    assert "LIMIT_USER" not in refused.json()["error"]
    assert f"Try again in {refused['Retry-After']} s." in refused.json()["error"]
    assert logged.call_args.kwargs["setting"] == "LIMIT_USER_MESSAGES_PER_MINUTE"
    assert (Run.objects.count(), Message.objects.count()) == (3, 3)


def test_one_more_may_be_asked_when_its_share_of_the_minute_has_passed(settings: Any) -> None:
    settings.LIMIT_USER_MESSAGES_PER_MINUTE = 3
    for _ in range(3):
        factories.ask()
    let_pass(20)
    factories.ask()
    with pytest.raises(inbox.Limited) as refused:
        factories.ask()
    assert 1 <= refused.value.retry_after <= 20


def test_as_json_api_the_refusal_is_an_error_document(api: APIClient, settings: Any) -> None:
    settings.LIMIT_USER_MESSAGES_PER_MINUTE = 1
    document = {"data": {"type": "messages", "attributes": {"content": "Hello"}}}

    said = [
        api.post("/api/messages", orjson.dumps(document), content_type="application/vnd.api+json")
        for _ in range(2)
    ]
    assert [each.status_code for each in said] == [201, 429]
    [error] = said[1].json()["errors"]
    assert (error["status"], error["code"]) == ("429", "rate_limited")
    assert 1 <= int(said[1]["Retry-After"]) <= 60


def test_the_chat_page_says_it_and_keeps_the_words(client: Any, settings: Any) -> None:
    settings.LIMIT_USER_MESSAGES_PER_MINUTE = 1
    assert client.post("/", {"content": "one"}).status_code == 302
    page = client.post("/", {"content": "my second one"})
    assert page.status_code == 429
    assert int(page["Retry-After"]) >= 1
    assert "my second one" in page.content.decode()
    assert "You may send 1 message a minute." in page.content.decode()


def test_a_repeat_with_its_key_counts_for_nothing(api: APIClient, settings: Any) -> None:
    settings.LIMIT_USER_MESSAGES_PER_MINUTE = 1
    said = [
        api.post(URL, {"content": "Hello"}, format="json", HTTP_IDEMPOTENCY_KEY="a")
        for _ in range(3)
    ]
    assert [each.status_code for each in said] == [202, 202, 202]


def test_each_user_has_a_limit_of_its_own(settings: Any) -> None:
    settings.LIMIT_USER_MESSAGES_PER_MINUTE = 1
    alice, bob = factories.user("alice"), factories.user("bob")
    for owner in (alice, bob, None):
        factories.ask(owner=owner)
    with pytest.raises(inbox.Limited):
        factories.ask(owner=alice)


def test_who_asks_in_a_room_and_over_http_has_one_limit(settings: Any) -> None:
    settings.LIMIT_USER_MESSAGES_PER_MINUTE = 1
    factories.ask(requester="@alice:localhost", place="!room", source=Run.Source.MATRIX)
    with pytest.raises(inbox.Limited):
        factories.ask(owner=factories.user("alice"))


def test_a_room_has_a_limit_whoever_asks_there(settings: Any) -> None:
    settings.LIMIT_ROOM_MESSAGES_PER_MINUTE = 2
    for name in ("alice", "bob"):
        factories.ask(requester=f"@{name}:localhost", place="!room")
    with pytest.raises(inbox.Limited, match="This room may send 2 messages a minute"):
        factories.ask(requester="@carol:localhost", place="!room")
    factories.ask(requester="@carol:localhost", place="!other")


class TestWaiting:
    def test_no_more_runs_wait_than_may(self, api: APIClient, settings: Any) -> None:
        settings.LIMIT_USER_RUNS_UNFINISHED = 2
        said = [api.post(URL, {"content": "Hello"}, format="json") for _ in range(3)]
        assert [each.status_code for each in said] == [202, 202, 429]
        assert said[-1].json()["code"] == "too_many_waiting"
        assert "You have 2 messages waiting" in said[-1].json()["error"]
        assert int(said[-1]["Retry-After"]) >= 1

    @pytest.mark.parametrize("end", [actions.cancel, lambda run: execution.execute(run.pk)])
    def test_one_that_has_ended_makes_room_for_another(
        self, settings: Any, end: Callable[[Run], Any]
    ) -> None:
        settings.LIMIT_USER_RUNS_UNFINISHED = 2
        first, _ = factories.ask(), factories.ask()
        end(first)
        factories.ask()
        with pytest.raises(inbox.Limited):
            factories.ask()

    def test_one_that_is_being_worked_on_waits_too(self, settings: Any) -> None:
        settings.LIMIT_USER_RUNS_UNFINISHED = 1
        execution.claim(factories.ask().pk)
        with pytest.raises(inbox.Limited):
            factories.ask()

    def test_those_of_a_room_are_counted_together(self, settings: Any) -> None:
        settings.LIMIT_ROOM_RUNS_UNFINISHED = 2
        for name in ("alice", "bob"):
            factories.ask(requester=name, place="!room")
        with pytest.raises(inbox.Limited, match="This room has 2 messages waiting"):
            factories.ask(requester="carol", place="!room")

    def test_those_from_before_somebody_was_forgotten_still_count(self, settings: Any) -> None:
        settings.LIMIT_USER_RUNS_UNFINISHED = 1
        factories.ask()
        let_pass(2 * 86400)
        limits.forget()
        assert not Pace.objects.exists()
        with pytest.raises(inbox.Limited):
            factories.ask()


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize(
    "name",
    ["LIMIT_USER_RUNS_UNFINISHED", "LIMIT_USER_MESSAGES_PER_MINUTE"],
    ids=["waiting", "rate"],
)
def test_of_many_at_once_exactly_so_many_are_accepted_as_may(settings: Any, name: str) -> None:
    # At this rate the next may be asked after half a minute.
    setattr(settings, name, 2)
    assert accepted(factories.ask, times=25) == 2
    assert Run.objects.count() == 2


@pytest.mark.django_db(transaction=True)
def test_many_at_once_stay_within_what_is_left(settings: Any) -> None:
    settings.LIMIT_USER_RUNS_UNFINISHED = 12
    first = [factories.ask() for _ in range(10)]
    for run in first[:4]:
        actions.cancel(run)
    assert accepted(factories.ask, times=20) == 6
    assert Run.objects.unfinished().count() == 12


class TestOverrides:
    def override(self, **columns: Any) -> None:
        Limit.objects.create(**columns)
        limits.limit_list.reset()

    def test_an_admins_word_holds_in_the_place_of_the_setting(self, settings: Any) -> None:
        settings.LIMIT_USER_MESSAGES_PER_MINUTE = 1
        self.override(kind="user", name="@alice:localhost", messages_per_minute=2)
        alice = factories.user("alice")
        for _ in range(2):
            factories.ask(owner=alice)
        with pytest.raises(inbox.Limited, match="2 messages a minute"):
            factories.ask(owner=alice)

    def test_nought_takes_a_limit_away(self, settings: Any) -> None:
        settings.LIMIT_USER_RUNS_UNFINISHED = 1
        self.override(kind="user", name=limits.ANONYMOUS, runs_unfinished=0)
        for _ in range(3):
            factories.ask()

    def test_what_it_leaves_empty_is_as_the_setting(self, settings: Any) -> None:
        settings.LIMIT_USER_RUNS_UNFINISHED = 1
        self.override(kind="user", name=limits.ANONYMOUS, messages_per_minute=100)
        factories.ask()
        with pytest.raises(inbox.Limited):
            factories.ask()


class TestCost:
    def test_without_limits_the_database_is_asked_nothing_more(self, settings: Any) -> None:
        factories.ask()
        asked = statements(factories.ask)
        assert not [each for each in asked if "pace" in each or "limit" in each.split("WHERE")[0]]

    def test_with_both_limits_it_is_one_statement(self, settings: Any) -> None:
        factories.ask()
        before = len(statements(factories.ask))
        settings.LIMIT_USER_MESSAGES_PER_MINUTE = settings.LIMIT_USER_RUNS_UNFINISHED = 100
        factories.ask()
        assert len(statements(factories.ask)) == before + 1


def test_asking_again_counts_as_a_question(api: APIClient, client: Any, settings: Any) -> None:
    run = factories.ask()
    actions.cancel(run)
    settings.LIMIT_USER_MESSAGES_PER_MINUTE = 1
    factories.ask()
    said = api.post(f"/api/chat/runs/{run.pk}/retry")
    assert (said.status_code, said.json()["code"]) == (429, "rate_limited")
    assert client.post(f"/runs/{run.pk}/retry").status_code == 429
    run.refresh_from_db()
    assert run.status == "cancelled"
    let_pass(60)
    assert api.post(f"/api/chat/runs/{run.pk}/retry").status_code == 202
    with pytest.raises(inbox.Limited):
        factories.ask()
