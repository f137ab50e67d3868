"""How long a message may be, and how much one user and one room may send on a day."""

import json
import threading
from typing import Any

import pytest
from django.db import connection
from rest_framework.test import APIClient

from agents import inbox
from agents.models import Limit, Pace, Run
from agents.runs import actions
from agents.usage import limits
from tests import factories

URL = "/api/chat/messages"
pytestmark = pytest.mark.django_db


class TestMessage:
    @pytest.fixture(autouse=True)
    def _limit(self, settings: Any) -> None:
        settings.CHAT_MAX_MESSAGE_CHARACTERS = 10

    def test_one_as_long_as_may_be_is_taken(self, api: APIClient) -> None:
        assert api.post(URL, {"content": "ü" * 10}, format="json").status_code == 202

    def test_a_longer_one_is_refused(self, api: APIClient) -> None:
        answer = api.post(URL, {"content": "x" * 11}, format="json")
        assert answer.status_code == 400
        assert answer.json()["code"] == "message_too_long"
        assert answer.json()["error"].startswith(
            "content must be at most 10 characters long, and has 11."
        )
        assert not Run.objects.exists()

    def test_in_json_api_the_error_points_to_it(self, api: APIClient) -> None:
        document = {"data": {"type": "messages", "attributes": {"content": "x" * 11}}}
        kind = "application/vnd.api+json"
        answer = api.post("/api/messages", json.dumps(document), content_type=kind)
        (error,) = answer.json()["errors"]
        assert (error["status"], error["code"]) == ("400", "message_too_long")
        assert error["source"] == {"pointer": "/data/attributes/content"}

    def test_the_chat_page_keeps_the_words(self, client: Any) -> None:
        page = client.post("/", {"content": "my long question"})
        assert page.status_code == 400
        assert "at most 10 characters" in page.text
        assert "my long question" in page.text

    def test_a_question_is_not_made_longer_either(self) -> None:
        run = factories.ask("short")
        with pytest.raises(inbox.TooLong):
            inbox.edit(run.pk, content="x" * 11)

    def test_a_repeat_gets_its_answer_whatever_the_setting_is_by_now(
        self, api: APIClient, settings: Any
    ) -> None:
        headers = {"Idempotency-Key": "a"}
        first = api.post(URL, {"content": "x" * 10}, format="json", headers=headers)
        settings.CHAT_MAX_MESSAGE_CHARACTERS = 5
        second = api.post(URL, {"content": "x" * 10}, format="json", headers=headers)
        assert second.json()["runId"] == first.json()["runId"]

    def test_0_is_no_limit(self, api: APIClient, settings: Any) -> None:
        settings.CHAT_MAX_MESSAGE_CHARACTERS = 0
        assert api.post(URL, {"content": "x" * 200_000}, format="json").status_code == 202


class TestDay:
    def test_what_is_more_than_is_left_is_refused(self, api: APIClient, settings: Any) -> None:
        settings.LIMIT_USER_BYTES_PER_DAY = 10
        # In bytes, not characters.
        said = [api.post(URL, {"content": text}, format="json") for text in ("üü", "üüüü", "üü")]
        assert [each.status_code for each in said] == [202, 429, 202]
        assert said[1].json()["code"] == "bytes_exhausted"
        assert "You may send 10 bytes a day" in said[1].json()["error"]
        assert "exceeds the 6 bytes left" in said[1].json()["error"]
        assert 1 <= int(said[1]["Retry-After"]) <= 86400
        assert Pace.objects.get().bytes == 8

    def test_it_begins_anew_the_next_day(self, settings: Any) -> None:
        settings.LIMIT_USER_BYTES_PER_DAY = 5
        factories.ask("12345")
        with pytest.raises(inbox.Limited):
            factories.ask("1")
        Pace.objects.update(bytes_on=Pace.objects.get().bytes_on - 1)
        factories.ask("123")
        assert Pace.objects.get().bytes == 3

    def test_a_room_has_its_own_and_what_fired_a_command_counts(self, settings: Any) -> None:
        settings.LIMIT_ROOM_BYTES_PER_DAY = 30
        for name in ("alice", "bob"):
            factories.ask("12345", requester=f"@{name}:localhost", place="!room", input={"a": 1})
        with pytest.raises(inbox.Limited, match="This room may send 30 bytes a day"):
            factories.ask("12345", requester="@carol:localhost", place="!room", input={"a": 1})
        factories.ask("12345", requester="@carol:localhost", place="!other")

    def test_asking_again_counts(self, settings: Any) -> None:
        settings.LIMIT_USER_BYTES_PER_DAY = 9
        run = factories.ask("12345")
        actions.cancel(run)
        run.refresh_from_db()
        with pytest.raises(inbox.Limited):
            inbox.retry(run)

    def test_a_limit_of_ones_own(self, settings: Any) -> None:
        settings.LIMIT_USER_BYTES_PER_DAY = 5
        Limit.objects.create(kind="user", name="@alice:localhost", bytes_per_day=20)
        factories.ask("1234567890", owner=factories.user("alice"))
        with pytest.raises(inbox.Limited):
            factories.ask("1234567890", owner=factories.user("bob"))

    def test_it_is_not_forgotten_on_the_day(self, settings: Any) -> None:
        settings.LIMIT_USER_BYTES_PER_DAY = 5
        factories.ask("12345")
        limits.forget()
        with pytest.raises(inbox.Limited):
            factories.ask("1")

    def test_it_takes_no_further_statement(
        self, settings: Any, django_assert_num_queries: Any
    ) -> None:
        settings.LIMIT_USER_MESSAGES_PER_MINUTE = 100
        factories.ask()
        settings.LIMIT_USER_BYTES_PER_DAY = 1000
        with django_assert_num_queries(1):
            limits.admit("(anonymous)", "", 5)

    @pytest.mark.django_db(transaction=True)
    def test_at_once_no_more_than_may(self, settings: Any) -> None:
        settings.LIMIT_USER_BYTES_PER_DAY = 35
        taken: list[int] = []

        def ask() -> None:
            try:
                factories.ask("12345")
            except inbox.Limited:
                taken.append(0)
            else:
                taken.append(1)
            finally:
                connection.close()

        threads = [threading.Thread(target=ask) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert (sum(taken), len(taken)) == (7, 12)
        assert Pace.objects.get().bytes == 35
