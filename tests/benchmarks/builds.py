"""Two builds side by side, driven by make, HTTP and the environment alone: what is inside of them may
have other names in each."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.benchmarks.load import Connection, connections
from tests.benchmarks.system import ask
from tests.fakes.llm import LLMProcess
from tests.ports import free_port
from tests.system.stack import (
    BASE_DIR,
    WITHOUT_LIMITS,
    clean_environment,
    process_cpu_seconds,
    process_memory,
)

# The first start installs the requirements and makes the tables.
BUILD_SECONDS = 900
START_SECONDS = 180
STOP_SECONDS = 60
# What was stopped may take so long to be gone.
VANISH_SECONDS = 5.0
# Variables as earlier commits call them.
OLDER_NAMES = {"LIMIT_USER_RUNS_WAITING": "0", "LIMIT_ROOM_RUNS_WAITING": "0"}
FINISHED = {"completed", "failed", "cancelled"}
# What pip needs to reach its cache and its index.
OF_PIP = ("PIP_", "SSL_CERT_", "REQUESTS_CA_", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")


class BuildFailed(Exception):
    """A build did not start, answer or stop as it should; the message ends with the end of its log."""


@dataclass(frozen=True)
class Build:
    """A tree with its own .venv, and an SQLite file with the tables that its migrations make."""

    name: str
    tree: Path
    database: Path

    @contextmanager
    def running(self, seconds: float = START_SECONDS) -> Iterator[Running]:
        """Yield a ready stack of this build; all of it is removed at the end."""
        folder = Path(tempfile.mkdtemp(prefix=f"bench-{self.name}-"))
        try:
            if self.database.exists():
                shutil.copy(self.database, folder / "db.sqlite")
            with LLMProcess() as llm:
                running = Running(self, folder, llm)
                try:
                    running.start(seconds)
                    yield running
                finally:
                    running.stop()
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def make(self) -> None:
        """Have make install what the tree requires, and keep the tables for the starts to come."""
        with self.running(BUILD_SECONDS) as running:
            asyncio.run(running.answer())
            running.stop()
            shutil.copy(running.folder / "db.sqlite", self.database)


class Running:
    """A stack started by `make run`."""

    def __init__(self, build: Build, folder: Path, llm: LLMProcess) -> None:
        self.build, self.folder, self.llm = build, folder, llm
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = folder / "output.log"
        self._make: subprocess.Popen[bytes] | None = None
        self._begun = 0.0

    def start(self, seconds: float) -> None:
        """Start it and return when it is ready."""
        self._begun = time.perf_counter()
        with self._log.open("wb") as output:
            self._make = subprocess.Popen(
                ["make", "--no-print-directory", "run"],
                cwd=self.build.tree,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the comparison, which stops the stack.
                preexec_fn=_heed_interrupts,
            )
        while not self._is_ready():
            if self._make.poll() is not None:
                raise BuildFailed(f"make run of {self.build.name} ended itself.\n{self._tail()}")
            if time.perf_counter() - self._begun > seconds:
                raise BuildFailed(
                    f"{self.build.name} was not ready in {seconds} s.\n{self._tail()}"
                )
            time.sleep(0.02)

    async def answer(self) -> float:
        """Seconds from the start to the answer to a first question."""
        self.llm.configure(latency=0)
        async with asyncio.timeout(START_SECONDS), connections(self.url, 1) as (connection,):
            run = (await ask(connection))["runId"]
            while (status := await status_of(connection, run)) not in FINISHED:
                await asyncio.sleep(0.02)
        if status != "completed":
            raise BuildFailed(f"The first run of {self.build.name} is {status}.\n{self._tail()}")
        return time.perf_counter() - self._begun

    def stop(self) -> None:
        """End it as Ctrl-C does. What survives is killed, and is an error."""
        if self._make is None:
            return
        make, self._make = self._make, None
        with _undisturbed():
            self._end(make)

    def _end(self, make: subprocess.Popen[bytes]) -> None:
        members = _session(make.pid)
        if make.poll() is None:
            os.killpg(make.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            make.wait(STOP_SECONDS)
            psutil.wait_procs(members, timeout=VANISH_SECONDS)
        # Ones that were started since are found by their session.
        survivors = {p.pid: p for p in (*members, *_session(make.pid)) if is_alive(p)}
        for process in survivors.values():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        make.wait(10)
        while any(map(is_alive, survivors.values())):  # SIGKILL takes a moment
            time.sleep(0.02)
        if survivors:
            raise BuildFailed(f"{self.build.name} left running: {survivors}\n{self._tail()}")

    def cpu_seconds(self) -> float:
        """Of all processes so far."""
        return sum(process_cpu_seconds(process.pid) for process in self._processes())

    def memory(self) -> dict[str, float]:
        """MB of web and worker; pages that processes share are counted once."""
        web = [p.pid for p in self._processes() if self._listens(p)]
        workers = [
            pid
            for process in self._processes()
            if "worker" in _command(process)
            for pid in (process.pid, *(child.pid for child in process.children(recursive=True)))
        ]
        parts = {"web": set(web), "worker": set(workers) - set(web)}
        if missing := [name for name, pids in parts.items() if not pids]:
            raise BuildFailed(f"{self.build.name} has no process that is the {missing[0]}.")
        return {name: sum(map(process_memory, pids)) / 1e6 for name, pids in parts.items()}

    def _environment(self) -> dict[str, str]:
        of_pip = {
            name: value for name, value in os.environ.items() if name.upper().startswith(OF_PIP)
        }
        return {
            **clean_environment(self.build.tree),
            **of_pip,
            **WITHOUT_LIMITS,
            **OLDER_NAMES,
            "PYTHON": getattr(sys, "_base_executable", sys.executable),
            "PORT": str(self.port),
            # The same one: no second port, and no process for it.
            "REALM_SERVER_PORT": str(self.port),
            "STACK_DIR": str(self.folder),
            "STACK_MATRIX": "false",
            "BOT_RUNNER_STORE": f"{self.folder}/botrunner",
            "DATABASE_URL": f"sqlite:///{self.folder}/db.sqlite",
            "SECRET_KEY": "a-key-for-measurements-alone-0123456789-0123456789",
            "REALM_SECRET_SEED": "a-seed-for-measurements-alone-0123456789-0123456789",
            "DEBUG": "false",
            "CHAT_ALLOW_ANONYMOUS": "true",
            "OPENAI_API_KEY": "sk-test",
            "OPENAI_BASE_URL": self.llm.url,
        }

    def _is_ready(self) -> bool:
        with suppress(OSError), urllib.request.urlopen(f"{self.url}/readyz", timeout=5) as answer:
            return bool(answer.status == 200)
        return False

    def _processes(self) -> list[psutil.Process]:
        assert self._make
        return _session(self._make.pid)

    def _listens(self, process: psutil.Process) -> bool:
        with suppress(psutil.Error):
            return any(
                each.status == psutil.CONN_LISTEN and each.laddr.port == self.port
                for each in process.net_connections("tcp")
            )
        return False

    def _tail(self) -> str:
        return self._log.read_text(errors="replace")[-5000:] if self._log.exists() else ""


async def status_of(connection: Connection, run: str) -> str:
    return str((await connection.get(f"/api/chat/runs/{run}"))["run"]["status"])


@contextmanager
def built(base: str, head: str = "") -> Iterator[tuple[Build, Build]]:
    """Return base and head, not built yet. Head is this working tree unless it names a commit."""
    with tempfile.TemporaryDirectory(prefix="bench-builds-") as name:
        folder = Path(name)
        trees = {
            "base": _clone(base, folder / "base"),
            "head": _clone(head, folder / "head") if head else BASE_DIR,
        }
        first, second = (Build(n, tree, folder / f"{n}.sqlite") for n, tree in trees.items())
        try:
            yield first, second
        finally:
            # Tens of thousands of files: it may take a while, in which nothing of them runs any more.
            print("Removing the builds", file=sys.stderr, flush=True)


def commit_of(name: str) -> str:
    """Return the full id of a commit. Raises `BuildFailed` if it is unknown."""
    found = subprocess.run(
        ["git", "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}"],
        cwd=BASE_DIR,
        capture_output=True,
        text=True,
        check=False,
    )
    if found.returncode:
        raise BuildFailed(f"{name} is no commit of this repository. Name one that git knows.")
    return found.stdout.strip()


def _heed_interrupts() -> None:
    """Undo what a shell does to jobs in the background: they ignore SIGINT, and so would the stack."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Heed no further Ctrl-C: it would leave running what is being stopped."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _clone(commit: str, tree: Path) -> Path:
    subprocess.run(
        ["git", "clone", "--quiet", "--shared", "--no-checkout", BASE_DIR, tree], check=True
    )
    subprocess.run(["git", "checkout", "--quiet", "--detach", commit], cwd=tree, check=True)
    return tree


def _session(pid: int) -> list[psutil.Process]:
    """Every process of the session that `pid` has begun, even of another parent."""

    def belongs(process: psutil.Process) -> bool:
        with suppress(OSError):
            return os.getsid(process.pid) == pid and is_alive(process)
        return False

    return [process for process in psutil.process_iter() if belongs(process)]


def is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def _command(process: psutil.Process) -> list[str]:
    with suppress(psutil.Error):
        return list(process.cmdline())
    return []
