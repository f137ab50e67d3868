"""A private PostgreSQL of a test, with passwords and few connections, and PgBouncer in front of it."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg
import pytest

from tests.ports import free_port

PASSWORD = "canary-Pw/0123@456:789"  # needs percent-encoding
START_SECONDS = 60
SETTINGS = (
    "-c fsync=off -c full_page_writes=off -c synchronous_commit=off -c listen_addresses=127.0.0.1"
)


@dataclass(frozen=True)
class Database:
    port: int
    user: str = "postgres"
    password: str = PASSWORD
    name: str = "postgres"

    @property
    def url(self) -> str:
        """Return the value of DATABASE_URL."""
        secret = quote(self.password, safe="")
        return f"postgres://{self.user}:{secret}@127.0.0.1:{self.port}/{self.name}"

    def connect(self) -> psycopg.Connection[Any]:
        return psycopg.connect(
            host="127.0.0.1",
            port=self.port,
            user=self.user,
            password=self.password,
            dbname=self.name,
            autocommit=True,
        )


@contextmanager
def postgresql(*, max_connections: int = 100) -> Iterator[Database]:
    """Run a PostgreSQL that asks for a password. Skips the test where it is not installed."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not programs:
        pytest.skip("PostgreSQL is not installed")
    initdb, postgres = programs[-1], programs[-1].with_name("postgres")
    with _folder() as folder:
        password = folder / "password"
        password.write_text(PASSWORD)
        _give(password)
        common = ["-A", "scram-sha-256", "-E", "UTF8", "--locale", "C.UTF-8", "-N"]
        _run([initdb, "-D", folder / "data", "-U", "postgres", "--pwfile", password, *common])
        database = Database(free_port())
        options = [*SETTINGS.split(), "-c", f"max_connections={max_connections}"]
        with _started(
            [postgres, "-D", folder / "data", "-p", str(database.port), "-k", folder, *options],
            folder / "log",
            # A fast shutdown, which waits for no client.
            stop=signal.SIGINT,
        ) as process:
            _wait(database, process, folder / "log")
            yield database


@contextmanager
def pgbouncer(of: Database, mode: str, **settings: str) -> Iterator[Database]:
    """Run a PgBouncer in front of the database. Skips the test where it is not installed."""
    program = shutil.which("pgbouncer") or shutil.which("/usr/sbin/pgbouncer")
    if program is None:
        pytest.skip("PgBouncer is not installed")
    with _folder() as folder:
        database = Database(free_port(), of.user, of.password, of.name)
        lines = {
            "listen_addr": "127.0.0.1",
            "listen_port": str(database.port),
            "unix_socket_dir": "",
            "auth_type": "plain",
            "auth_file": f"{folder}/users",
            "pool_mode": mode,
            "default_pool_size": "4",
            **settings,
        }
        (folder / "users").write_text(f'"{of.user}" "{of.password}"\n')
        (folder / "pgbouncer.ini").write_text(
            f"[databases]\n* = host=127.0.0.1 port={of.port}\n[pgbouncer]\n"
            + "".join(f"{name} = {value}\n" for name, value in lines.items())
        )
        for file in folder.iterdir():
            _give(file)
        with _started([program, folder / "pgbouncer.ini"], folder / "log") as process:
            _wait(database, process, folder / "log")
            yield database


def _owner() -> dict[str, Any]:
    """Return the account that runs the servers, which refuse root; empty for this one."""
    if os.getuid() != 0:
        return {}
    account = pwd.getpwnam("postgres")
    return {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}


def _give(path: Path) -> None:
    if owner := _owner():
        os.chown(path, owner["user"], owner["group"])


@contextmanager
def _folder() -> Iterator[Path]:
    # Not that of pytest: another account cannot enter it.
    with tempfile.TemporaryDirectory(prefix="pg-") as name:
        _give(Path(name))
        yield Path(name)


def _run(command: list[object]) -> None:
    subprocess.run(
        [str(part) for part in command],
        **_owner(),
        check=True,
        stdout=subprocess.DEVNULL,
        timeout=START_SECONDS,
        cwd="/",
    )


@contextmanager
def _started(
    command: list[object], log: Path, *, stop: signal.Signals = signal.SIGTERM
) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(part) for part in command], **_owner(), stdout=output, stderr=output, cwd="/"
        )
    try:
        yield process
    finally:
        process.send_signal(stop)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(20)


def _wait(database: Database, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(psycopg.OperationalError), database.connect():
            return
        time.sleep(0.05)
    raise AssertionError(log.read_text(errors="replace")[-3000:])
