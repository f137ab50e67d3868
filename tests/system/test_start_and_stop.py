import os
import signal
import socket
import stat
import subprocess
import sys
import urllib.request
from pathlib import Path

import psutil
import pytest

from tests.system.stack import COMMAND, Stack, clean_environment

pytestmark = pytest.mark.system
ROOT = Path(__file__).resolve().parents[2]


def start(stack: Stack, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        COMMAND,
        env=stack.env | env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def test_it_says_what_to_open_and_a_second_start_works_as_well() -> None:
    with Stack(is_new=True) as stack:
        stack.wait("the last block", lambda: "Ctrl-C stops everything." in stack.log(), 180)
        log = stack.log()
        assert f"http://localhost:{stack.port}/admin/  user admin, password " in log
        assert f"curl -X POST http://localhost:{stack.port}/api/chat/messages" in log
        assert "every answer is an echo" in log
        stack.stop()  # an error if anything is left running
        stack.start()


def test_ctrl_c_ends_everything() -> None:
    with Stack() as stack:
        assert stack._runner
        stack._runner.send_signal(signal.SIGINT)
        stack._runner.wait(timeout=90)

        psutil.wait_procs(stack._members(), timeout=5)
        assert stack._members() == []


def test_a_port_that_is_taken_is_named_with_its_variable() -> None:
    stack = Stack()
    with socket.socket() as other:
        other.bind(("127.0.0.1", stack.port))
        other.listen()
        process = start(stack)

    assert process.returncode == 1
    assert f"Port {stack.port} (PORT) is taken by another program." in process.stderr


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("PORT", "canary"),
        ("STACK_DIR", "/dev/null/canary"),
        ("CHAT_MEMORY_RECENT_MESSAGES", "canary"),
        ("REALM_SECRET_SEED", "canary"),
        ("REDIS_URL", "canary"),
        ("REDIS_URL", "redis://canary:canary@127.0.0.1:1"),
        ("DATABASE_URL", "postgres://me:canary@127.0.0.1:1/x"),
        ("DATABASE_URL", "file:/dev/null/canary/x"),
        ("MATRIX_URL", "canary"),
    ],
)
def test_a_wrong_value_stops_the_start_and_names_the_variable(variable: str, value: str) -> None:
    process = start(Stack(), **{variable: value})

    assert process.returncode != 0
    assert variable in process.stderr
    assert len(process.stderr.strip().splitlines()) == 1
    assert "canary" not in process.stdout + process.stderr


def test_a_redis_that_is_given_is_used(redis_server: str) -> None:
    with Stack(REDIS_URL=redis_server) as stack:
        assert stack.pid("redis") == 0
        assert psutil_environment(stack)["REDIS_URL"] == redis_server


def test_a_database_from_before_is_used_and_kept_from_others() -> None:
    with Stack() as stack:
        stack.stop()
        path = stack.directory / "db.sqlite"
        path.chmod(0o644)
        stack.start()

        # Its -wal and -shm get the same, which SQLite sees to.
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def doctor(stack: Stack, **env: str) -> subprocess.CompletedProcess[str]:
    """In a shell that knows of the stack's folder and of nothing else."""
    return subprocess.run(
        [sys.executable, "manage.py", "doctor"],
        env=clean_environment() | {"STACK_DIR": str(stack.directory)} | env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def test_the_doctor_looks_at_the_stack_that_runs() -> None:
    with Stack() as stack:
        written = stack.directory / "stack.env"
        assert stat.S_IMODE(written.stat().st_mode) == 0o600
        assert psutil.Process(stack.pid("worker")).environ()["REDIS_URL"] == stack.redis_url

        stack.wait("the worker's sign", lambda: "1 running" in doctor(stack).stdout, 180)
        done = doctor(stack)

        assert f"checking the local stack in {stack.directory}" in done.stdout
        assert "No answer at REDIS_URL" not in done.stdout
        assert "All web processes are counted." in done.stdout
        assert done.returncode == 0, done.stdout

        other = doctor(stack, REDIS_URL="redis://127.0.0.1:1", DATABASE_URL="sqlite:///:memory:")

        assert f"not the local stack in {stack.directory}" in other.stdout
        assert "No answer at REDIS_URL" in other.stdout
        stack.stop()
        assert not written.exists()


def test_every_command_has_the_settings_of_the_stack(tmp_path: Path) -> None:
    """From another directory, and with the stack's files in a folder of their own."""
    with Stack(is_new=True, DEBUG="true") as stack:
        known = clean_environment() | {"STACK_DIR": str(stack.directory)}

        def run(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [sys.executable, *command],
                env=known | env,
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=180,
                check=False,
            )

        manage = str(ROOT / "manage.py")
        show = (
            "from django.conf import settings as s;"
            "print(s.REDIS_URL, s.DATABASES['default']['NAME'], s.REALM_SECRET_SEED)"
        )
        shell = run(manage, "shell", "--verbosity=0", "-c", show)
        shown = shell.stdout.split()
        assert shown == [
            stack.redis_url,
            f"{stack.directory}/db.sqlite",
            stack.env["REALM_SECRET_SEED"],
        ], shell.stderr
        mine = run(manage, "shell", "--verbosity=0", "-c", show, REALM_SECRET_SEED="m" * 40)
        assert mine.stdout.split() == [*shown[:2], "m" * 40]

        token = run(manage, "realm_token", "@me:localhost", "--create")
        request = urllib.request.Request(
            f"{stack.url}/_bot-registrations",
            headers={"Authorization": f"Bearer {token.stdout.strip()}"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert answer.status == 200
        assert "0 secrets" in run(manage, "rotate_secrets", "--dry-run").stdout

        celery = ("-m", "celery", "--workdir", str(ROOT), "-A", "config")
        stack.wait("the worker to answer", lambda: "pong" in run(*celery, "inspect", "ping").stdout)

        demo = run("-m", "tests.benchmarks.demo", "--runs", "3", PYTHONPATH=str(ROOT))
        assert f"http://localhost:{stack.port}/admin/" in demo.stdout, demo.stderr
        assert "Redis is unavailable" not in demo.stdout

        stack.stop()
        without = run(*celery, "inspect", "ping")
        assert "Start one: make run" in without.stderr
        elsewhere = {"DATABASE_URL": f"sqlite:///{tmp_path}/new.db"}
        empty = run(manage, "realm_token", "@me:localhost", **elsewhere)
        assert empty.returncode == 1
        assert "lacks tables: run manage.py migrate" in empty.stderr
        assert "Start the local stack (make run)" in empty.stderr
        assert "Traceback" not in empty.stderr


def psutil_environment(stack: Stack) -> dict[str, str]:
    raw = Path(f"/proc/{stack.pid('worker')}/environ").read_bytes()
    pairs = (item.split(b"=", 1) for item in raw.split(b"\0") if b"=" in item)
    return {os.fsdecode(name): os.fsdecode(value) for name, value in pairs}
