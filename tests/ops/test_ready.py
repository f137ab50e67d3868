"""The stack's wait for its own processes (scripts/ready.py)."""

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from redis import Redis

from ops import middleware

ROOT = Path(__file__).resolve().parents[2]
KEY = "agent_events"
IMPATIENT = """
import sys
sys.path.insert(0, "scripts")
import ready
ready.PATIENCE_SECONDS = 0
ready.main()
"""


def test_it_asks_for_nothing_that_leaves_a_line_in_the_log(
    redis: Redis, redis_server: str, tmp_path: Path
) -> None:
    asked: list[str] = []

    class Web(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            if len(asked) == 6:
                redis.set(f"{KEY}:keeper", "worker-1")
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Web) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        port = str(web.server_port)
        done = subprocess.run(
            [sys.executable, "scripts/ready.py"],
            env=os.environ
            | {"PORT": port, "REALM_SERVER_PORT": port, "STACK_DIR": str(tmp_path)}
            | {"REDIS_URL": redis_server, "REDIS_STREAM_KEY": KEY},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        web.shutdown()

    assert "Botrealm is ready." in done.stdout, done.stderr
    assert len(asked) >= 6
    assert set(asked) <= set(middleware.PROBES)


def test_a_bot_that_comes_late_is_told_of_after_all(
    redis: Redis, redis_server: str, tmp_path: Path
) -> None:
    class Web(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    (tmp_path / "demo.json").write_text('{"matrix_url": "http://localhost:1", "bot": "bot-runner"}')
    redis.set(f"{KEY}:keeper", "worker-1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Web) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        port = str(web.server_port)
        with subprocess.Popen(
            [sys.executable, "-u", "-c", IMPATIENT],
            env=os.environ
            | {"PORT": port, "REALM_SERVER_PORT": port, "STACK_DIR": str(tmp_path)}
            | {"REDIS_URL": redis_server, "REDIS_STREAM_KEY": KEY},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        ) as ready:
            assert ready.stdout
            try:
                told = iter(ready.stdout)
                assert any("The bot is not in its Matrix rooms yet" in line for line in told)
                redis.xgroup_create(KEY, "bot_runner", mkstream=True)
                assert any("The bot listens in its Matrix rooms" in line for line in told)
            finally:
                ready.kill()
        web.shutdown()
