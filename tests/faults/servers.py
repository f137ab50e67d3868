"""The servers around the system, each of a test's own, so that it may be killed, wiped and starved."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import tempfile
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Self

import psycopg
import redis

from tests.faults.proxy import Proxy
from tests.ports import free_port
from tests.redisserver import redis_executable
from tests.synapse import wait_for

OWNER = "postgres"
ROLE = "botrealm"
POSTGRESQL = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))


class RedisServer:
    """A Redis that persists nothing, or with `aof` an append-only file. `line` leads to it."""

    def __init__(self, directory: Path, *, aof: bool = False) -> None:
        self.directory = directory
        self.port = free_port()
        self.aof = aof
        self.line = Proxy(self.port)
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.line.__enter__()
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.line.__exit__()
        self.kill()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.line.port}/0"

    def client(self) -> redis.Redis:
        """Return a connection of the test's own, around the proxy."""
        return redis.Redis(port=self.port, socket_timeout=20)

    def start(self) -> None:
        options = f"--port {self.port} --bind 127.0.0.1 --loglevel warning".split()
        options += ["--appendonly", "yes" if self.aof else "no", "--save", ""]
        # A name of its own from version 7 on, which `DEBUG` needs then.
        if _major_version() >= 7:
            options += ["--enable-debug-command", "local"]
        self.process = subprocess.Popen(
            [redis_executable(), *options], cwd=self.directory, stdout=subprocess.DEVNULL
        )
        wait_for("Redis to answer", self._answers)

    def _answers(self) -> bool:
        with suppress(redis.RedisError), closing(self.client()) as client:
            return bool(client.ping())
        return False

    def kill(self, signum: int = signal.SIGKILL) -> None:
        process, self.process = self.process, None
        if process is not None:
            process.send_signal(signum)
            process.wait(60)

    def shut_down(self) -> None:
        """Stop it cleanly; nothing is saved."""
        with closing(self.client()) as client, suppress(redis.RedisError):
            client.shutdown(nosave=True)
        assert self.process is not None
        self.process.wait(60)
        self.process = None


def _major_version() -> int:
    output = subprocess.run(
        [redis_executable(), "--version"], capture_output=True, text=True, check=True
    ).stdout
    return int(output.partition("v=")[2].partition(".")[0])


class SQLite:
    vendor = "sqlite"

    def __init__(self, directory: Path) -> None:
        self.path = directory / "db.sqlite"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        """Do nothing: the file is removed with its directory."""

    @property
    def url(self) -> str:
        return f"sqlite:///{self.path}"

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(self.path, timeout=20)) as connection:
            return connection.execute(query).fetchall()


class PostgreSQL:
    """A cluster of its own; `line` leads to it. What has been committed survives its crash."""

    vendor = "postgresql"

    def __init__(self) -> None:
        self.bin = POSTGRESQL[-1].parent
        self.directory = Path(tempfile.mkdtemp(prefix="faults-pg-"))
        self.port = free_port()
        self.line = Proxy(self.port)

    def __enter__(self) -> Self:
        if os.getuid() == 0:
            shutil.chown(self.directory, "postgres")
        self._run(
            "initdb", "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale", "C.UTF-8", "-N"
        )
        self.start()
        with self.connect(OWNER) as server:
            # Limits do not apply to superusers.
            server.execute(f"CREATE ROLE {ROLE} LOGIN")
            server.execute(f"CREATE DATABASE {ROLE} OWNER {ROLE}")
        self.line.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self.line.__exit__()
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)

    @property
    def url(self) -> str:
        return f"postgres://{ROLE}@127.0.0.1:{self.line.port}/{ROLE}"

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        with self.connect() as connection:
            return connection.execute(query).fetchall()  # type: ignore[arg-type]

    def connect(self, database: str = ROLE) -> psycopg.Connection[tuple[Any, ...]]:
        """Return a connection of the test's own, around the proxy, as the superuser."""
        url = f"postgres://{OWNER}@127.0.0.1:{self.port}/{database}"
        return psycopg.connect(url, autocommit=True, connect_timeout=10)

    def start(self) -> None:
        options = f"-p {self.port} -k {self.directory} -c listen_addresses=127.0.0.1"
        # It is the server that crashes here, not the machine: the disk need not be waited for.
        options += " -c max_connections=200 -c fsync=off"
        self._run("pg_ctl", "-l", str(self.directory / "log"), "-w", "-o", options, "start")

    def stop(self) -> None:
        """At once, as in a crash."""
        self._run("pg_ctl", "-m", "immediate", "-w", "stop")

    def _run(self, program: str, *options: str) -> None:
        become = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
        command = [*become, str(self.bin / program), "-D", str(self.directory / "data"), *options]
        done = subprocess.run(
            command,
            cwd=self.directory,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            check=False,
            timeout=180,
        )
        assert not done.returncode, done.stderr.decode()


Database = SQLite | PostgreSQL
