"""What the doctor finds, and how it says so. The homeserver, the model and Redis are real HTTP and a
real Redis."""

import json
import socket
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
from django.core.management import call_command
from django.db import connection
from django.db.migrations.recorder import MigrationRecorder
from redis import Redis

from agents.events import stream
from agents.worker import presence as workers
from botrunner.models import Session
from ops import doctor
from tests.fakes.llm import Failure, FakeLLM
from tests.fakes.receiver import HOST
from tests.realm.homeserver import Homeserver, answer
from tests.webhooks import scenes as webhooks

pytestmark = pytest.mark.django_db(transaction=True)

CLIENT = "/_matrix/client/v3"


class Matrix(Homeserver):
    """Its account, as far as logging in and out goes."""

    def __init__(self) -> None:
        super().__init__()
        self.devices: set[str] = set()
        self.login_status = 200
        self.behave = self.serve

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        token = handler.headers.get("Authorization", "").removeprefix("Bearer ")
        if handler.path == "/_matrix/client/versions":
            return answer(handler, 200, {"versions": ["v1.1", "v1.12"]})
        if handler.path == f"{CLIENT}/login":
            if self.login_status == 200:
                self.devices.add("token-1")
            return answer(handler, self.login_status, {"access_token": "token-1"})
        if token not in self.devices:
            return answer(handler, 401, {"errcode": "M_UNKNOWN_TOKEN"})
        if handler.path == f"{CLIENT}/logout":
            self.devices.discard(token)
        return answer(handler, 200, {})


@pytest.fixture
def matrix(settings: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Matrix]:
    with Matrix() as homeserver:
        settings.MATRIX_URL = homeserver.url
        monkeypatch.setenv("MATRIX_URL", homeserver.url)
        yield homeserver


@pytest.fixture
def healthy(
    matrix: Matrix, model: FakeLLM, redis: Redis, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operator who has done everything right."""
    settings.DEBUG = True
    settings.ALLOWED_HOSTS = ["localhost"]
    settings.CHAT_MAX_STREAMS = 100  # whatever this machine permits
    for name in ("PORT", "REALM_SERVER_PORT"):
        with closing(socket.create_server(("127.0.0.1", 0))) as free:
            monkeypatch.setenv(name, str(free.getsockname()[1]))
    presence = workers.WorkerHeartbeat("worker-1", concurrency=4)
    presence.note_read()
    presence.beat()


def found(check: str) -> list[tuple[str, str]]:
    return [(each.level, each.message) for each in doctor.examine() if each.check == check]


def one(check: str) -> tuple[str, str]:
    [finding] = found(check)
    return finding


def test_nothing_is_broken(healthy: None, capsys: pytest.CaptureFixture[str]) -> None:
    call_command("doctor")

    told = capsys.readouterr().out
    assert "Nothing is broken, 0 warnings." in told
    assert "default model gpt-4o-mini" in told
    assert "BOT_RUNNER_PASSWORD are valid" in told


def test_for_a_machine(healthy: None, capsys: pytest.CaptureFixture[str]) -> None:
    call_command("doctor", json=True)

    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is True
    assert {finding["check"] for finding in told["findings"]} == set(doctor.CHECKS)
    assert {finding["level"] for finding in told["findings"]} == {"ok"}


def test_streams_that_leave_no_room_for_other_connections(healthy: None, settings: Any) -> None:
    settings.WEB_MAX_CONNECTIONS = 100
    level, line = one("connections")
    assert level == doctor.WARN
    assert "CHAT_MAX_STREAMS is 100, and a web process accepts 100" in line
    settings.WEB_MAX_CONNECTIONS = 101
    assert one("connections")[0] == doctor.OK


def test_what_is_broken_fails_and_says_how_to_mend_it(
    healthy: None, settings: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    settings.REDIS_URL = "redis://127.0.0.1:1"
    stream.probe_client.reset()
    with pytest.raises(SystemExit) as ended:
        call_command("doctor")

    assert ended.value.code == 1
    told = capsys.readouterr().out
    assert "broken" in told
    assert "No answer at REDIS_URL (ConnectionError)." in told
    assert "→ Start Redis, or set REDIS_URL." in told
    assert "2 broken, 0 warnings." in told  # the stream's connection and the broker's


def test_every_trouble_comes_with_its_remedy(settings: Any) -> None:
    settings.MATRIX_URL = "http://127.0.0.1:1"

    troubles = [each for each in doctor.examine() if each.level != doctor.OK]

    assert len(troubles) >= 4
    assert all(each.fix for each in troubles)


class TestSettings:
    def test_development_in_the_open(self, settings: Any) -> None:
        settings.DEBUG = True
        settings.ALLOWED_HOSTS = ["localhost", "chat.example.org"]

        level, said = found("settings")[0]

        assert level == doctor.BROKEN
        assert "chat.example.org" in said

    def test_the_built_in_password_in_production(self, settings: Any) -> None:
        settings.BOT_RUNNER_PASSWORD = "password"

        assert (doctor.WARN, "BOT_RUNNER_PASSWORD has its default value.") in found("settings")

    def test_what_the_system_checks_say(self, settings: Any) -> None:
        settings.AGENT_TOOLS = ["nothing"]

        assert (doctor.BROKEN, "AGENT_TOOLS names an unknown tool: 'nothing'.") in found("settings")


class TestRedis:
    @pytest.mark.parametrize(
        ("policy", "level"), [("allkeys-lru", doctor.BROKEN), ("volatile-lru", doctor.WARN)]
    )
    def test_one_that_throws_things_away(self, redis: Redis, policy: str, level: str) -> None:
        redis.config_set("maxmemory-policy", policy)
        try:
            assert found("redis")[1][0] == level
        finally:
            redis.config_set("maxmemory-policy", "noeviction")

    def test_a_replica(self, redis: Redis) -> None:
        redis.replicaof("127.0.0.1", "1")
        try:
            assert one("redis") == (doctor.BROKEN, "This Redis is a replica.")
        finally:
            redis.replicaof("NO", "ONE")


class TestDatabase:
    def test_migrations(self) -> None:
        recorder = MigrationRecorder(connection)
        recorder.record_unapplied("agents", "0001_initial")
        try:
            level, said = one("migrations")
        finally:
            recorder.record_applied("agents", "0001_initial")

        assert level == doctor.BROKEN
        assert "agents.0001_initial" in said

    @pytest.mark.skipif(connection.vendor != "sqlite", reason="of SQLite")
    def test_sqlite_in_production(self) -> None:
        level, said = one("database")

        assert level == doctor.WARN
        assert "WAL" in said


class TestHomeserver:
    def test_the_password_is_tried_without_leaving_a_device(self, matrix: Matrix) -> None:
        assert found("homeserver")[-1][0] == doctor.OK
        assert f"{CLIENT}/login" in matrix.asked
        assert not matrix.devices

    @pytest.mark.parametrize(("status", "level"), [(403, doctor.BROKEN), (429, doctor.WARN)])
    def test_a_login_that_is_refused(self, matrix: Matrix, status: int, level: str) -> None:
        matrix.login_status = status

        assert found("homeserver")[-1][0] == level

    @pytest.mark.parametrize(("token", "level"), [("good", doctor.OK), ("old", doctor.WARN)])
    def test_a_stored_login_is_not_replaced(
        self, matrix: Matrix, settings: Any, token: str, level: str
    ) -> None:
        matrix.devices = {"good"}
        Session.objects.create(
            homeserver=matrix.url, username=settings.BOT_RUNNER_USERNAME, access_token=token
        )

        assert found("homeserver")[-1][0] == level
        assert f"{CLIENT}/login" not in matrix.asked
        assert matrix.devices == {"good"}

    def test_none_where_none_was_asked_for(
        self, settings: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        settings.MATRIX_URL = "http://127.0.0.1:1"
        monkeypatch.delenv("MATRIX_URL", raising=False)
        assert one("homeserver")[0] == doctor.WARN

        monkeypatch.setenv("MATRIX_URL", settings.MATRIX_URL)
        assert one("homeserver")[0] == doctor.BROKEN

    def test_a_clock_that_is_wrong(self, matrix: Matrix, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            BaseHTTPRequestHandler,
            "date_time_string",
            lambda *_: "Sat, 01 Jan 2022 00:00:00 GMT",
        )

        level, said = found("homeserver")[1]

        assert level == doctor.BROKEN
        assert "clocks" in said


class TestModel:
    def test_a_refused_key(self, model: FakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("tests.fakes.llm._refusal", lambda *_: Failure(401))

        assert found("model")[0] == (doctor.BROKEN, f"{model.url} refuses the key.")

    def test_a_model_that_is_not_there(self, model: FakeLLM, settings: Any) -> None:
        settings.CHAT_DEFAULT_MODEL = "gpt-9"

        level, said = found("model")[0]

        assert (level, said) == (doctor.WARN, f"{model.url} does not know gpt-9.")

    def test_an_endpoint_that_is_away(self, model: FakeLLM, settings: Any) -> None:
        settings.OPENAI_BASE_URL = "http://127.0.0.1:1/v1"

        assert one("model")[0] == doctor.BROKEN


def test_a_port_that_somebody_else_has(monkeypatch: pytest.MonkeyPatch, matrix: Matrix) -> None:
    monkeypatch.setenv("PORT", matrix.url.rpartition(":")[2])

    level, said = found("ports")[0]

    assert level == doctor.WARN
    assert "taken by another program" in said


def test_a_directory_for_metrics_that_is_not_there(settings: Any) -> None:
    settings.PROMETHEUS_MULTIPROC_DIR = "/proc/nothing"

    assert one("metrics")[0] == doctor.BROKEN


class TestWebhooks:
    def test_there_is_nothing_to_say_of_those_that_work(self, settings: Any) -> None:
        settings.HOOKS_ALLOWED_HOSTS = [HOST]
        webhooks.subscribe()
        assert one("webhooks") == (doctor.OK, "Enabled webhooks: 1.")

    def test_what_was_given_up_is_said(self, settings: Any) -> None:
        settings.HOOKS_ALLOWED_HOSTS = [HOST]
        delivery = webhooks.delivery()
        delivery.claim()
        delivery.note_dead("It answered 500.", status_code=500)
        delivery.subscription.note(works=False)
        settings.HOOKS_ALLOWED_HOSTS = []

        said = [said for level, said in found("webhooks") if level == doctor.WARN]
        assert said == [
            f"HOOKS_ALLOWED_HOSTS does not include {HOST}.",
            f"The last delivery to {HOST} failed.",
            "Dead deliveries of the last 7 days: 1.",
        ]
