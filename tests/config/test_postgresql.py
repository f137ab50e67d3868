"""PostgreSQL's own reasons without the password, few connections, and PgBouncer."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from django.db import OperationalError
from django.db.utils import ConnectionHandler
from django.test import Client

from config import env
from config.server.postgresql import base
from lib import db, timeouts
from ops import doctor, health
from tests.postgresql import PASSWORD, Database, pgbouncer, postgresql

POOL = {"min_size": 1, "max_size": 16, "timeout": 5, "reconnect_timeout": 5, "max_idle": 0.2}
Connect = Callable[..., base.DatabaseWrapper]


@pytest.fixture(scope="module")
def server() -> Iterator[Database]:
    with postgresql(max_connections=12) as database:
        yield database


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch, django_db_blocker: Any) -> Iterator[Connect]:
    """Return a function that makes the connection of a process that has just started."""
    made: list[base.DatabaseWrapper] = []

    def connect(url: str, **pool: Any) -> base.DatabaseWrapper:
        monkeypatch.setenv("DATABASE_URL", url)
        config = env.database("DATABASE_URL", "", base=Path("/"))
        options = {"connect_timeout": 5, **config.get("OPTIONS", {}), "pool": POOL | pool}
        handler = ConnectionHandler({"default": config | {"OPTIONS": options}})
        made.append(handler["default"])
        made[-1]._connection_pools = {}
        return made[-1]

    monkeypatch.setattr(base.Connection, "failure", "")
    monkeypatch.setattr(base.Connection, "succeeded", False)
    monkeypatch.setattr(db, "availability", db.Availability())
    with django_db_blocker.unblock():
        yield connect
    for each in made:
        each.close()
        each.close_pool()


def failure(connection: base.DatabaseWrapper) -> str:
    with pytest.raises(OperationalError) as found:
        connection.ensure_connection()
    return str(db.why(found.value))


class TestReasons:
    @pytest.mark.parametrize(
        ("change", "query", "reason"),
        [
            ({"password": "canary-1"}, "", 'password authentication failed for user "postgres"'),
            ({"password": "c/4@n:?#ary%"}, "", "password authentication failed"),
            ({"password": ""}, "", "no password supplied"),
            ({"password": ""}, "?password=canary-2", "password authentication failed"),
            ({"name": "nowhere"}, "", 'database "nowhere" does not exist'),
            ({"user": "nobody"}, "", 'password authentication failed for user "nobody"'),
            ({}, "?sslmode=loud", 'invalid sslmode value: "loud"'),
            ({}, "?sslmode=require", "server does not support SSL"),
            ({}, "?colour=red", 'invalid connection option "colour"'),
            ({}, "?options=-c%20colour%3Dred", 'unrecognized configuration parameter "colour"'),
        ],
    )
    def test_a_lasting_one_is_reported_at_once(
        self,
        change: dict[str, Any],
        query: str,
        reason: str,
        server: Database,
        connect: Connect,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        database = Database(**{"port": server.port} | change)
        started = time.monotonic()

        found = failure(connect(database.url + query))

        assert time.monotonic() - started < 3
        assert found.startswith("DATABASE_URL: ")
        assert reason in found
        assert reason in caplog.text
        for secret in ("canary", "ary%", quote("ary%"), PASSWORD, quote(PASSWORD, safe="")):
            assert secret not in found + caplog.text

    def test_a_password_from_elsewhere(
        self, server: Database, connect: Connect, monkeypatch: Any, tmp_path: Path
    ) -> None:
        url = Database(server.port, password="").url
        monkeypatch.setenv("PGPASSWORD", "canary-3")
        assert "password authentication failed" in failure(connect(url))

        monkeypatch.delenv("PGPASSWORD")
        file = tmp_path / "pgpass"
        file.touch(mode=0o600)
        file.write_text("*:*:*:*:canary-4\n")
        monkeypatch.setenv("PGPASSFILE", str(file))
        found = failure(connect(url))
        assert "password authentication failed" in found
        assert "canary" not in found

    @pytest.mark.parametrize(
        ("host", "reason"),
        [("127.0.0.1:1", "Connection refused"), ("nowhere.invalid", "nowhere.invalid")],
    )
    def test_one_that_may_pass_is_retried_for_a_while(
        self, host: str, reason: str, connect: Connect
    ) -> None:
        connection = connect(f"postgres://me:canary-5@{host}/x", timeout=0.5, reconnect_timeout=0.2)

        assert reason in (found := failure(connection))
        assert "canary" not in found

    def test_too_many_clients_with_what_to_do_and_then_enough(
        self, server: Database, connect: Connect, caplog: pytest.LogCaptureFixture
    ) -> None:
        connection = connect(
            server.url.replace("postgres:", "few:", 1).replace("few:", "postgres:")
        )
        with ExitStack() as others:
            for _ in range(12):
                others.enter_context(server.connect())
            found = failure(connection)
        assert "too many clients already. Run fewer processes, lower DATABASE_POOL_SIZE" in found
        assert "too many clients already" in caplog.text

        connection.ensure_connection()

    @pytest.mark.django_db
    def test_probes_report_it_to_operators_only(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def unavailable() -> health.Check:
            raise OperationalError('FATAL: database "nowhere" does not exist')

        checks = {"database": timeouts.BoundedCheck(unavailable)}
        monkeypatch.setattr(health, "READINESS", checks)

        near = Client().get("/readyz").json()["checks"]["database"]
        far = Client(headers={"X-Forwarded-For": "203.0.113.9"}).get("/readyz").json()

        assert near["reason"] == 'DATABASE_URL: FATAL: database "nowhere" does not exist.'
        assert far["checks"]["database"] == {"ok": False, "error": "OperationalError"}

    def test_the_doctor_reports_it_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def unavailable() -> doctor.Findings:
            raise OperationalError("FATAL: the reason")
            yield

        monkeypatch.setattr(doctor, "CHECKS", {"database": unavailable, "workers": unavailable})

        assert [each.message for each in doctor.examine()] == [
            "DATABASE_URL: FATAL: the reason.",
            "Not checked: the database is unavailable.",
        ]


class TestFewConnections:
    def test_a_process_opens_a_quarter_of_them(self, server: Database, connect: Connect) -> None:
        connection = connect(server.url)
        connection.ensure_connection()

        assert connection.pool
        assert connection.pool.max_size == 2

    def test_a_role_may_have_a_limit_of_its_own(self, server: Database, connect: Connect) -> None:
        with server.connect() as admin:
            admin.execute(f"CREATE ROLE few LOGIN CONNECTION LIMIT 8 PASSWORD '{PASSWORD}'")
        connection = connect(Database(server.port, user="few").url)
        connection.ensure_connection()

        assert connection.pool
        assert connection.pool.max_size == 2

    def test_an_idle_pool_shrinks(self, server: Database, connect: Connect) -> None:
        with server.connect() as admin:
            admin.execute("CREATE DATABASE idle")
        connection = connect(Database(server.port, name="idle").url)
        connection.ensure_connection()
        pool = connection.pool
        assert pool
        pool.putconn(pool.getconn())
        connection.close()

        deadline = time.monotonic() + 20
        while pool.get_stats()["pool_size"] > 1:
            assert time.monotonic() < deadline
            time.sleep(0.02)


class TestPgBouncer:
    def test_its_refusal_says_what_to_set(self, server: Database, connect: Connect) -> None:
        with pgbouncer(server, "transaction") as bouncer:
            found = failure(connect(f"{bouncer.url}?options=-c%20work_mem%3D8MB"))

        assert "startup parameter" in found
        assert "set DATABASE_PGBOUNCER=transaction" in found

    def test_in_session_mode_the_guard_is_set(
        self, server: Database, connect: Connect, settings: Any
    ) -> None:
        settings.DATABASE_PGBOUNCER = "session"
        with (
            pgbouncer(server, "session") as bouncer,
            connect(bouncer.url).cursor() as cursor,
        ):
            cursor.execute("SHOW idle_in_transaction_session_timeout")
            assert cursor.fetchone() == ("10s",)

    def test_in_transaction_mode_the_doctor_says_what_sets_it(
        self, server: Database, connect: Connect, settings: Any
    ) -> None:
        settings.DATABASE_PGBOUNCER = "transaction"

        def guard() -> list[Any]:
            with (
                pgbouncer(server, "transaction") as bouncer,
                connect(bouncer.url).cursor() as cursor,
            ):
                return list(doctor._guard(cursor))

        [(level, message, fix)] = guard()
        assert level == doctor.WARN
        assert "as PgBouncer refuses it" in message

        statement = fix.removeprefix("Run once: ").partition(";")[0]
        with server.connect() as admin:
            admin.execute(statement)
        assert guard() == [(doctor.OK, "Through PgBouncer, pool_mode transaction.", "")]
