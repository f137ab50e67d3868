"""The system under test: all its processes, and the servers around it, each behind a proxy.

with Plant("sqlite") as plant:
    with plant.load(runs=20).running():
        plant.redis.kill()
        plant.redis.start()
    plant.settle()
    check(plant, "Redis is killed")
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Self

import psutil

from tests.fakes.llm import Call, FakeLLM, Reply
from tests.faults.client import Asked, Client, Load
from tests.faults.servers import POSTGRESQL, PostgreSQL, RedisServer, SQLite
from tests.system.stack import BASE_DIR, Stack

# Not so short that it lapses when the machine is busy.
LEASE_SECONDS = 5
RECENT_MESSAGES = 1000
MAX_ATTEMPTS = 5
WORKERS = ("worker", "worker2")
ENDED = re.compile(
    r"(?:exited|stopped): (?P<program>\S+) \((?P<how>exit status \d+|terminated by \w+)"
)
UNSETTLED = """
    SELECT (SELECT count(*) FROM agents_run WHERE due_at IS NOT NULL),
           (SELECT count(*) FROM agents_event WHERE published_at IS NULL)
"""


class Plant:
    """Two workers, two web processes, a Redis, a database and a model endpoint. `env` adds to the
    environment of the processes."""

    def __init__(self, vendor: str = "sqlite", **env: str) -> None:
        self.vendor = vendor
        self.env = env
        self.directory = Path(tempfile.mkdtemp(prefix="faults-"))
        self._open = ExitStack()
        self._numbers = itertools.count(1)

    def __enter__(self) -> Self:
        with ExitStack() as opening:
            opening.callback(shutil.rmtree, self.directory, ignore_errors=True)
            self.llm = opening.enter_context(FakeLLM(answer))
            self.redis = opening.enter_context(RedisServer(self.directory))
            database = PostgreSQL() if self.vendor == "postgresql" else SQLite(self.directory)
            self.database = opening.enter_context(database)
            settings = {
                "DATABASE_URL": self.database.url,
                "REDIS_URL": self.redis.url,
                "STACK_WORKERS": str(len(WORKERS)),
                "AGENT_LEASE_SECONDS": str(LEASE_SECONDS),
                "AGENT_MAX_ATTEMPTS": str(MAX_ATTEMPTS),
                "WORKER_CONCURRENCY": "40",
                "WORKER_GRACE_SECONDS": "10",
                # No summaries, but of hundreds of questions: each is one call of the model.
                "CHAT_MEMORY_RECENT_MESSAGES": str(RECENT_MESSAGES),
                "LOG_LEVELS": "*=info",
                "STACK_MATRIX": "false",
            }
            self.stack = opening.enter_context(Stack(self.llm.url, **(settings | self.env)))
            self._open = opening.pop_all()
        self.client = Client(self.stack.port)
        self.begin()
        return self

    def __exit__(self, *exc: object) -> None:
        if logs := os.environ.get("FAULTS_LOGS"):
            kept = Path(tempfile.mkdtemp(prefix="stack-", dir=logs))
            for path in [*self.stack.directory.glob("*.log*"), *self.directory.glob("*.log")]:
                shutil.copy(path, kept)
        self._open.close()

    @property
    def postgresql(self) -> PostgreSQL:
        assert isinstance(self.database, PostgreSQL)
        return self.database

    def begin(self) -> None:
        """Forget what was counted: the next scenario begins."""
        self.llm.reset(answer)
        self.client = Client(self.stack.port)
        self.mended_at: float | None = None
        self.recovery = 0.0
        self._ended_before = self._ended()

    def load(
        self,
        runs: int,
        *,
        threads: int = 8,
        persons: int = 8,
        pause: float = 0.1,
        seed: int = 0,
        burst: int = 0,
    ) -> Load:
        return Load(
            self.client,
            runs=runs,
            threads=threads,
            persons=persons,
            pause=pause,
            seed=seed,
            burst=burst,
        )

    def mended(self) -> None:
        """End the fault: the time until all runs have ended starts here."""
        self.mended_at = time.monotonic()

    def settle(self, seconds: float = 240) -> None:
        """Wait until every run has ended and every event has been published."""
        since = self.mended_at or time.monotonic()

        def ended() -> bool:
            with suppress(Exception):  # the database may still be coming up
                return self.database.rows(UNSETTLED)[0][0] == 0
            return False

        def published() -> bool:
            return self.database.rows(UNSETTLED)[0] == (0, 0)

        self.stack.wait("all runs to end", ended, seconds)
        self.recovery = time.monotonic() - since
        self.stack.wait("all events to be published", published, seconds)

    def number(self) -> int:
        """One that no other question of this plant has."""
        return next(self._numbers)

    def thread(self, name: str) -> str:
        """Return the id of an empty thread."""
        return f"{name}-{self.number()}"

    def holder(self, asked: Asked) -> int:
        """Return the pid of the worker that claimed the run last."""
        query = f"SELECT worker FROM agents_run WHERE id = '{asked.run_id}'"
        return int(self.database.rows(query)[0][0].split(":")[1])

    def attempt(self, asked: Asked) -> int:
        return int(
            self.database.rows(f"SELECT attempt FROM agents_run WHERE id = '{asked.run_id}'")[0][0]
        )

    def wait_for_calls(self, count: int = 1, seconds: float = 90) -> None:
        """Until the model has been asked so many more times: work goes on."""
        self.llm.wait_for_requests(len(self.llm.requests) + count, seconds)

    def kill(self, program: str, signum: int = signal.SIGKILL) -> int:
        """Return the pid of the process that was hit; 0 while the program was restarting."""
        pid = self.stack.pid(program)
        if pid:
            with suppress(ProcessLookupError):
                os.kill(pid, signum)
        return pid

    def wait_up(self, seconds: float = 240) -> None:
        """Wait until every program runs and a worker reads the stream."""
        self.stack.wait("all programs to run", lambda: not self.stack.down(), seconds)
        self.stack.wait_ready(seconds)

    def extra_worker(self, **env: str) -> subprocess.Popen[bytes]:
        """Start one that is not restarted, with the environment of the others and `env`."""
        pid = self.stack.pid(WORKERS[0])
        process = psutil.Process(pid)
        with (self.directory / "extra.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "celery", "--quiet", "-A", "config", "worker"],
                cwd=BASE_DIR,
                env=process.environ() | env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def endings(self) -> Counter[tuple[str, str]]:
        """How often each program ended in which way since the scenario began."""
        return self._ended() - self._ended_before

    def _ended(self) -> Counter[tuple[str, str]]:
        log = "".join(
            path.read_text(errors="replace")
            for path in sorted(self.stack.directory.glob("supervisord.log*"))
        )
        ended = ((found["program"], found["how"]) for found in ENDED.finditer(log))
        return Counter(each for each in ended if each[0] != "ready")


def answer(call: Call) -> Reply:
    """Return the seconds of an answer, by the message's text: 0.05 to 0.6."""
    latency = 0.05 + sum(call.last_user.encode()) % 12 * 0.05
    return Reply(latency=latency / 2, deltas=4, delta_latency=latency / 8)


def available(vendor: str) -> bool:
    return vendor == "sqlite" or bool(POSTGRESQL)
