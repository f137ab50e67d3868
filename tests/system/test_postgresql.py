"""The real processes with a PostgreSQL that permits few connections, and behind PgBouncer."""

import json
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

import psycopg
import pytest

from tests.fakes.llm import FakeLLM
from tests.postgresql import PASSWORD, Database, pgbouncer, postgresql
from tests.system.stack import BASE_DIR, Stack
from tests.system.test_start_and_stop import doctor

pytestmark = pytest.mark.system

PERMITTED = 12


@pytest.fixture(scope="module")
def server() -> Iterator[Database]:
    with postgresql(max_connections=PERMITTED) as database:
        yield database


@pytest.fixture(scope="module")
def model() -> Iterator[FakeLLM]:
    with FakeLLM() as llm:
        yield llm


def submit(stack: Stack, number: int) -> str:
    """Submit a message; return the status of its run, or that of the response."""
    request = urllib.request.Request(
        f"{stack.url}/api/chat/messages",
        json.dumps({"content": f"Message {number}"}).encode(),
        {"Content-Type": "application/json", "Prefer": "wait=50"},
    )
    try:
        with urllib.request.urlopen(request, timeout=90) as answer:
            return str(json.load(answer).get("run", {}).get("status", answer.status))
    except urllib.error.HTTPError as error:
        return str(error.code)


def submit_at_once(stack: Stack, count: int) -> Counter[str]:
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda number=number: found.append(submit(stack, number)))
        for number in range(count)
    ]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    return Counter(found)


def test_all_processes_work_with_few_connections_and_recover(
    server: Database, model: FakeLLM
) -> None:
    with Stack(model.url, DATABASE_URL=server.url, LOG_FORMAT="json") as stack:
        assert submit_at_once(stack, 30)["completed"] >= 25

        with ExitStack() as others:
            taken: list[psycopg.Connection[Any]] = []
            stack.wait("no connection to be left", lambda: take(server, taken, others))
            assert submit(stack, 0) == "503"
            stack.wait("the reason", lambda: "too many clients already" in stack.log())
        assert "Run fewer processes, lower DATABASE_POOL_SIZE" in stack.log()

        stack.wait("the web to recover", lambda: submit(stack, 1) == "completed")
        examined = doctor(stack).stdout
        assert "permits this role 9 connections: a process opens at most 2" in examined


def take(server: Database, taken: list[psycopg.Connection[Any]], others: ExitStack) -> bool:
    """Take the connections of the stack, as another program would; return whether all are taken."""
    if taken:
        mine = [connection.info.backend_pid for connection in taken]
        taken[0].execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE backend_type = 'client backend' AND NOT pid = ANY(%s)",
            [mine],
        )
    with suppress(psycopg.OperationalError):
        while True:
            taken.append(others.enter_context(server.connect()))
    return len(taken) == PERMITTED


@pytest.mark.parametrize("mode", ["transaction", "session"])
def test_through_pgbouncer(mode: str, server: Database, model: FakeLLM) -> None:
    with server.connect() as admin:
        admin.execute(f"CREATE DATABASE through_{mode}")
    of = Database(server.port, name=f"through_{mode}")
    size = {} if mode == "transaction" else {"default_pool_size": "8"}
    with (
        pgbouncer(of, mode, **size) as bouncer,
        Stack(
            model.url,
            DATABASE_URL=bouncer.url,
            DATABASE_PGBOUNCER=mode,
            LOG_FORMAT="json",
            DATABASE_POOL_SIZE="16" if mode == "transaction" else "2",
            is_new=True,
        ) as stack,
    ):
        assert submit_at_once(stack, 20)["completed"] >= 15
        examined = doctor(stack, DATABASE_URL=bouncer.url, DATABASE_PGBOUNCER=mode).stdout
        warning = "Transactions of a frozen process are never ended"
        assert (warning in examined) == (mode == "transaction")
        errors = [line for line in stack.log().splitlines() if '"level": "error"' in line]
        assert errors == []


def test_a_wrong_password_stops_the_stack_with_its_reason(server: Database) -> None:
    stack = Stack(DATABASE_URL=Database(server.port, password="canary-0123456789").url)
    process = subprocess.run(
        [sys.executable, "scripts/stack.py"],
        env=stack.env,
        cwd=BASE_DIR,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )

    assert process.returncode != 0
    assert 'password authentication failed for user "postgres"' in process.stderr
    assert process.stderr.strip().startswith("DATABASE_URL: ")
    assert len(process.stderr.strip().splitlines()) == 1
    assert "canary" not in process.stdout + process.stderr
    assert PASSWORD not in process.stdout + process.stderr
