"""The whole system as real processes, for system tests and benchmarks.

    with FakeLLM() as llm, Stack(llm.url) as stack:
        requests.post(stack.url + "/api/chat/messages", ...)
        old = stack.kill("worker")
        stack.wait_restarted("worker", old)

It starts scripts/stack.py, as `make run` does, in a directory of its own and without the developer's
environment. All its processes are gone when it stops; a survivor is an error.
"""

from __future__ import annotations

import atexit
import configparser
import functools
import http.client
import json
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import xmlrpc.client
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self, TypeVar

import psutil
import redis
from supervisor.xmlrpc import SupervisorTransport

from lib.redis import RedisServer, from_environment
from tests.freezing import freeze
from tests.ports import free_port

BASE_DIR = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "scripts/stack.py"]
START_SECONDS = 180
STOP_SECONDS = 90
# Programs that end by themselves.
RUN_ONCE = ("ready", "rooms")
# Time for killed processes to disappear.
VANISH_SECONDS = 5
# All requests of a system under test come from one client.
WITHOUT_LIMITS = {
    "LIMIT_USER_MESSAGES_PER_MINUTE": "0",
    "LIMIT_USER_RUNS_UNFINISHED": "0",
    "LIMIT_USER_BYTES_PER_DAY": "0",
    "LIMIT_ROOM_MESSAGES_PER_MINUTE": "0",
    "LIMIT_ROOM_RUNS_UNFINISHED": "0",
    "LIMIT_ROOM_BYTES_PER_DAY": "0",
    "AGENT_USER_SHARE": "100",
    "CHAT_MAX_STREAMS_PER_USER": "0",
}

T = TypeVar("T")


class StackError(Exception):
    """A system that did not do what it should in time; the message ends with the end of its log."""


class Stack:
    """A running system.

    `env` adds to the environment; DATABASE_URL and REDIS_URL in it replace the SQLite file and the
    private Redis that are made otherwise. STACK_MATRIX="true" adds a homeserver and the bot runner.
    The SQLite file has its tables from the beginning, unless `is_new`: to make them takes longer than
    all the rest of a start.
    """

    def __init__(self, llm_url: str = "", *, is_new: bool = False, **env: str) -> None:
        self.is_new = is_new
        self.directory = Path(tempfile.mkdtemp(prefix="stack-"))
        self.port, self.realm_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.env = clean_environment() | {
            "PORT": str(self.port),
            "REALM_SERVER_PORT": str(self.realm_port),
            "STACK_MATRIX": "false",
            "BOT_RUNNER_STORE": f"{self.directory}/botrunner",
            "STACK_DIR": str(self.directory),
            "DATABASE_URL": f"sqlite:///{self.directory}/db.sqlite",
            "SECRET_KEY": secrets.token_urlsafe(50),
            "REALM_SECRET_SEED": secrets.token_urlsafe(50),
            "DEBUG": "false",
            "CHAT_ALLOW_ANONYMOUS": "true",
            **WITHOUT_LIMITS,
            "OPENAI_API_KEY": "sk-test" if llm_url else "",
            "OPENAI_BASE_URL": llm_url,
            **env,
        }
        if self.env["STACK_MATRIX"] == "true" and "MATRIX_URL" not in env:
            self._choose_homeserver_port()
        self._log = self.directory / "output.log"
        self._runner: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            shutil.rmtree(self.directory, ignore_errors=True)
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self.stop()
        finally:
            shutil.rmtree(self.directory, ignore_errors=True)

    def _choose_homeserver_port(self) -> None:
        """As if that of an earlier start: two stacks that start at once would both take the usual."""
        folder = self.directory / "homeserver"
        folder.mkdir(mode=0o700)
        config = {"listeners": [{"port": free_port()}]}
        (folder / "homeserver.yaml").write_text(json.dumps(config))

    def start(self) -> None:
        """Start everything and return when it answers and works."""
        database = self.directory / "db.sqlite"
        if (
            not self.is_new
            and not database.exists()
            and self.env["DATABASE_URL"].endswith(f"{database}")
        ):
            shutil.copy(_migrated(), database)
        with self._log.open("ab") as output:
            self._runner = subprocess.Popen(
                COMMAND,
                cwd=BASE_DIR,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C at the tests is theirs; they stop the stack.
            )
        try:
            self.wait_ready()
        except BaseException:
            self._kill_survivors()
            raise

    def wait_ready(self, seconds: float = START_SECONDS) -> None:
        """Wait until the web answers and a worker of this stack reads the stream."""
        self.wait("the web server to answer", self._web_answers, seconds)
        self.wait("a worker to read the stream", self._worker_reads, seconds)

    def stop(self) -> None:
        """End everything as an operator does, by one SIGTERM. Survivors are killed and reported."""
        assert self._runner
        self._runner.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._runner.wait(STOP_SECONDS)
            psutil.wait_procs(self._members(), timeout=VANISH_SECONDS)
        if survivors := self._kill_survivors():
            raise StackError(f"Left running after the stop: {survivors}\n{self.log()[-5000:]}")

    def log(self) -> str:
        """Return the output of all processes so far."""
        logs = [self._log, *sorted(self.directory.glob("**/*.log"))]
        return "\n".join(p.read_text(errors="replace") for p in dict.fromkeys(logs))

    def pid(self, name: str) -> int:
        """Return the pid that the supervisor runs as `name`; 0 while there is none."""
        no_process = suppress(OSError, http.client.HTTPException, xmlrpc.client.Error)
        with no_process, self._supervisor() as supervisor:
            return int(supervisor.getProcessInfo(name)["pid"])
        return 0

    def kill(self, name: str, signum: int = signal.SIGKILL) -> int:
        """Send `signum` to the process `name`; return its pid, for `wait_restarted`."""
        pid = self._running(name)
        os.kill(pid, signum)
        return pid

    def freeze(self, name: str) -> int:
        """Freeze `name` until it gets a SIGCONT; return its pid."""
        pid = self._running(name)
        self.wait(f"{name} to be frozen", lambda: freeze(pid, self._sqlite), START_SECONDS)
        return pid

    @contextmanager
    def without(self, name: str) -> Iterator[None]:
        """Kill `name` with all its children, and restart it at the end."""
        assert self._runner
        pid = self._running(name)
        pids = self.processes()[name]
        self._runner.send_signal(signal.SIGSTOP)  # it would start it again at once
        try:
            for each in pids:
                with suppress(ProcessLookupError):
                    os.kill(each, signal.SIGKILL)
            yield
        finally:
            self._runner.send_signal(signal.SIGCONT)
        self.wait_restarted(name, pid)

    def _running(self, name: str) -> int:
        """Return the pid of `name` once it runs: 0 would mean the process group of the tests."""
        return self.wait(f"{name} to run", lambda: self.pid(name), START_SECONDS)

    @property
    def _sqlite(self) -> str:
        """Return the path of the SQLite file, or an empty text."""
        scheme, _, path = self.env["DATABASE_URL"].partition("://")
        return path if scheme == "sqlite" else ""

    def wait_restarted(self, name: str, old: int, seconds: float = START_SECONDS) -> int:
        """Wait until `name` runs as another process than `old`; return its pid."""

        def successor() -> int:
            pid = self.pid(name)
            return pid if pid not in (0, old) else 0

        return self.wait(f"{name} to be restarted", successor, seconds)

    def wait(self, what: str, condition: Callable[[], T], seconds: float = 60) -> T:
        """Return the condition's first true value; fail at once when the whole stack has ended."""
        assert self._runner
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            if self._runner.poll() is not None:
                raise StackError(f"The stack ended itself.\n{self.log()[-5000:]}")
            if time.monotonic() > deadline:
                raise StackError(f"Waited {seconds} s for {what}.\n{self.log()[-5000:]}")
            time.sleep(0.05)
        return value

    def processes(self) -> dict[str, list[int]]:
        """Return the pids of each program, with their descendants; the stack's own under `stack`."""
        programs: dict[str, list[int]] = {}
        with self._supervisor() as supervisor:
            for info in supervisor.getAllProcessInfo():
                if info["pid"]:
                    programs[info["name"]] = [p.pid for p in _tree(info["pid"])]
        known = {pid for pids in programs.values() for pid in pids}
        programs["stack"] = [p.pid for p in self._members() if p.pid not in known]
        return programs

    def down(self) -> list[str]:
        """Return the programs that should be up and are not, with their state."""
        with self._supervisor() as supervisor:
            return [
                f"{info['name']} ({info['statename']})"
                for info in supervisor.getAllProcessInfo()
                if info["start"]
                and info["name"] not in RUN_ONCE
                and info["statename"] not in ("RUNNING", "STARTING")
            ]

    def memory(self) -> dict[str, float]:
        """Return MB of each program; shared pages are counted once (PSS)."""
        return {
            name: round(sum(process_memory(pid) for pid in pids) / 1e6, 1)
            for name, pids in self.processes().items()
        }

    def cpu_seconds(self) -> dict[str, float]:
        """Return the CPU seconds of each program so far, user and system."""
        return {
            name: sum(process_cpu_seconds(pid) for pid in pids)
            for name, pids in self.processes().items()
        }

    @property
    def redis(self) -> redis.Redis:
        """Return a client of the stack's Redis."""
        return self.redis_server.client(timeout=10)

    @property
    def redis_server(self) -> RedisServer:
        """Return the stack's Redis, with the certificates of its programs."""
        return from_environment(self.env | {"REDIS_URL": self.redis_url})

    @property
    def redis_url(self) -> str:
        """Return the address of Redis; the stack chooses it when none was given."""
        written = (self.directory / "stack.env").read_text()
        return next(line for line in shlex.split(written) if line.startswith("REDIS_URL="))[10:]

    @contextmanager
    def _supervisor(self) -> Iterator[Any]:
        config = configparser.RawConfigParser()
        config.read(self.directory / "supervisord.conf")
        url = config.get("supervisorctl", "serverurl", fallback="unix:///nowhere")
        transport = SupervisorTransport(None, None, url.replace("%(here)s", str(self.directory)))
        with xmlrpc.client.ServerProxy("http://127.0.0.1", transport=transport) as proxy:
            yield proxy.supervisor

    def _web_answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/api", timeout=5) as response:
                return bool(response.status == 200)
        except (OSError, http.client.HTTPException):
            return False

    def _worker_reads(self) -> bool:
        """Return whether a client waits for entries of the stream; on a shared Redis it may be a worker
        of another stack. The group's consumers prove less: before version 7, Redis lists one only
        once it has received an entry."""
        if not self.pid("worker"):
            return False
        try:
            with self.redis as client:
                return any(info["cmd"].startswith("xreadgroup") for info in client.client_list())
        except (redis.RedisError, OSError):
            return False

    def _members(self) -> list[psutil.Process]:
        """Return every process of the stack's session, even of another parent."""
        assert self._runner
        return [p for p in psutil.process_iter() if _session(p) == self._runner.pid]

    def _kill_survivors(self) -> list[str]:
        assert self._runner
        survivors = self._members()
        found = []
        for process in survivors:
            with suppress(psutil.NoSuchProcess):
                found.append(f"{process.pid} {' '.join(process.cmdline())}")
                process.kill()
        psutil.wait_procs(survivors, timeout=10)
        self._runner.wait(10)
        return found


def clean_environment(folder: Path = BASE_DIR) -> dict[str, str]:
    """Return the minimal environment of a program. Names in the .env of the folder are emptied: the
    settings read that file, but prefer the environment, where empty means the default."""
    kept = {
        name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ
    }
    dotenv = folder / ".env"
    lines = dotenv.read_text().splitlines() if dotenv.exists() else []
    names = (line.removeprefix("export ").partition("=")[0].strip() for line in lines)
    return {name: "" for name in names if name.isidentifier()} | kept


@functools.cache
def _migrated() -> Path:
    """Return an SQLite file with all tables and no rows."""
    folder = tempfile.TemporaryDirectory(prefix="migrated-")
    atexit.register(folder.cleanup)
    path = Path(folder.name) / "db.sqlite"
    subprocess.run(
        [sys.executable, "manage.py", "migrate", "--verbosity=0", "--skip-checks"],
        cwd=BASE_DIR,
        env=clean_environment() | {"DATABASE_URL": f"sqlite:///{path}", "DEBUG": "true"},
        check=True,
        timeout=180,
    )
    return path


def _tree(pid: int) -> Iterator[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        yield process
        yield from process.children(recursive=True)


def _session(process: psutil.Process) -> int:
    with suppress(OSError, psutil.Error):
        if process.status() != psutil.STATUS_ZOMBIE:
            return os.getsid(process.pid)
    return 0


def process_memory(pid: int) -> int:
    """Return the bytes of a process; of shared pages, its share (PSS)."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        with suppress(psutil.AccessDenied):
            # Linux knows the share in pages that several processes map; elsewhere count them whole.
            return int(getattr(process.memory_full_info(), "pss", 0) or process.memory_info().rss)
        return int(process.memory_info().rss)
    return 0


def process_cpu_seconds(pid: int) -> float:
    with suppress(psutil.NoSuchProcess):
        times = psutil.Process(pid).cpu_times()
        return float(times.user + times.system)
    return 0
