import os
import secrets
from collections.abc import Iterator
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest

from tests.fakes.llm import FakeLLM
from tests.system.stack import Stack


@pytest.fixture(scope="session")
def database() -> Iterator[dict[str, str]]:
    """Yield additions to a stack's environment: an empty database where the tests run on PostgreSQL;
    none where they run on SQLite, as each stack has its own file."""
    url = os.environ.get("DATABASE_URL", "")
    if not url.startswith("postgres"):
        yield {}
        return
    name = f"system_{secrets.token_hex(4)}"
    with psycopg.connect(url, autocommit=True) as server:
        server.execute(f"CREATE DATABASE {name}")
        yield {"DATABASE_URL": urlunsplit(urlsplit(url)._replace(path=f"/{name}"))}
        server.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def llm() -> Iterator[FakeLLM]:
    with FakeLLM() as server:
        yield server


@pytest.fixture(scope="session")
def running(llm: FakeLLM, database: dict[str, str]) -> Iterator[Stack]:
    """Yield one stack for the files that tests/conftest.py names in SHARED_STACK."""
    with Stack(llm.url, AGENT_LEASE_SECONDS="8", **database) as stack:
        yield stack


@pytest.fixture
def stack(running: Stack, llm: FakeLLM) -> Stack:
    """Return the shared stack, ready, with a model that answers as usual."""
    llm.reset()
    running.wait_ready()
    return running
