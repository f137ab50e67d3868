"""Secrets and what people say are planted, every path is driven, well and badly; then they are looked
for where they must not be."""
# ruff: noqa: F811

import asyncio
import base64
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import sentry_sdk
from django.conf import settings as configured
from django.core.management import call_command
from django.db import DatabaseError, OperationalError
from django.test import Client
from redis import Redis

from agents import inbox
from agents.events import stream
from agents.models import Run
from agents.runs import commands, execution
from agents.worker import dispatch
from agents.worker.consumer import Consumer
from botrunner.incoming import handling
from botrunner.matrix import login as accounts
from botrunner.matrix.client import Homeserver
from botrunner.matrix.errors import MatrixError
from botrunner.models import Reply, Session
from botrunner.outgoing import queue
from config.scrub import Scrubber
from ops import metrics
from realm import openid, tokens
from realm.models import User
from tests import factories
from tests.botrunner import scenes
from tests.botrunner.test_client import Scripted, server  # noqa: F401
from tests.fakes.llm import Failure, FakeLLM
from tests.fakes.receiver import HOST, Receiver
from tests.ops.conftest import Lines, Mailbox, lines, sentry  # noqa: F401
from tests.realm.homeserver import Homeserver as OpenIDServer
from tests.webhooks import scenes as hooks
from webhooks import sender
from webhooks.models import Subscription

SAID = "canary-words-of-a-person"
KEY = "sk-canary-0123456789"  # that of the fixture `model`
OPENID = "syt_canary_openid_0123456789"
PASSWORD = "canary-password-0123456789"
ACCESS = "syt_canary_access_0123456789"
SIGNING = "canary-signing-secret-0123456789-0123456789"
HOOK = f"https://{HOST}/canary-of-a-path/0123456789"

pytestmark = pytest.mark.django_db(transaction=True)


class Paths:
    """What happens to a question, with canaries in it."""

    def __init__(
        self,
        model: FakeLLM,
        redis: Redis,
        monkeypatch: pytest.MonkeyPatch,
        receiver: type[Receiver],
        openid_server: OpenIDServer,
        homeserver: Scripted,
        folder: Path,
    ) -> None:
        self.model, self.redis, self.monkeypatch = model, redis, monkeypatch
        self.receiver, self.openid_server = receiver, openid_server
        self.homeserver, self.folder = homeserver, folder
        alice = User.objects.of_matrix_id("@alice:localhost")
        self.jwt = tokens.issue("@alice:localhost", valid_from=alice.tokens_valid_from)
        self.client = Client(
            raise_request_exception=False, headers={"authorization": f"Bearer {self.jwt}"}
        )

    @property
    def canaries(self) -> list[str]:
        secrets = Subscription.objects.values_list("secret", flat=True)
        return [SAID, KEY, OPENID, PASSWORD, ACCESS, SIGNING, HOOK[-30:], self.jwt, *secrets]

    @property
    def addresses(self) -> list[str]:
        """All that were asked, of the model, of webhooks, of the homeserver."""
        asked = [call.path for call in self.model.requests]
        asked += [path for _, path, _ in self.homeserver.asked]
        return [unquote(path) for path in asked]

    def http(self) -> None:
        User.objects.of_matrix_id("@alice:localhost")
        User.objects.create_superuser("admin", password=PASSWORD)
        post = self.client.post
        output = {"content": SAID, "model": "gpt-4o-mini"}
        assert post("/api/chat/messages", output, "application/json").status_code == 202
        assert post("/api/chat/messages", f'{{"{SAID}', "application/json").status_code == 400
        self.client.get(f"/api/chat/runs/nothing?access_token={ACCESS}&q={SAID}")
        self.client.get(f"/{SAID}")
        post("/_server-session", {"access_token": OPENID}, "application/json")
        for password in (PASSWORD, f"{PASSWORD}-wrong"):
            Client().post("/admin/login/", {"username": "admin", "password": password})

    def openid(self) -> None:
        exchange = {"access_token": OPENID}
        answers: list[Any] = [
            (200, {"sub": "@alice:localhost"}),
            (401, {"errcode": "M_UNKNOWN_TOKEN", "error": OPENID}),
            (500, {"error": f"GET ?access_token={OPENID}"}),
            (200, f"<html>{OPENID}".encode()),
        ]
        for status, body in answers:
            self.openid_server.answers(body, status)
            answer = self.client.post("/_server-session", exchange, "application/json")
            assert (answer.status_code == 201) == (body == {"sub": "@alice:localhost"})
        with self.monkeypatch.context() as patch:
            patch.setattr(openid, "_subject", _raising(RuntimeError(f"access_token={OPENID}")))
            answer = self.client.post("/_server-session", exchange, "application/json")
            assert answer.status_code == 500

    def webhook(self) -> None:
        """One that a command calls, and one that is told of outcomes."""
        subscription = hooks.subscribe(url=HOOK)
        for status, body in ((200, SAID), (500, SAID), (403, SAID), (200, "")):
            self.receiver.answer = (status, json.dumps({"reply": body}).encode())
            execution.execute(factories.ask(SAID, command=HOOK, input={"sender": SAID}).pk)
            hooks.told()
            sender.send_due(subscription.pk)
        with self.monkeypatch.context() as patch:
            error = RuntimeError(f"secret={SIGNING}, token={ACCESS}")
            patch.setattr("agents.runs.http_commands._headers", _raising(error))
            execution.execute(factories.ask(SAID, command=HOOK, input={"sender": SAID}).pk)

    def login(self) -> None:
        answers = self.homeserver.answers
        answers["/keys"] = (200, {"one_time_key_counts": {}, "device_keys": {}})
        account = Session(homeserver="http://hs", username="bot-runner")

        async def scene() -> None:
            bot = Homeserver(self.homeserver.url, "bot-runner", self.folder)
            for status, answer in (
                (403, {"errcode": "M_FORBIDDEN", "error": f"Not {PASSWORD}"}),
                (500, {"errcode": "M_UNKNOWN", "error": f"password={PASSWORD} {ACCESS}"}),
                (200, {"user_id": scenes.ME, "device_id": "D", "access_token": ACCESS}),
            ):
                answers["/login"] = (status, answer)
                try:
                    await bot.login(PASSWORD, "D")
                    account.access_token = bot.nio.access_token
                except MatrixError as error:
                    accounts.logger.warning("Waiting for the homeserver at %s", bot.nio.homeserver)
                    error.add_note("told without its words")
            answers["/sync"] = (401, {"errcode": "M_UNKNOWN_TOKEN", "error": ACCESS})
            try:
                await bot.sync("s0", seconds=0, filter_={})
            except MatrixError:
                logging.getLogger("botrunner.bot").exception("Sync failed, retrying")
            await bot.close()

        asyncio.run(scene())
        assert account.access_token == ACCESS

    def http_with_a_defect(self) -> None:
        for error in (
            # As PostgreSQL tells it.
            DatabaseError(f'null value in "x"\nDETAIL:  Failing row contains (7, {SAID}).'),
            RuntimeError(f"Authorization: Bearer {self.jwt}"),
        ):
            with self.monkeypatch.context() as patch:
                patch.setattr(inbox, "submit", _raising(error))
                output = {"content": SAID}
                answer = self.client.post("/api/chat/messages", output, "application/json")
                assert answer.status_code >= 500
                patch.setattr("realm.models.BotRegistration.objects.of", _raising(error))
                assert self.client.get("/_bot-registrations").status_code >= 500

    def worker(self) -> None:
        for failure in (
            None,
            Failure(401, message=f"Incorrect API key provided: {KEY}"),
            Failure(400, message=f"Cannot answer: {SAID}"),
            Failure(500, message=SAID),
        ):
            self.model.script(*filter(None, [failure]))
            execution.execute(factories.ask(SAID).pk)

    def worker_with_a_defect(self) -> None:
        def explode(*_: Any, **__: Any) -> None:
            question = SAID  # noqa: F841  (a local variable that a traceback might show)
            raise RuntimeError(f"POST https://user:{PASSWORD}@host/v1?api_key={KEY}")

        with self.monkeypatch.context() as patch:
            patch.setattr(commands, "execute", explode)
            execution.execute(factories.ask(SAID).pk)

    def stream(self) -> None:
        stream.ensure_group()
        raw = json.dumps({"id": SAID, "type": "agent.run.requested"}).encode()
        self.redis.xadd("agent_events", {"event": raw})
        Consumer("worker-1").handle(stream.read("worker-1"))

    def room(self) -> None:
        scenes.command(prefix="!ask")
        session = scenes.session()
        session.set_login(scenes.ME, "DEVICE", ACCESS)
        scenes.take_in(session, scenes.event(f"!ask {SAID}"), scenes.event(f"!ask {SAID} again"))
        for run in Run.objects.filter(source="matrix"):
            execution.execute(run.pk)
        queue.compose(session)
        for reply in Reply.objects.all():
            url = f"http://hs/_matrix/client/v3/sync?access_token={ACCESS}"
            queue.record_failure(reply, MatrixError("M_UNKNOWN", f"{url}: refused", status=500))

    def room_with_a_defect(self) -> None:
        from botrunner import bot

        try:
            raise RuntimeError(f"M_FORBIDDEN for {ACCESS}, password={PASSWORD}")
        except RuntimeError:
            bot.logger.exception("Event %d could not be handled", 7)
        handling.give_up(7)

    def drive(self) -> None:
        for path in (
            self.http,
            self.openid,
            self.webhook,
            self.login,
            self.http_with_a_defect,
            self.worker,
            self.worker_with_a_defect,
            self.stream,
            self.room,
            self.room_with_a_defect,
        ):
            path()


def _raising(error: Exception) -> Any:
    def explode(*_: Any, **__: Any) -> None:
        raise error

    return explode


@pytest.fixture
def paths(
    model: FakeLLM,
    redis: Redis,
    redis_server: str,
    monkeypatch: pytest.MonkeyPatch,
    https_receiver: type[Receiver],
    server: Scripted,
    settings: Any,
    tmp_path: Path,
) -> Iterator[Paths]:
    from config.celery import app

    app.conf.broker_url = redis_server
    app.set_current()
    settings.HOOKS_ALLOWED_HOSTS = settings.AGENT_WEBHOOK_HOSTS = [HOST]
    settings.AGENT_WEBHOOK_SECRET = SIGNING
    with OpenIDServer() as openid_server:
        settings.MATRIX_URL = openid_server.url
        yield Paths(model, redis, monkeypatch, https_receiver, openid_server, server, tmp_path)


def test_not_in_the_log(paths: Paths, lines: Lines) -> None:
    paths.drive()

    assert lines.of("Run completed")
    assert lines.of("Run failed")
    assert lines.of("Unexpected error in a request")  # with a traceback
    for canary in paths.canaries:
        assert canary not in lines.text


def test_not_in_error_reports(paths: Paths, sentry: Mailbox) -> None:
    paths.drive()

    result = {(event.get("logentry") or {}).get("message") for event in sentry.events}
    assert "Run failed unexpectedly" in result
    assert "Unexpected error in a request" in result
    for canary in paths.canaries:
        assert canary not in sentry.text


def test_not_in_tasks(paths: Paths, redis: Redis) -> None:
    paths.http()
    dispatch.enqueue(Run.objects.values_list("pk", flat=True))

    [message] = redis.lrange("agent_events:celery", 0, -1)
    whole = json.loads(message)
    body = base64.b64decode(whole["body"]).decode()
    assert json.loads(body)[0] == [Run.objects.get().pk]
    for canary in paths.canaries:
        assert canary not in body + json.dumps(whole["headers"])


def test_not_in_metrics(paths: Paths) -> None:
    paths.drive()

    result = metrics.exposition().decode()
    assert "botrealm_runs_total" in result
    for canary in paths.canaries:
        assert canary not in result


def test_not_in_an_address(paths: Paths) -> None:
    paths.drive()

    assert any("/chat/completions" in address for address in paths.addresses)
    assert any("/login" in address for address in paths.addresses)
    for canary in paths.canaries:
        assert not [address for address in paths.addresses if canary in address]
    # That of its receiver has its own path, and nothing of ours.
    # The commands, and what is told of outcomes; of the latter some wait for their next try.
    assert len(paths.receiver.seen) > 4
    for headers, _ in paths.receiver.seen:
        result = json.dumps(headers)
        assert not [canary for canary in paths.canaries if canary in result]
    # The specification has the token there, for our own homeserver alone.
    assert any(OPENID in target for target in paths.openid_server.asked)


def test_not_in_what_is_answered(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    result: list[str] = []
    request = Client.request

    def kept(self: Client, **asked: Any) -> Any:
        response = request(self, **asked)
        if response.status_code >= 400 and not asked["PATH_INFO"].startswith("/admin"):
            result.append(f"{dict(response.headers)} {response.content.decode()}")
        return response

    monkeypatch.setattr(Client, "request", kept)
    paths.drive()

    assert len(result) > 6
    for canary in paths.canaries:
        assert not [each for each in result if canary in each]


def test_not_in_what_the_doctor_says(paths: Paths, settings: Any, capsys: Any) -> None:
    settings.BOT_RUNNER_PASSWORD = PASSWORD
    settings.MATRIX_URL = f"http://bot:{PASSWORD}@127.0.0.1:1"
    Session.objects.create(
        homeserver=settings.MATRIX_URL,
        username=settings.BOT_RUNNER_USERNAME,
        access_token=ACCESS,
    )
    with pytest.raises(SystemExit):
        call_command("doctor")

    result = capsys.readouterr().out
    assert "No homeserver answers" in result
    for canary in (KEY, PASSWORD, ACCESS, configured.SECRET_KEY):
        assert canary not in result


class TestReports:
    def test_what_stands_in_one(self, paths: Paths, sentry: Mailbox) -> None:
        paths.worker_with_a_defect()

        [event] = sentry.events
        run = Run.objects.get()
        assert (event["release"], event["environment"]) == ("botrealm@1.2.3", "tests")
        assert event["tags"] == {
            "run": run.pk,
            "thread": run.thread_id,
            "correlation_id": run.correlation_id,
            "attempt": 1,
            "model": "gpt-4o-mini",
            "source": "http",
        }

    @pytest.mark.parametrize(
        ("error", "fingerprint"),
        [
            (OperationalError("server closed the connection"), ["OperationalError", "django"]),
            (MatrixError("M_LIMIT_EXCEEDED", "Slow down"), ["MatrixError", "M_LIMIT_EXCEEDED"]),
        ],
    )
    def test_one_group_for_a_cause(
        self, sentry: Mailbox, error: Exception, fingerprint: list[str]
    ) -> None:
        for place in (_here, _there):
            try:
                place(error)
            except Exception:
                sentry_sdk.capture_exception()

        assert [event["fingerprint"] for event in sentry.events] == [fingerprint] * 2

    def test_a_defect_has_the_group_of_its_place(self, sentry: Mailbox) -> None:
        try:
            _here(ValueError("7"))
        except Exception:
            sentry_sdk.capture_exception()

        assert "fingerprint" not in sentry.events[0]


def _here(error: Exception) -> None:
    raise error


def _there(error: Exception) -> None:
    raise RuntimeError("It did not work.") from error


class TestScrubber:
    scrub = staticmethod(Scrubber("the-secret-of-this-server", 'with "quotes" in it', "short"))

    @pytest.mark.parametrize(
        ("text", "kept"),
        [
            ("Authorization: Bearer abc.def.ghi", "Authorization: Bearer [removed]"),
            ('{"authorization": "Bearer abc"}', '{"authorization": "Bearer [removed]"}'),
            ("GET /sync?access_token=abc&since=s1", "GET /sync?access_token=[removed]&since=s1"),
            (
                "https://api.example.org/v1?key=abc&v=1",
                "https://api.example.org/v1?key=[removed]&v=1",
            ),
            ("redis://:hunter2@host:6379/0", "redis://:[removed]@host:6379/0"),
            ("postgres://user:hunter2@host/db", "postgres://user:[removed]@host/db"),
            ("key eyJhbGciOiJI.eyJ1c2Vy.c2ln", "key [removed]"),
            ("Incorrect API key: sk-proj-abc123def456", "Incorrect API key: [removed]"),
            ("the-secret-of-this-server!", "[removed]!"),
            ('{"a": "with \\"quotes\\" in it"}', '{"a": "[removed]"}'),
            ("x\nDETAIL:  Failing row contains (1, a).\nLINE 1", "x\nDETAIL:[removed]\nLINE 1"),
        ],
    )
    def test_what_is_secret_goes(self, text: str, kept: str) -> None:
        assert self.scrub(text) == kept

    @pytest.mark.parametrize(
        "text",
        [
            '{"prompt_tokens": 7, "completion_tokens": 3}',
            "short",
            "Logged in as @bot:localhost, device BOTREALM1",
            "https://hooks.example.org/path",
            "Run run_seeqe3x3d0bnmgbzbw1s5zr3 failed (key_refused)",
        ],
    )
    def test_the_rest_stays(self, text: str) -> None:
        assert self.scrub(text) == text
