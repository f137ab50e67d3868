"""The whole system with a Redis behind TLS that knows users."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.fakes.llm import FakeLLM
from tests.system.stack import BASE_DIR, Stack, clean_environment
from tests.system.test_start_and_stop import doctor
from tests.tls import (
    ENCODED,
    PASSWORD,
    USER,
    Authority,
    plain_listener,
    redis_with_users,
    tls_front,
)

pytestmark = pytest.mark.system

MESSAGES = 30


@contextmanager
def behind_a_front(folder: Path, authority: Authority) -> Iterator[int]:
    certificate, key = authority.issue("server", "localhost")
    with redis_with_users(folder) as plain, tls_front(plain, certificate, key) as port:
        yield port


@contextmanager
def of_its_own(folder: Path, authority: Authority) -> Iterator[int]:
    """Start a Redis built with TLS, as Debian's is; it requires a client certificate."""
    executable = os.environ.get("TLS_REDIS_SERVER") or shutil.which("redis-server")
    if not executable:
        pytest.skip("no redis-server on the PATH, and no TLS_REDIS_SERVER")
    certificate, key = authority.issue("server", "localhost")
    files = (
        f"--tls-cert-file {certificate} --tls-key-file {key} --tls-ca-cert-file {authority.file}"
    )
    # Without TLS in its build it has no such option.
    built = subprocess.run(
        [executable, "--port", "0", "--tls-port", "0", "--maxmemory", "nonsense"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    if "tls-port" in built.stdout + built.stderr:
        pytest.skip("redis-server is built without TLS")
    with redis_with_users(folder, *files.split(), executable=executable) as port:
        yield port


@pytest.mark.parametrize("server", [behind_a_front, of_its_own])
def test_every_message_is_answered(server: Any, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    mine, key = authority.issue("client")
    with (
        server(tmp_path, authority) as port,
        FakeLLM() as llm,
        Stack(
            llm.url,
            REDIS_URL=f"rediss://{USER}:{ENCODED}@localhost:{port}/2",
            REDIS_CA_FILE=str(authority.file),
            REDIS_CLIENT_CERT_FILE=str(mine),
            REDIS_CLIENT_KEY_FILE=str(key),
        ) as stack,
        httpx2.Client(base_url=f"{stack.url}/api/chat", timeout=30) as client,
    ):
        asked = [
            client.post("/messages", json={"content": f"number {n}"}).json()["runId"]
            for n in range(MESSAGES)
        ]

        def answered() -> bool:
            runs = (client.get(f"/runs/{run}").json()["run"] for run in asked)
            return all(run["status"] == "completed" for run in runs)

        stack.wait("all answers", answered, 120)
        examined = doctor(stack)
        shown = [
            subprocess.run(
                [sys.executable, "-m", "celery", "-A", "config", "inspect", what, "--timeout=10"],
                env=stack.env,
                cwd=BASE_DIR,
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            ).stdout
            for what in ("stats", "conf", "report")
        ]

        assert f"Celery is connected to rediss://localhost:{port}/2." in examined.stdout
        assert examined.returncode == 0, examined.stdout
        assert all("1 node online" in each for each in shown), shown
        told = stack.log() + examined.stdout + examined.stderr + "".join(shown)
        assert PASSWORD not in told
        assert ENCODED not in told


def test_a_worker_sends_no_password_to_a_server_without_tls(tmp_path: Path) -> None:
    """Neither over the connections of Celery nor over those of its loops."""
    with plain_listener() as listener:
        worker = subprocess.Popen(
            [sys.executable, "-m", "celery", "--quiet", "-A", "config", "worker"],
            env=clean_environment()
            | {
                "REDIS_URL": f"rediss://{USER}:{ENCODED}@localhost:{listener.port}/0",
                "DATABASE_URL": f"sqlite:///{tmp_path}/db.sqlite",
                "WORKER_GRACE_SECONDS": "0",
            },
            cwd=BASE_DIR,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            assert worker.stdout
            told = ""
            while "REDIS_URL: the TLS handshake" not in told or len(listener.connections) < 6:
                line = worker.stdout.readline()
                assert line, told
                told += line
        finally:
            os.killpg(worker.pid, signal.SIGKILL)
            worker.wait(30)
            worker.stdout.close()

    assert listener.nothing_of(PASSWORD, ENCODED, USER, "AUTH")
    assert PASSWORD not in told
    assert ENCODED not in told
