"""What probes are told, over HTTP."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from typing import Any

import pytest
from django.db import connection
from django.db.migrations.recorder import MigrationRecorder
from django.test import Client
from django.utils import timezone
from redis import Redis

from agents.events import stream
from agents.models import Event, Run, Worker
from agents.runs import leases
from agents.worker import presence as workers
from botrunner.models import Session
from ops import health
from tests import factories

pytestmark = pytest.mark.django_db(transaction=True)

LONG_AGO = timedelta(hours=2)


@pytest.fixture
def client() -> Client:
    """As a probe asks: by an address that ALLOWED_HOSTS does not name."""
    return Client(headers={"host": "10.1.2.3:8000"})


@pytest.fixture
def worker() -> workers.WorkerHeartbeat:
    """One that is at work."""
    presence = workers.WorkerHeartbeat("worker-1", concurrency=4)
    presence.note_read()
    presence.beat()
    return presence


@contextmanager
def black_hole() -> Iterator[int]:
    """A port that takes connections and never says a word."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        yield server.getsockname()[1]


def checks(client: Client, path: str, status: int) -> dict[str, Any]:
    response = client.get(path)
    told = response.json()
    assert response.status_code == status, told
    assert told["ok"] is (status == 200)
    assert response.headers["Cache-Control"] == "no-store"
    return dict(told["checks"])


class TestProcess:
    def test_it_asks_nobody(self, client: Client, django_assert_num_queries: Any) -> None:
        with django_assert_num_queries(0):
            response = client.get("/healthz")

        assert response.status_code == 200
        assert response.json()["service"] == "botrealm"

    def test_a_head_will_do(self, client: Client) -> None:
        assert client.head("/healthz").status_code == 200


class TestReady:
    def test_with_all_that_it_needs(self, client: Client, redis: Redis) -> None:
        told = checks(client, "/readyz", 200)

        assert {name: check["ok"] for name, check in told.items()} == {
            "database": True,
            "redis": True,
            "migrations": True,
        }

    def test_not_without_redis(self, client: Client) -> None:
        told = checks(client, "/readyz", 503)

        assert told["redis"] == {
            "ok": False,
            "error": "ConnectionError",
            "reason": "No answer at REDIS_URL (ConnectionError).",
        }
        assert told["database"]["ok"]

    def test_without_redis_where_an_operator_wants_that(
        self, client: Client, settings: Any
    ) -> None:
        settings.OPS_READY_WITHOUT_REDIS = True

        assert checks(client, "/readyz", 200)["redis"]["error"] == "ConnectionError"

    def test_a_redis_that_swallows_everything_is_told_in_time(
        self, client: Client, redis: Redis, settings: Any
    ) -> None:
        """Its client gives up, whatever the patience of a test is."""
        with black_hole() as port:
            settings.REDIS_URL = f"redis://127.0.0.1:{port}/0"
            stream.probe_client.reset()
            started = time.monotonic()
            told = checks(client, "/readyz", 503)

        assert time.monotonic() - started < 15
        assert not told["redis"]["ok"]
        assert told["database"]["ok"]

    def test_a_database_that_swallows_everything_is_told_in_time(
        self, client: Client, redis: Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        until = threading.Event()
        monkeypatch.setattr(health, "PATIENCE_SECONDS", 2)
        monkeypatch.setattr(
            "django.db.backends.utils.CursorWrapper.execute", lambda *_, **__: until.wait(30)
        )
        started = time.monotonic()
        told = checks(client, "/readyz", 503)
        again = checks(client, "/readyz", 503)
        took = time.monotonic() - started
        until.set()
        for check in health.READINESS.values():
            with check._running:  # or the next test would find it still asking
                pass

        assert took < 20
        assert told["database"]["error"] == "No answer in time."
        assert again["database"]["error"] == "Still no answer to an earlier check."
        assert told["redis"]["ok"]

    def test_not_before_the_database_has_been_brought_up_to_date(
        self, client: Client, redis: Redis
    ) -> None:
        recorder = MigrationRecorder(connection)
        recorder.record_unapplied("agents", "0001_initial")
        try:
            assert checks(client, "/readyz", 503)["migrations"] == {"ok": False, "unapplied": 1}
        finally:
            recorder.record_applied("agents", "0001_initial")


class TestDeep:
    def test_all_is_well(self, client: Client, worker: workers.WorkerHeartbeat) -> None:
        told = checks(client, "/healthz/deep", 200)

        assert told["queue"] == {"ok": True, "seconds": 0.0, "limit": 60}
        assert told["outbox"] == {"ok": True, "seconds": 0.0, "limit": 30, "events": 0}
        assert told["workers"] == {"ok": True, "alive": 1, "reading": 1, "runsInHand": 0}
        assert told["bot"] == {"ok": True, "seconds": None}  # none is in use

    def test_a_run_that_nobody_takes(self, client: Client, worker: workers.WorkerHeartbeat) -> None:
        run = factories.ask()
        Event.objects.all().delete()
        Run.objects.filter(pk=run.pk).update(due_at=timezone.now() - LONG_AGO)

        told = checks(client, "/healthz/deep", 503)

        assert told["queue"]["seconds"] == pytest.approx(7200, abs=30)
        assert told["workers"]["ok"]

    def test_a_run_is_not_late_for_having_waited_for_its_turn(
        self, client: Client, worker: workers.WorkerHeartbeat
    ) -> None:
        first = factories.ask()
        second = factories.ask(thread_id=first.thread_id)
        Event.objects.all().delete()
        Run.objects.filter(pk=second.pk).update(due_at=timezone.now() - LONG_AGO)
        Run.objects.filter(pk=first.pk).update(
            status=Run.Status.CANCELLED, due_at=None, finished_at=timezone.now()
        )

        assert checks(client, "/healthz/deep", 200)["queue"]["seconds"] < 30

    def test_a_run_is_not_late_while_its_worker_holds_it(
        self, client: Client, worker: workers.WorkerHeartbeat
    ) -> None:
        run = factories.ask()
        Event.objects.all().delete()
        Run.objects.filter(pk=run.pk).update(
            due_at=timezone.now() - LONG_AGO,
            status=Run.Status.PROCESSING,
            lease_expires_at=timezone.now() + timedelta(seconds=30),
        )

        assert checks(client, "/healthz/deep", 200)["queue"]["seconds"] == 0

    def test_an_event_that_does_not_come_through(
        self, client: Client, worker: workers.WorkerHeartbeat
    ) -> None:
        run = factories.ask()
        Run.objects.filter(pk=run.pk).update(
            status=Run.Status.CANCELLED, due_at=None, finished_at=timezone.now()
        )
        Event.objects.update(created_at=timezone.now() - LONG_AGO)

        told = checks(client, "/healthz/deep", 503)

        assert told["outbox"]["events"] == 1
        assert told["outbox"]["seconds"] == pytest.approx(7200, abs=30)

    def test_no_worker(self, client: Client) -> None:
        assert checks(client, "/healthz/deep", 503)["workers"]["alive"] == 0

    def test_a_worker_that_only_beats(self, client: Client) -> None:
        workers.WorkerHeartbeat("worker-1", concurrency=4).beat()

        told = checks(client, "/healthz/deep", 503)["workers"]

        assert (told["alive"], told["reading"]) == (1, 0)

    def test_a_bot_that_has_lost_its_homeserver(
        self, client: Client, worker: workers.WorkerHeartbeat, settings: Any
    ) -> None:
        Session.objects.create(
            homeserver=settings.MATRIX_URL,
            username=settings.BOT_RUNNER_USERNAME,
            last_sync_at=timezone.now() - LONG_AGO,
        )

        assert not checks(client, "/healthz/deep", 503)["bot"]["ok"]
        settings.OPS_MAX_BOT_SYNC_SECONDS = 0
        assert checks(client, "/healthz/deep", 200)["bot"]["ok"]


class TestWhoMayLook:
    """At the figures; the plain probes are for everybody."""

    @pytest.mark.parametrize("path", ["/metrics", "/healthz/deep"])
    @pytest.mark.parametrize(
        ("address", "headers", "allowed"),
        [
            ("127.0.0.1", {}, True),
            ("::1", {}, True),
            ("::ffff:127.0.0.1", {}, True),
            ("10.0.0.1", {}, False),
            ("", {}, False),
            # Somebody from elsewhere, through a proxy on this host, whatever they say they are.
            ("127.0.0.1", {"x-forwarded-for": "127.0.0.1"}, False),
            ("127.0.0.1", {"forwarded": "for=127.0.0.1"}, False),
            ("10.0.0.1", {"x-forwarded-for": "127.0.0.1"}, False),
            # No token is set: none is the right one.
            ("10.0.0.1", {"authorization": "Bearer "}, False),
        ],
    )
    def test_by_address(
        self, path: str, address: str, headers: dict[str, str], allowed: bool
    ) -> None:
        response = Client(REMOTE_ADDR=address, headers=headers).get(path)

        assert (response.status_code != 403) is allowed

    @pytest.mark.parametrize("path", ["/metrics", "/healthz/deep"])
    @pytest.mark.parametrize(
        ("authorization", "allowed"),
        [
            ("Bearer the-token-0123456789", True),
            ("bearer the-token-0123456789", True),
            ("Bearer the-token-012345678", False),
            ("Basic the-token-0123456789", False),
            ("Bearer é", False),
            ("", False),
        ],
    )
    def test_by_token(self, path: str, authorization: str, allowed: bool, settings: Any) -> None:
        settings.METRICS_TOKEN = "the-token-0123456789"
        settings.OPS_ALLOWED_NETWORKS = []
        client = Client(REMOTE_ADDR="127.0.0.1", headers={"authorization": authorization})
        response = client.get(path)

        assert (response.status_code != 401) is allowed
        if not allowed:
            assert response.headers["WWW-Authenticate"] == "Bearer"
            assert "checks" not in response.content.decode()

    @pytest.mark.parametrize("path", ["/healthz", "/readyz"])
    def test_plain_probes_are_for_everybody(self, path: str, redis: Redis) -> None:
        headers = {"x-forwarded-for": "203.0.113.9"}
        client = Client(REMOTE_ADDR="203.0.113.9", headers=headers)

        assert client.get(path).status_code == 200


class TestWorkers:
    def test_what_it_tells_of_itself(self, worker: workers.WorkerHeartbeat, settings: Any) -> None:
        run = factories.ask()
        with leases.heartbeat().hold(run):
            worker.beat()
            assert Worker.objects.get().runs_in_hand == 1
        worker.beat()

        told = Worker.objects.get()
        assert told.worker == leases.worker_name()
        assert (told.name, told.concurrency, told.version) == ("worker-1", 4, settings.RELEASE)
        assert told.runs_in_hand == 0
        assert told.last_finished_at is not None
        assert list(Worker.objects.reading()) == [told]

    def test_one_that_drains_is_there_and_takes_nothing(
        self, worker: workers.WorkerHeartbeat
    ) -> None:
        worker.drain()

        assert Worker.objects.alive().exists()
        assert not Worker.objects.reading().exists()

    def test_one_that_has_left_does_not_come_back(self, worker: workers.WorkerHeartbeat) -> None:
        worker.leave()
        worker.beat()

        assert not Worker.objects.exists()

    def test_a_beat_is_one_update(
        self, worker: workers.WorkerHeartbeat, django_assert_num_queries: Any
    ) -> None:
        with django_assert_num_queries(3):  # with the begin and the end of its transaction
            worker.beat()

    def test_a_killed_one_is_not_alive_and_later_forgotten(
        self, worker: workers.WorkerHeartbeat
    ) -> None:
        Worker.objects.update(beat_at=timezone.now() - timedelta(minutes=1))
        workers.delete_gone()
        assert Worker.objects.exists()
        assert not Worker.objects.alive().exists()

        Worker.objects.update(beat_at=timezone.now() - LONG_AGO)
        workers.delete_gone()
        assert not Worker.objects.exists()
