from typing import Any

import pytest
from rest_framework.test import APIClient

from agents.models import Run
from agents.runs import execution
from chat.models import Message
from tests import factories

pytestmark = pytest.mark.django_db


def test_api_root(api: APIClient) -> None:
    response = api.get("/api")

    assert response.status_code == 200
    assert response.json() == {"ok": True, "message": "API is running"}


class TestHistory:
    def test_page_of_long_messages_is_shorter_and_loses_none(self, api: APIClient) -> None:
        thread = factories.conversation(5)
        long = Message.objects.filter(thread=thread, role="assistant")
        long.update(content="x" * 1_500_000)
        url = f"/api/chat/threads/{thread.pk}/messages"
        pages, before = [], None
        while before or not pages:
            data = api.get(url, {"before": before} if before else {}).json()
            pages.append([(m["id"], len(m["content"])) for m in data["messages"]])
            before = data["next"]
        assert all(sum(size for _, size in page) <= 4_000_000 for page in pages)
        assert len(pages) == 3
        ids = [pk for page in reversed(pages) for pk, _ in page]
        expected = Message.objects.filter(thread=thread).order_by("position")
        assert ids == [str(pk) for pk in expected.values_list("pk", flat=True)]
        assert [size for page in pages for _, size in page].count(1_500_000) == 5

    def test_single_message_is_returned_whatever_its_length(self, api: APIClient) -> None:
        thread = factories.conversation(1)
        Message.objects.filter(thread=thread, position=1).update(content="x" * 5_000_000)
        data = api.get(f"/api/chat/threads/{thread.pk}/messages").json()
        assert [len(m["content"]) for m in data["messages"]] == [5_000_000]
        assert data["next"]

    def test_messages_are_in_chronological_order(self, api: APIClient) -> None:
        thread = factories.conversation(2)

        data = api.get(f"/api/chat/threads/{thread.pk}/messages").json()

        assert data["ok"] is True
        assert data["next"] is None
        assert [m["content"] for m in data["messages"]] == [
            "question 0",
            "answer 0",
            "question 1",
            "answer 1",
        ]
        first = Message.objects.get(position=0)
        assert data["messages"][0] == {
            "id": str(first.pk),
            "threadId": thread.pk,
            "role": "user",
            "content": "question 0",
            "correlationId": "",
            "createdAt": first.created_at.isoformat().replace("+00:00", "Z"),
        }

    def test_answer_follows_its_message_despite_later_messages(self, api: APIClient) -> None:
        first = factories.ask("one")
        factories.ask("two", thread_id=first.thread_id)
        execution.execute(first.pk)

        data = api.get(f"/api/chat/threads/{first.thread_id}/messages").json()

        assert [m["content"] for m in data["messages"]] == ["one", "Handled prompt: one", "two"]

    def test_newest_200_come_first_and_next_continues(self, api: APIClient) -> None:
        url = f"/api/chat/threads/{factories.conversation(150).pk}/messages"

        newest = api.get(url).json()
        rest = api.get(url, {"before": newest["next"]}).json()

        assert len(newest["messages"]) == 200
        assert newest["messages"][-1]["content"] == "answer 149"
        assert [m["content"] for m in rest["messages"]][::99] == ["question 0", "answer 49"]
        assert rest["next"] is None

    def test_the_page_may_be_smaller(self, api: APIClient) -> None:
        url = f"/api/chat/threads/{factories.conversation(3).pk}/messages"
        seen: list[str] = []
        before: str | None = None
        for _ in range(3):
            page = api.get(url, {"limit": 2} | ({"before": before} if before else {})).json()
            seen = [m["content"] for m in page["messages"]] + seen
            before = page["next"]

        assert before is None
        assert seen[:2] == ["question 0", "answer 0"]
        assert len(seen) == 6

    @pytest.mark.parametrize(
        ("query", "code"),
        [
            ({"limit": "0"}, 400),
            ({"limit": "201"}, 400),
            ({"limit": "000000001999"}, 400),
            ({"limit": "1" * 5000}, 400),
            ({"limit": "many"}, 400),
            ({"limit": "\u0663"}, 400),
            ({"before": "yesterday"}, 400),
            ({"before": "0\0"}, 400),
            ({"before": "3901cc45-3424-47b8-aecd-a9be5a6ab1ec"}, 404),
        ],
    )
    def test_invalid_page_is_rejected(
        self, api: APIClient, query: dict[str, str], code: int
    ) -> None:
        thread = factories.conversation(1)

        response = api.get(f"/api/chat/threads/{thread.pk}/messages", query)

        assert response.status_code == code
        assert response.json()["ok"] is False

    def test_queries_do_not_grow_with_the_page(
        self, api: APIClient, django_assert_num_queries: Any
    ) -> None:
        short, long = factories.conversation(2), factories.conversation(90)
        for thread in (short, long):
            with django_assert_num_queries(2):
                api.get(f"/api/chat/threads/{thread.pk}/messages")


class TestRuns:
    def test_queued_run(self, api: APIClient) -> None:
        run = factories.ask("Hi", correlation_id="c-1")

        data = api.get(f"/api/chat/runs/{run.pk}").json()

        assert data["ok"] is True
        assert data["run"] == {
            "id": run.pk,
            "threadId": run.thread_id,
            "correlationId": "c-1",
            "status": "queued",
            "model": "gpt-4o-mini",
            "usage": {
                "promptTokens": 0,
                "completionTokens": 0,
                "totalTokens": 0,
                "estimated": False,
            },
            "createdAt": data["run"]["createdAt"],
            "updatedAt": data["run"]["updatedAt"],
        }

    def test_completed_run(self, api: APIClient) -> None:
        run = factories.ask("Hi")
        execution.execute(run.pk)

        data = api.get(f"/api/chat/runs/{run.pk}").json()["run"]

        assert data["status"] == "completed"
        assert data["output"] == "Handled prompt: Hi"
        assert "safeError" not in data

    def test_failed_run(self, api: APIClient, model: Any) -> None:
        from tests.fakes.llm import Failure

        model.script(Failure(401, message="Incorrect API key provided: sk-canary-0123456789"))
        run = factories.ask("Hi")
        execution.execute(run.pk)

        response = api.get(f"/api/chat/runs/{run.pk}")

        assert response.json()["run"]["status"] == "failed"
        assert response.json()["run"]["safeError"] == "The model refused the server's key."
        assert b"sk-canary" not in response.content


@pytest.mark.parametrize(
    ("method", "path", "code"),
    [
        ("GET", "/api/chat/runs/run_unknown", 404),
        ("GET", "/api/chat/runs/a%00b", 404),
        ("GET", "/api/chat/threads/thr_unknown/messages", 404),
        ("GET", "/api/chat/threads/%ff/messages", 404),
        ("GET", "/api/nothing", 404),
        ("DELETE", "/api/chat/nothing/here", 404),
        ("GET", "/api//", 404),
        ("GET", "/api/chat/messages", 405),
        ("DELETE", "/api/chat/models", 405),
        ("POST", "/api", 405),
        ("BREW", "/api/chat/models", 405),
    ],
)
@pytest.mark.parametrize("debug", [True, False])
def test_errors_are_json(
    api: APIClient, settings: Any, method: str, path: str, code: int, debug: bool
) -> None:
    settings.DEBUG = debug

    response = api.generic(method, path)

    assert response.status_code == code
    assert response["Content-Type"].startswith("application/json")
    assert response.json()["ok"] is False


def test_disallowed_host_is_json(api: APIClient) -> None:
    response = api.get("/api", headers={"Host": "evil.example"})

    assert response.status_code == 400
    assert response.json() == {"ok": False, "error": "Bad Request."}


def test_internal_error_shows_no_traceback(api: APIClient, monkeypatch: Any, caplog: Any) -> None:
    def explode(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("canary")

    monkeypatch.setattr("chat.api.views.run_state_json", explode)
    run = factories.ask()

    response = api.get(f"/api/chat/runs/{run.pk}")

    assert response.status_code == 500
    assert response.json() == {"ok": False, "error": "Something went wrong in the server."}
    assert "canary" in caplog.text
    assert Run.objects.exists()
