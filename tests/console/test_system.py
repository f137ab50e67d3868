import html
import re
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import redis as redis_client
from django.conf import settings as configured
from django.db.migrations.recorder import MigrationRecorder
from django.test import Client
from django.utils import timezone

from agents.events import stream
from agents.models import Worker
from botrunner.models import Session
from console import system
from ops import doctor, health
from tests.docs.test_settings import read_by_settings

SignIn = Callable[..., Client]
pytestmark = pytest.mark.django_db
PAGE = "/admin/system/"
# Under another name in the settings, or used where it is read.
RENAMED = {
    "DATABASE_URL": "DATABASES",
    "DATABASE_POOL_SIZE": "DATABASES",
    "MAX_BODY_BYTES": "DATA_UPLOAD_MAX_MEMORY_SIZE",
    "WORKER_CONCURRENCY": "CELERY_WORKER_CONCURRENCY",
    "AXES_COOLOFF_MINUTES": "AXES_COOLOFF_TIME",
    "LOG_LEVELS": "",
    "LOG_FORMAT": "",
    "SENTRY_RELEASE": "",
}


def part(title: str) -> system.Section:
    return next(found for found in system.check_sections(system.SECTIONS) if found.title == title)


def line(title: str, name: str) -> system.Item:
    return next(found for found in part(title).items if found.name.startswith(name))


@pytest.mark.parametrize(("role", "status"), [("Viewer", 403), ("Operator", 200), ("Admin", 200)])
def test_who_sees_it(sign_in: SignIn, role: str, status: int) -> None:
    assert sign_in(role).get(PAGE).status_code == status


def test_a_visitor_is_sent_to_the_login(client: Client) -> None:
    assert client.get(PAGE).status_code == 302


def test_no_secret_is_shown(sign_in: SignIn, settings: Any) -> None:
    canaries = {
        "OPENAI_API_KEY": "sk-canary",
        "SECRET_KEY": "canary-secret-key-0123456789-0123456789-0123456789",
        "REALM_SECRET_SEED": "canary-seed",
        "AGENT_WEBHOOK_SECRET": "canary-webhook",
        "BOT_RUNNER_PASSWORD": "canary-password",
        "SENTRY_DSN": "https://canary-dsn@sentry.example.org/1",
        "REDIS_URL": "redis://me:canary-redis@127.0.0.1:1/0",
        "CELERY_BROKER_URL": "redis://me:canary-broker@127.0.0.1:1/0",
        "MATRIX_URL": "http://me:half@canary-matrix@127.0.0.1:1",
        "OPENAI_BASE_URL": "http://me:canary-model@127.0.0.1:1/v1",
        "CACHES": {
            **settings.CACHES,
            "other": {**settings.CACHES["default"], "LOCATION": ["redis://:canary-cache@h:1"]},
        },
    }
    for name, value in canaries.items():
        setattr(settings, name, value)
    Session.objects.create(
        homeserver="http://localhost", username="bot", access_token="syt_canary", holder="h"
    )

    page = sign_in("Admin").get(PAGE).text

    assert "canary" not in page
    assert "redis://me:[removed]@127.0.0.1:1/0" in page
    assert "BOT_RUNNER_PASSWORD" in page


def test_every_setting_is_shown() -> None:
    shown = {found.name for found in part("Settings").items}

    missing = {RENAMED.get(name, name) for name in read_by_settings()} - shown - {""}

    assert not missing


def test_a_password_in_the_database_settings_is_masked() -> None:
    config = {"default": {"PASSWORD": "canary", "NAME": "db", "OPTIONS": {"passfile": "x"}}}

    assert system.masked("DATABASES", config)["default"]["PASSWORD"] == "•••• (set)"
    assert system.masked("DATABASES", config)["default"]["NAME"] == "db"


def test_without_redis_and_homeserver_the_rest_is_told(settings: Any) -> None:
    settings.MATRIX_URL = "http://127.0.0.1:1"

    found = {part.title: part for part in system.check_sections(system.SECTIONS)}

    assert found["Redis"].failure.startswith("Redis is unavailable")
    assert found["Homeserver"].failure.startswith("The homeserver at http://127.0.0.1:1 does not")
    assert [line.value for line in found["Migrations"].items] == ["All applied."]
    assert "Django" in {line.name for line in found["Versions"].items}


def test_what_swallows_packets_is_given_up_soon(settings: Any) -> None:
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen(8)
        port = mute.getsockname()[1]
        settings.REDIS_URL = f"redis://127.0.0.1:{port}/0"
        settings.MATRIX_URL = f"http://127.0.0.1:{port}"
        started = time.monotonic()
        found = {part.title: part for part in system.check_sections(system.SECTIONS)}

    assert found["Redis"].failure
    assert found["Homeserver"].failure
    assert time.monotonic() - started < 10


def test_redis_and_its_stream(redis: redis_client.Redis) -> None:
    assert re.match(r"Redis \d", line("Redis", "Redis").value)
    assert line("Redis", "Stream").value == "0 entries"
    assert line("Redis", "Dead letters").state == "ok"

    stream.ensure_group()
    redis.xadd("agent_events", {"event": "{"})
    redis.xadd("agent_events:dead", {"event": "{"})

    assert line("Redis", "Stream").value == "1 entries"
    assert line("Redis", "Group agent_runtime").value.endswith("0 unacknowledged")
    assert line("Redis", "Dead letters").state == "warn"


def test_a_redis_that_forgets_when_full_is_warned_of(redis: redis_client.Redis) -> None:
    before = redis.config_get("maxmemory*")
    try:
        redis.config_set("maxmemory", "100mb")
        redis.config_set("maxmemory-policy", "allkeys-lru")
        shown = [each for each in part("Redis").items if "maxmemory-policy" in str(each.value)]
        assert [each.state for each in shown] == ["broken"]
        said = [each.message for each in doctor.examine() if each.check == "redis"]
        assert shown[0].value in said
    finally:
        for name in ("maxmemory", "maxmemory-policy"):
            redis.config_set(name, before[name])


def test_answers_that_are_echoes_are_warned_of() -> None:
    assert "echo" in line("Findings", "botrealm.W001").value


def test_a_missing_migration_is_told() -> None:
    MigrationRecorder.Migration.objects.filter(app="console").delete()

    assert line("Migrations", "Migrations").state == "broken"
    assert "console.0001" in line("Migrations", "Migrations").value


def test_the_bot_is_told_of() -> None:
    assert line("Processes", "Bot").value == "The bot has never logged in."
    session = Session.objects.create(homeserver="http://localhost", username="bot", holder="host:1")
    assert line("Processes", str(session)).state == "broken"
    assert "; no process" in line("Processes", str(session)).value

    session.lease_expires_at = timezone.now() + timedelta(seconds=60)
    session.last_sync_at = timezone.now()
    session.save()

    assert line("Processes", str(session)).state == "ok"
    assert "held by host:1" in line("Processes", str(session)).value


def test_how_late_a_bot_may_be_is_what_the_probes_say(settings: Any) -> None:
    session = Session.objects.create(
        homeserver=settings.MATRIX_URL,
        username=settings.BOT_RUNNER_USERNAME,
        last_sync_at=timezone.now() - timedelta(seconds=200),
    )
    for limit, state in ((90, "broken"), (300, "ok"), (0, "ok")):
        settings.OPS_MAX_BOT_SYNC_SECONDS = limit
        assert line("Processes", str(session)).state == state
        assert health._bot().ok == (state == "ok")


class TestDoctor:
    @pytest.fixture(autouse=True)
    def _nobody_is_there(self, settings: Any) -> None:
        settings.MATRIX_URL = "http://me:canary-matrix@127.0.0.1:1"
        settings.OPENAI_BASE_URL = "http://me:canary-model@127.0.0.1:1/v1"
        settings.OPENAI_API_KEY = "sk-canary"

    def test_it_is_asked_for_by_a_button(self, sign_in: SignIn) -> None:
        page = sign_in("Operator").get(PAGE).text

        assert "Run the doctor" in page
        assert ">Doctor</h2>" not in page

    @pytest.mark.django_db(transaction=True)  # its checks have connections of their own
    def test_it_says_what_the_command_says(self, sign_in: SignIn) -> None:
        page = html.unescape(sign_in("Operator").post(PAGE).text)

        assert ">Doctor</h2>" in page
        found = doctor.examine()
        assert {each.check for each in found} == set(doctor.CHECKS)
        assert not [each for each in found if settings_scrubbed(each.message) not in page]
        assert "canary" not in page

    def test_not_for_everybody(self, sign_in: SignIn) -> None:
        assert sign_in("Viewer").post(PAGE).status_code == 403


def settings_scrubbed(text: str) -> str:
    return str(configured.SCRUBBER(text))


def test_workers_are_told_of_by_their_beat() -> None:
    assert line("Processes", "No worker").state == "broken"
    now = timezone.now()
    worker = Worker.objects.create(
        worker="host:7",
        name="worker-7",
        host="host",
        pid=7,
        version="1",
        concurrency=1,
        started_at=now,
        beat_at=now,
        read_at=now,
    )
    assert line("Processes", "worker-7").state == "ok"

    Worker.objects.filter(pk=worker.pk).update(beat_at=now - timedelta(minutes=5))

    assert line("Processes", "worker-7").state == "broken"
