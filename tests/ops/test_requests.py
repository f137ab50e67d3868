"""One id from the question to the answer, and one line in the log for each outcome."""

import re
import uuid
from typing import Any

import orjson
import pytest
from django.test import Client
from redis import Redis
from rest_framework.test import APIClient

from agents.events import stream
from agents.models import Event, Run
from agents.runs import actions, execution
from agents.worker.consumer import Consumer
from botrunner.models import Reply
from botrunner.outgoing import queue
from tests import factories
from tests.botrunner import scenes
from tests.fakes.llm import Failure, FakeLLM
from tests.ops.conftest import Lines

pytestmark = pytest.mark.django_db

HEADER = "X-Request-ID"


class TestTheId:
    @pytest.mark.parametrize("offered", ["4bf92f35", "a" * 128, "$event:localhost", "a.b_c~d-e+f="])
    def test_a_clients_own_is_kept(self, client: Client, offered: str) -> None:
        assert client.get("/api", headers={HEADER: offered}).headers[HEADER] == offered

    @pytest.mark.parametrize("offered", ["", " ", "a" * 129, "a b", "a\tb", "é", '"a"', "a\x00"])
    def test_what_cannot_be_one_is_replaced(self, client: Client, offered: str) -> None:
        given = client.get("/api", headers={HEADER: offered}).headers[HEADER]

        assert re.fullmatch(r"[0-9a-f]{32}", given)

    def test_each_request_has_its_own(self, client: Client) -> None:
        assert client.get("/api").headers[HEADER] != client.get("/api").headers[HEADER]

    @pytest.mark.parametrize(
        ("path", "status", "extra"),
        [
            ("/api/nothing", 404, {}),
            ("/nothing", 404, {}),
            ("/_nothing", 404, {}),
            ("/api", 400, {"HTTP_HOST": "evil.example"}),
            ("/_bot-registrations", 400, {"HTTP_HOST": "evil.example"}),
            ("/api/chat/messages", 405, {}),
            ("/_bot-registrations", 401, {}),
        ],
    )
    def test_an_error_carries_it(
        self, client: Client, path: str, status: int, extra: dict[str, str]
    ) -> None:
        response = client.get(path, headers={HEADER: "r-1"}, **extra)

        assert response.status_code == status
        assert response.headers[HEADER] == "r-1"
        if path.startswith("/_"):
            assert response.json()["errors"][0]["meta"] == {"request_id": "r-1"}
        elif path.startswith("/api"):
            assert set(response.json()) == {"ok", "error"}

    def test_a_defect_carries_it(self, client: Client, monkeypatch: Any, lines: Lines) -> None:
        def explode(*_: Any, **__: Any) -> None:
            raise RuntimeError("canary")

        monkeypatch.setattr("agents.inbox.submit", explode)
        response = client.post(
            "/api/chat/messages", {"content": "a"}, "application/json", headers={HEADER: "r-1"}
        )

        assert (response.status_code, response.headers[HEADER]) == (500, "r-1")
        defect = lines.one("Unexpected error in a request")
        assert defect["request_id"] == "r-1"
        assert "canary" in defect["exception"]
        assert lines.one("Request")["level"] == "warning"

    def test_from_the_request_to_the_outcome(
        self, api: APIClient, model: FakeLLM, lines: Lines
    ) -> None:
        api.post("/api/chat/messages", {"content": "Hi"}, format="json", headers={HEADER: "r-1"})
        run = Run.objects.get()
        execution.execute(run.pk)

        assert run.request_id == "r-1"
        assert lines.one("Request")["request_id"] == "r-1"
        assert lines.one("Run completed")["request_id"] == "r-1"
        for event in Event.objects.all():
            envelope = event.as_entry()
            assert set(envelope) == {"id", "type", "timestamp", "correlationId", "payload"}
            assert "r-1" not in str(envelope)

    def test_from_the_room_to_the_reply(self, lines: Lines) -> None:
        scenes.command()
        session = scenes.session()
        said = scenes.event("Hello")
        scenes.take_in(session, said)
        run = Run.objects.get()
        execution.execute(run.pk)
        queue.compose(session)

        assert run.request_id == said["event_id"]
        assert lines.one("Run completed")["request_id"] == said["event_id"]
        assert Reply.objects.get().message.event_id == said["event_id"]

    @pytest.mark.django_db(transaction=True)
    def test_from_another_program(self, redis: Redis) -> None:
        stream.ensure_group()
        event_id = str(uuid.uuid4())
        told = {
            "id": event_id,
            "type": "agent.run.requested",
            "correlationId": "order-1",
            "payload": {"runId": "order-1", "prompt": "Hi"},
        }
        redis.xadd("agent_events", {"event": orjson.dumps(told)})
        consumer = Consumer("worker-1")
        [entry] = stream.read("worker-1")
        [(_, event)] = consumer._parse([entry])
        assert consumer._submit(entry, event)

        assert Run.objects.get().request_id == event_id


class TestLines:
    def test_a_request(self, client: Client, lines: Lines) -> None:
        alice = factories.user("alice")
        client.force_login(alice)
        client.get("/api/chat/runs/run_canary?token=canary")

        told = lines.one("Request")

        assert told["route"] == "/api/chat/runs/<id:run_id>"
        assert (told["method"], told["status"], told["user"]) == ("GET", 400, alice.pk)
        assert told["ms"] > 0
        assert "canary" not in lines.text
        assert len(lines.text.splitlines()) == 1  # nobody says it again

    def test_nobody_is_looked_up_for_it(
        self, client: Client, django_assert_num_queries: Any
    ) -> None:
        client.force_login(factories.user("alice"))
        with django_assert_num_queries(0):
            client.get("/nothing")

    def test_probes_leave_none(self, client: Client, lines: Lines) -> None:
        client.get("/healthz")

        assert not lines.text

    def test_a_run_that_completed(self, model: FakeLLM, lines: Lines) -> None:
        run = factories.ask()
        execution.execute(run.pk)
        run.refresh_from_db()

        told = lines.one("Run completed")

        assert (told["run"], told["thread"], told["attempt"]) == (run.pk, run.thread_id, 1)
        assert (told["status"], told["model"], told["source"]) == ("completed", run.model, "http")
        assert told["prompt_tokens"] == run.prompt_tokens > 0
        assert told["completion_tokens"] == run.completion_tokens
        assert 0 <= told["queue_ms"] <= told["total_ms"]
        assert 0 <= told["model_ms"] <= told["total_ms"]
        assert len(lines.text.splitlines()) == 1

    def test_a_run_that_failed(self, model: FakeLLM, lines: Lines) -> None:
        model.script(Failure(401))
        execution.execute(factories.ask().pk)

        told = lines.one("Run failed")

        assert (told["status"], told["error_code"]) == ("failed", "key_refused")

    def test_a_run_that_was_cancelled(self, lines: Lines) -> None:
        run = factories.ask()
        actions.cancel(run)

        assert lines.one("Run cancelled")["run"] == run.pk
