import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from typing import Any

import orjson
import pytest
from django.db import connection
from redis import Redis
from rest_framework.test import APIClient

from agents.events import stream
from agents.models import Event, IdempotencyKey, Run
from agents.runs import actions, execution
from chat.models import Message, Thread
from realm import tokens
from tests import factories
from tests.fakes.llm import Failure, FakeLLM

URL = "/api/chat/messages"
pytestmark = pytest.mark.django_db


def post(api: APIClient, body: Any, **headers: str) -> Any:
    raw = body if isinstance(body, bytes) else orjson.dumps(body)
    return api.generic("POST", URL, raw, content_type="application/json", headers=headers)


def test_message_is_accepted_as_documented(api: APIClient) -> None:
    response = post(api, {"content": "Summarize current state", "model": "gpt-4o-mini"})

    assert response.status_code == 202
    data = response.json()
    run = Run.objects.get()
    assert data == {
        "ok": True,
        "status": "accepted",
        "runId": run.pk,
        "threadId": run.thread_id,
        "messageId": str(run.message_id),
        "model": "gpt-4o-mini",
        "correlationId": run.correlation_id,
    }
    assert re.fullmatch(r"thr_[a-z0-9]{24}", data["threadId"])
    assert re.fullmatch(r"run_[a-z0-9]{24}", data["runId"])
    assert response["Location"] == f"/api/chat/runs/{run.pk}"


def test_the_run_its_message_and_its_event_are_recorded_together(api: APIClient) -> None:
    data = post(api, {"content": "  Hello \n", "correlationId": "c-1"}).json()

    message = Message.objects.get(pk=data["messageId"])
    assert (message.role, message.content, message.position) == ("user", "Hello", 0)
    event = Event.objects.get(type="agent.run.requested")
    assert event.payload == {
        "runId": data["runId"],
        "threadId": data["threadId"],
        "prompt": "Hello",
        "model": "gpt-4o-mini",
    }
    assert event.correlation_id == data["correlationId"] == "c-1"
    assert event.published_at is None


def test_the_content_type_of_plain_curl_is_understood(api: APIClient) -> None:
    response = api.generic(
        "POST", URL, b'{"content":"Hi"}', content_type="application/x-www-form-urlencoded"
    )

    assert response.status_code == 202


def test_messages_of_a_thread_keep_their_order(api: APIClient) -> None:
    first = post(api, {"content": "one"}).json()
    post(api, {"content": "two", "threadId": first["threadId"]})

    positions = Message.objects.values_list("content", "position")
    assert list(positions) == [("one", 0), ("two", 2)]


def test_unused_thread_id_creates_the_thread(api: APIClient) -> None:
    data = post(api, {"content": "Hi", "threadId": "support-4711"}).json()

    assert data["threadId"] == "support-4711"
    assert Thread.objects.get().pk == "support-4711"


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({}, "content: This field is required."),
        ({"content": ""}, "content: Write at least 1 character."),
        ({"content": " \n\t "}, "content: Write at least 1 character."),
        ({"content": None}, "content: This field may not be null."),
        ({"content": 5}, "content: Not a valid string."),
        ({"content": ["Hi"]}, "content: Not a valid string."),
        ({"content": "a\0b"}, "content: Null characters are not allowed."),
        ({"content": "Hi", "model": ""}, "model: This field may not be blank."),
        ({"content": "Hi", "model": "m" * 101}, "100 characters"),
        ({"content": "Hi", "model": 7}, "model: Not a valid string."),
        ({"content": "Hi", "threadId": "a b"}, "threadId must be 1 to 64"),
        ({"content": "Hi", "threadId": "t" * 65}, "threadId must be 1 to 64"),
        ({"content": "Hi", "threadId": 1}, "threadId: Not a valid string."),
        ({"content": "Hi", "correlationId": "c" * 201}, "correlationId must be 1 to 200"),
        ([], "The body must be a JSON object."),
        ("Hi", "The body must be a JSON object."),
        (b"", "content: This field is required."),
        (b'{"content": "Hi"', "The body is not valid JSON"),
        (b'{"content": NaN}', "The body is not valid JSON"),
        (b'{"content": "\xff"}', "The body is not valid JSON"),
        (b'{"content": "\\ud800"}', "The body is not valid JSON"),
        (b"[" * 100_000, "The body is not valid JSON"),
        (b'{"content":' * 50_000, "The body is not valid JSON"),
    ],
)
def test_invalid_request_names_the_field(api: APIClient, body: Any, error: str) -> None:
    response = post(api, body)

    assert response.status_code == 400
    data = response.json()
    assert data["ok"] is False
    assert error in data["error"]
    assert not Run.objects.exists()


def test_null_means_omitted(api: APIClient) -> None:
    body = {"content": "Hi", "model": None, "threadId": None, "correlationId": None}

    assert post(api, body).status_code == 202


def test_shortest_and_long_messages_are_kept_whole(api: APIClient) -> None:
    assert post(api, {"content": "x"}).status_code == 202
    assert post(api, {"content": "ä" * 200_000, "model": "m" * 100}).status_code == 202
    assert Message.objects.filter(content="ä" * 200_000).exists()


class TestModels:
    def test_model_defaults(self, api: APIClient) -> None:
        assert post(api, {"content": "Hi"}).json()["model"] == "gpt-4o-mini"

    def test_any_model_is_allowed_without_a_list(self, api: APIClient) -> None:
        assert post(api, {"content": "Hi", "model": " llama3 "}).json()["model"] == "llama3"

    def test_model_outside_the_list_is_rejected_with_the_list(
        self, api: APIClient, settings: Any
    ) -> None:
        settings.CHAT_ALLOWED_MODELS = ["gpt-4o", "gpt-4o-mini"]

        response = post(api, {"content": "Hi", "model": "o3"})

        assert response.status_code == 400
        assert response.json()["error"] == (
            "model 'o3' is not allowed. Allowed models: gpt-4o, gpt-4o-mini."
        )

    def test_the_catalogue(self, api: APIClient, settings: Any) -> None:
        settings.CHAT_ALLOWED_MODELS = ["gpt-4o", "gpt-4o-mini"]

        assert api.get("/api/chat/models").json() == {
            "ok": True,
            "models": ["gpt-4o", "gpt-4o-mini"],
            "default": "gpt-4o-mini",
            "anyModel": False,
            "echo": True,
        }


class TestIdempotency:
    def test_repeat_returns_the_first_response(self, api: APIClient) -> None:
        first = post(api, {"content": "Hi"}, **{"Idempotency-Key": "k1"})
        second = post(api, {"content": "Hi"}, **{"Idempotency-Key": "k1"})

        assert second.status_code == 202
        assert second.json() == first.json()
        assert second["Idempotency-Replayed"] == "true"
        assert "Idempotency-Replayed" not in first
        assert Run.objects.count() == 1

    @pytest.mark.parametrize(
        "other",
        [
            {"content": "Ho"},
            {"content": "Hi", "model": "gpt-4o"},
            {"content": "Hi", "threadId": "another"},
            {"content": "Hi", "correlationId": "another"},
        ],
    )
    def test_key_of_another_request_is_rejected(
        self, api: APIClient, other: dict[str, str]
    ) -> None:
        post(api, {"content": "Hi"}, **{"Idempotency-Key": "k1"})

        response = post(api, other, **{"Idempotency-Key": "k1"})

        assert response.status_code == 422
        assert "another request" in response.json()["error"]
        assert Run.objects.count() == 1

    def test_key_is_scoped_to_the_caller(self, api: APIClient) -> None:
        alice = factories.user("alice")
        post(api, {"content": "Hi"}, **{"Idempotency-Key": "k1"})
        bearer = f"Bearer {tokens.issue(alice.matrix_user_id or '')}"
        response = post(
            api, {"content": "Ho"}, **{"Idempotency-Key": "k1", "Authorization": bearer}
        )

        assert response.status_code == 202
        assert Run.objects.count() == 2

    def test_key_survives_a_change_of_settings(self, api: APIClient, settings: Any) -> None:
        first = post(api, {"content": "Hi"}, **{"Idempotency-Key": "k1"}).json()
        settings.CHAT_DEFAULT_MODEL = "gpt-5"
        settings.CHAT_ALLOWED_MODELS = ["gpt-5"]

        assert post(api, {"content": "Hi"}, **{"Idempotency-Key": "k1"}).json() == first

    def test_key_survives_the_deletion_of_its_run(self, api: APIClient) -> None:
        first = post(api, {"content": "Hi"}, **{"Idempotency-Key": "k1"}).json()
        Thread.objects.all().delete()

        assert post(api, {"content": "Hi"}, **{"Idempotency-Key": "k1"}).json() == first
        assert not Run.objects.exists()

    @pytest.mark.parametrize("key", ["", "k" * 256, "a\tb"])
    def test_invalid_key_is_rejected(self, api: APIClient, key: str) -> None:
        response = post(api, {"content": "Hi"}, **{"Idempotency-Key": key})

        assert response.status_code == 400
        assert "Idempotency-Key" in response.json()["error"]

    def test_rejected_request_does_not_use_its_key(self, api: APIClient) -> None:
        post(api, {"content": ""}, **{"Idempotency-Key": "k1"})

        assert post(api, {"content": "Hi"}, **{"Idempotency-Key": "k1"}).status_code == 202


@pytest.mark.django_db(transaction=True)
def test_twenty_concurrent_repeats_create_one_run() -> None:
    start = threading.Barrier(20)
    answers: list[tuple[int, str]] = []

    def request() -> None:
        start.wait()
        response = post(APIClient(), {"content": "Hi"}, **{"Idempotency-Key": "k1"})
        answers.append((response.status_code, response.json().get("runId")))
        connection.close()

    threads = [threading.Thread(target=request) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)

    assert answers == [(202, Run.objects.get().pk)] * 20
    assert IdempotencyKey.objects.count() == 1


@pytest.mark.django_db(transaction=True)
def test_concurrent_messages_of_a_new_thread_all_get_a_turn() -> None:
    start = threading.Barrier(8)
    codes: list[int] = []

    def request(number: int) -> None:
        start.wait()
        body = {"content": f"question {number}", "threadId": "crowded"}
        codes.append(post(APIClient(), body).status_code)
        connection.close()

    threads = [threading.Thread(target=request, args=[n]) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)

    assert codes == [202] * 8
    positions = Run.objects.order_by("position").values_list("position", flat=True)
    assert list(positions) == [0, 2, 4, 6, 8, 10, 12, 14]


def test_run_says_when_and_why_it_is_retried(api: APIClient, model: FakeLLM) -> None:
    model.script(Failure(429, retry_after=30))
    run = factories.ask()
    execution.execute(run.pk)

    shown = api.get(f"/api/chat/runs/{run.pk}").json()["run"]

    run.refresh_from_db()
    assert run.due_at
    assert datetime.fromisoformat(shown["nextAttemptAt"]) == run.due_at
    assert (shown["status"], shown["errorCode"]) == ("queued", "rate_limited")
    assert shown["safeError"] == "The model is overloaded."
    actions.cancel(run)
    assert "nextAttemptAt" not in api.get(f"/api/chat/runs/{run.pk}").json()["run"]


class TestWhoMayChat:
    def test_anonymous_callers_are_rejected_unless_allowed(
        self, api: APIClient, settings: Any
    ) -> None:
        settings.CHAT_ALLOW_ANONYMOUS = False

        response = post(api, {"content": "Hi"})

        assert response.status_code == 401
        assert "Sign in" in response.json()["error"]
        assert response["WWW-Authenticate"].startswith("Bearer")

    def test_messages_belong_to_their_user(self, api: APIClient, settings: Any) -> None:
        settings.CHAT_ALLOW_ANONYMOUS = False
        alice, bob = factories.user("alice"), factories.user("bob")
        data = post(api, {"content": "Hi"}, Authorization=bearer(alice)).json()

        assert Thread.objects.get().owner == alice
        for url in (
            f"/api/chat/runs/{data['runId']}",
            f"/api/chat/threads/{data['threadId']}/messages",
        ):
            assert api.get(url, headers={"Authorization": bearer(alice)}).status_code == 200
            assert api.get(url, headers={"Authorization": bearer(bob)}).status_code == 404
        intrusion = {"content": "Hi", "threadId": data["threadId"]}
        assert post(api, intrusion, Authorization=bearer(bob)).status_code == 404
        assert Run.objects.count() == 1

    def test_users_thread_is_closed_to_anonymous_callers(self, api: APIClient) -> None:
        alice = factories.user("alice")
        run = factories.ask(owner=alice)

        assert api.get(f"/api/chat/runs/{run.pk}").status_code == 404

    def test_invalid_token_is_rejected_even_if_anonymous_chat_is_allowed(
        self, api: APIClient
    ) -> None:
        response = post(api, {"content": "Hi"}, Authorization="Bearer nonsense")

        assert response.status_code == 401
        assert response.json() == {"ok": False, "error": "The token is not valid."}


def test_session_without_csrf_token_is_rejected(settings: Any) -> None:
    alice = factories.user("alice")
    api = APIClient(enforce_csrf_checks=True)
    api.force_login(alice)
    for body in (b'{"content": "Hi"}', b'{"csrfmiddlewaretoken": 5}'):
        form = "application/x-www-form-urlencoded"
        response = api.generic("POST", URL, body, content_type=form)

        assert response.status_code == 403
        assert response.json()["error"].startswith("CSRF Failed")


def bearer(user: Any) -> str:
    return f"Bearer {tokens.issue(user.matrix_user_id)}"


@pytest.mark.django_db(transaction=True)
class TestBlackHole:
    """A Redis that takes connections and says nothing: worse than one that is not there."""

    @pytest.fixture
    def hole(
        self, redis: Redis, settings: Any, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[list[socket.socket]]:
        """The connections that were made to it."""
        taken: list[socket.socket] = []
        with socket.create_server(("127.0.0.1", 0)) as listening:

            def take() -> None:
                with suppress(OSError):
                    while True:
                        taken.append(listening.accept()[0])

            thread = threading.Thread(target=take, daemon=True)
            thread.start()
            settings.REDIS_URL = f"redis://127.0.0.1:{listening.getsockname()[1]}"
            monkeypatch.setattr(stream, "REQUEST_SECONDS", 0.3)
            stream._publisher.reset()
            yield taken
            listening.shutdown(socket.SHUT_RDWR)
            thread.join(60)
        for each in taken:
            each.close()
        stream._publisher.reset()

    @pytest.mark.parametrize("prefer", ["", "wait=30"])
    def test_unavailable_redis_delays_one_request_only(
        self, api: APIClient, hole: list[socket.socket], prefer: str
    ) -> None:
        began = time.monotonic()
        for _ in range(10):
            response = post(api, {"content": "Hello"}, prefer=prefer)
            assert response.status_code == 202
        took = time.monotonic() - began
        # Of a breaker that opens for three seconds each time, not of each of the requests.
        assert 1 <= len(hole) <= 2 * (1 + took // stream.BREAK_SECONDS)
        assert took < 25, "the request waited thirty seconds"


def test_a_column_that_this_release_does_not_know_is_no_missing_thread(
    api: APIClient, caplog: pytest.LogCaptureFixture
) -> None:
    """A later release added it without a default: no race with another request."""
    with connection.cursor() as cursor:
        if connection.vendor == "postgresql":
            cursor.execute("ALTER TABLE chat_thread ADD COLUMN later integer NOT NULL")
        else:
            cursor.execute(
                "CREATE TRIGGER later BEFORE INSERT ON chat_thread BEGIN SELECT"
                " RAISE(ABORT, 'NOT NULL constraint failed: chat_thread.later'); END"
            )
    response = post(api, {"content": "Hello"})

    assert response.status_code == 500
    assert "later" in caplog.text
    assert "later" not in response.content.decode()
