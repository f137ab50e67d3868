import importlib
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import redis as redis_client
from django.db import connection
from rest_framework.test import APIClient
from xdist.scheduler import LoadFileScheduling

from agents.events import publisher, stream
from agents.llm import transport
from lib import process, revocations
from ops import health, metrics
from realm import throttles
from tests.config.starting import Start, Starter
from tests.fakes import receiver
from tests.fakes.llm import FakeLLM
from tests.ports import free_port
from tests.redisserver import redis_executable

# Folders and files whose subject writes SQL, locks rows or leans on indexes; a single test
# elsewhere is marked `own_sql`. The others reach the database by the ORM alone.
OWN_SQL = (
    "agents/",
    "botrunner/",
    "webhooks/",
    "chat/test_reading.py",
    "chat/test_threads.py",
    "console/test_audit.py",
    "console/test_bulk.py",
    "console/test_home.py",
    "console/test_limits.py",
    "console/test_paging.py",
    "console/test_system.py",
    "ops/test_doctor.py",
    "lib/test_db.py",
)
# Files that run on the stack of tests/system/conftest.py: all that they kill is started again.
SHARED_STACK = (
    "tests/system/test_chat.py",
    "tests/system/test_long_thread.py",
    "tests/system/test_streams.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--of-the-database",
        choices=("all", "own"),
        help="run only the tests that use the database, and so may differ on another one; own: only "
        "those of them whose subject speaks SQL of its own",
    )
    parser.addoption(
        "--operations",
        type=int,
        default=400,
        help="how many operations tests/agents/test_crowd.py carries out side by side",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if which := config.getoption("--of-the-database"):
        chosen = [
            item
            for item in items
            if _uses_the_database(item) and (which == "all" or _speaks_sql(item))
        ]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
        items[:] = chosen


class SharedStacks(LoadFileScheduling):
    """As --dist loadfile, but files with the same stack go to one process; --dist loadgroup groups none
    with pytest 9.2 (findings/xdist_loadgroup.sh)."""

    def _split_scope(self, nodeid: str) -> str:
        file = str(super()._split_scope(nodeid))
        return "shared stack" if file in SHARED_STACK else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> SharedStacks | None:
    return SharedStacks(config, log) if config.getvalue("dist") == "loadfile" else None


def _speaks_sql(item: pytest.Item) -> bool:
    path = item.path.relative_to(Path(__file__).parent).as_posix()
    return path.startswith(OWN_SQL) or item.get_closest_marker("own_sql") is not None


def _uses_the_database(item: pytest.Item) -> bool:
    fixtures = getattr(item, "fixturenames", ())
    marked = item.get_closest_marker("django_db") is not None
    return marked or not {"db", "transactional_db", "live_server"}.isdisjoint(fixtures)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Iterator[None]:
    """Some tests make up text of which half a character is logged; pytest-xdist carries none of it."""
    report = yield
    report.sections = [
        (name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections
    ]
    return report


@pytest.fixture(scope="session")
def django_db_setup(django_db_setup: None, django_db_blocker: Any) -> Iterator[None]:
    """Disconnect all at the end: PostgreSQL drops no database with open connections, and the garbage
    collector alone closes that of a thread that has ended."""
    yield
    if connection.vendor == "postgresql":
        with django_db_blocker.unblock(), connection.cursor() as cursor:
            cursor.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )


@pytest.fixture(scope="session")
def _llm_server() -> Iterator[FakeLLM]:
    # The first call loads the SDK; on a busy machine that takes longer than a lease is kept that no
    # other connection can see, for all that happens in the transaction of a test.
    importlib.import_module("openai")
    with FakeLLM() as server:
        yield server


@pytest.fixture
def model(_llm_server: FakeLLM, settings: Any) -> Iterator[FakeLLM]:
    """The model endpoint, scripted by the test."""
    _llm_server.reset()
    settings.OPENAI_BASE_URL = _llm_server.url
    settings.OPENAI_API_KEY = "sk-canary-0123456789"
    # Left to the garbage, its connections are warned of in another test.
    transport.close()
    yield _llm_server
    transport.close()


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real Redis of the test run's own; its URL."""
    folder = tmp_path_factory.mktemp("redis")
    process = None
    for _ in range(5):
        port = free_port()
        if process := _started_redis(folder, port):
            break
    assert process, "Redis does not start."
    yield f"redis://127.0.0.1:{port}/0"
    process.terminate()
    process.wait(timeout=60)


def _started_redis(folder: Path, port: int) -> subprocess.Popen[bytes] | None:
    """None where another process has got the port first, such as the Redis of tests beside these."""
    process = subprocess.Popen(
        [
            redis_executable(),
            *f"--port {port} --bind 127.0.0.1 --appendonly no".split(),
            "--save",
            "",
        ],
        cwd=folder,
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    with redis_client.Redis(port=port) as client:
        while process.poll() is None:
            with suppress(redis_client.RedisError):
                if client.info("server")["process_id"] == process.pid:
                    return process
            assert time.monotonic() < deadline
            time.sleep(0.02)
    return None


@pytest.fixture
def redis(redis_server: str, settings: Any) -> Iterator[redis_client.Redis]:
    """An empty Redis, in use by the code under test."""
    settings.REDIS_URL = redis_server
    process.reset()
    client = redis_client.Redis.from_url(redis_server)
    client.flushall()
    yield client
    process.reset()
    client.close()


@pytest.fixture(autouse=True)
def _fresh_process() -> Iterator[None]:
    process.reset()
    yield
    process.reset()


@pytest.fixture(autouse=True)
def _patience() -> Iterator[None]:
    """What a busy machine is late with is not away; who tests what is away says for how long. No
    `monkeypatch`: what a test patches would be undone after the database was made empty."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "REQUEST_SECONDS", 30)
        patch.setattr(publisher, "PUBLISH_SECONDS", 30)
        patch.setattr(throttles, "REDIS_SECONDS", 30)
        patch.setattr(revocations, "PUBLISH_SECONDS", 30)
        patch.setattr(health, "PATIENCE_SECONDS", 30)
        patch.setattr(metrics, "PATIENCE_SECONDS", 30)
        yield


@pytest.fixture(scope="session")
def start() -> Iterator[Start]:
    """Read the settings in a process with an environment of its own."""
    with Starter() as starter:
        yield starter.start


@pytest.fixture
def api() -> APIClient:
    """Return a client without a login."""
    return APIClient()


@pytest.fixture
def https_receiver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[type[receiver.Receiver]]:
    """Something at https://hooks.example.org that takes what is posted."""
    with receiver.running(tmp_path, monkeypatch) as found:
        yield found
