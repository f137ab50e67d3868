"""A Redis or a database that answers and takes nothing: not ready, and what the doctor tells of it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from django.db import connection
from django.test import Client
from redis import Redis

from ops import doctor, health

pytestmark = pytest.mark.django_db(transaction=True)


@contextmanager
def full(redis: Redis, folder: Path) -> Iterator[None]:
    redis.config_set("maxmemory", "1")
    yield
    redis.config_set("maxmemory", "0")


@contextmanager
def replica(redis: Redis, folder: Path) -> Iterator[None]:
    redis.replicaof("127.0.0.1", "1")
    yield
    redis.replicaof("NO", "ONE")


@contextmanager
def alone(redis: Redis, folder: Path) -> Iterator[None]:
    redis.config_set("min-replicas-to-write", "1")
    yield
    redis.config_set("min-replicas-to-write", "0")


@contextmanager
def unable_to_save(redis: Redis, folder: Path) -> Iterator[None]:
    usual: Any = redis.config_get("dir")
    gone = folder / "gone"
    gone.mkdir()
    redis.config_set("dir", str(gone))
    redis.config_set("save", "3600 1000000")
    gone.rmdir()
    redis.bgsave()
    deadline = time.monotonic() + 60
    while redis.info("persistence")["rdb_last_bgsave_status"] != "err":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    yield
    redis.config_set("save", "")
    redis.config_set("dir", usual["dir"])


REFUSING = pytest.mark.parametrize(
    ("refusing", "reason"),
    [
        (full, "its memory is full"),
        (replica, "it is a replica"),
        (alone, "too few replicas are connected"),
        (unable_to_save, "it cannot save to its disk"),
    ],
)


@REFUSING
def test_not_ready_while_redis_takes_nothing(
    client: Client,
    redis: Redis,
    settings: Any,
    tmp_path: Path,
    refusing: Callable[..., Any],
    reason: str,
) -> None:
    """As where there is no Redis, which an operator may be content with."""
    with refusing(redis, tmp_path):
        without = client.get("/readyz")
        settings.OPS_READY_WITHOUT_REDIS = True
        content = client.get("/readyz")

    told = {"ok": False, "error": f"Redis refuses writes: {reason}."}
    assert (without.status_code, without.json()["checks"]["redis"]) == (503, told)
    assert content.status_code == 200
    settings.OPS_READY_WITHOUT_REDIS = False
    assert client.get("/readyz").status_code == 200


@REFUSING
def test_the_doctor_tries_both_connections(
    redis: Redis, tmp_path: Path, refusing: Callable[..., Any], reason: str
) -> None:
    with refusing(redis, tmp_path):
        found = [*doctor._redis(), *doctor._broker()]

    broken = [text for level, text, _ in found if level == doctor.BROKEN]
    assert len(broken) == 2
    assert broken[1] == f"Redis refuses writes: {reason}."
    assert broken[0] in (broken[1], "This Redis is a replica.")


@contextmanager
def read_only() -> Iterator[None]:
    on, off = ("PRAGMA query_only=1", "PRAGMA query_only=0")
    if connection.vendor == "postgresql":
        on, off = (f"SET default_transaction_read_only = {each}" for each in ("on", "off"))
    with connection.cursor() as cursor:
        cursor.execute(on)
        try:
            yield
        finally:
            cursor.execute(off)


def test_the_doctor_writes_to_the_database_and_leaves_nothing() -> None:
    with read_only():
        refused = list(doctor._database())
    taken = list(doctor._database())

    assert "The database refuses writes" in refused[-1][1]
    assert refused[-1][0] == doctor.BROKEN
    assert doctor.BROKEN not in {level for level, _, _ in taken}
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM django_migrations WHERE app = 'doctor'")
        assert cursor.fetchone()[0] == 0


@pytest.mark.skipif(connection.vendor != "postgresql", reason="of PostgreSQL")
def test_not_ready_while_postgresql_is_read_only() -> None:
    with read_only():
        assert health._database() == health.Check(False, {"error": "The database is read-only."})
    assert health._database().ok
