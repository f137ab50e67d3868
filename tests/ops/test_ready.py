"""The programs of the local stack that wait for the others (scripts/ready.py, scripts/rooms.py)."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from redis import Redis

from ops import middleware

ROOT = Path(__file__).resolve().parents[2]
KEY = "agent_events"
IMPATIENT_ROOMS = """
import sys
sys.path.insert(0, "scripts")
import rooms
rooms.PATIENCE_SECONDS = 0
rooms.start = print
rooms.main()
"""


@contextmanager
def web(paths: list[str]) -> Iterator[str]:
    """A web server that answers every path; its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield str(server.server_port)
        server.shutdown()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    known = {"stream": KEY, "bot_group": "bots", "model": "small-1", "model_configured": True}
    (tmp_path / "settings.json").write_text(json.dumps(known))
    return tmp_path


def environment(port: str, folder: Path, redis_server: str) -> dict[str, str]:
    ports = {"PORT": port, "REALM_SERVER_PORT": port}
    return os.environ | ports | {"STACK_DIR": str(folder), "REDIS_URL": redis_server}


def test_it_waits_for_the_worker_with_requests_that_leave_no_line_in_the_log(
    redis: Redis, redis_server: str, folder: Path
) -> None:
    paths: list[str] = []
    with (
        web(paths) as port,
        subprocess.Popen(
            [sys.executable, "scripts/ready.py"],
            env=environment(port, folder, redis_server),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        while len(paths) < 6:
            assert process.poll() is None
        redis.set(f"{KEY}:keeper", "worker-1")
        output, _ = process.communicate(timeout=300)

    assert "Botrealm is ready." in output
    assert "small-1, unless a message names another" in output
    assert set(paths) <= set(middleware.PROBES)


def test_a_bot_that_comes_late_is_reported_after_all(
    redis: Redis, redis_server: str, folder: Path
) -> None:
    with (
        web([]) as port,
        subprocess.Popen(
            [sys.executable, "-u", "-c", IMPATIENT_ROOMS],
            env=environment(port, folder, redis_server) | {"STACK_HOMESERVER": "false"},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        ) as rooms,
    ):
        assert rooms.stdout
        try:
            lines = iter(rooms.stdout)
            assert next(lines) == "bot\n"
            assert any("The bot is not in its Matrix rooms yet" in line for line in lines)
            redis.xgroup_create(KEY, "bots", mkstream=True)
            assert any("Matrix rooms ready" in line for line in lines)
        finally:
            rooms.kill()
