"""One process of the web server as it is deployed, and clients that leave, stall or are too many. What
is bounded, and how, is proved in tests/config/test_connections.py."""

import contextlib
import http.client
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
CONNECTIONS = 300
SEED = """
from chat.models import Message, Thread
from tests.factories import conversation
thread = Thread.objects.create(pk="big")
conversation(1, thread=thread)
# Each character takes six in JSON.
Message.objects.filter(thread=thread, role="assistant").update(content=chr(1) * 999_000)
"""


class Web:
    def __init__(self, port: int, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self.port, self.process, self.log = port, process, log

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def get(self, path: str, port: int = 0, **headers: str) -> tuple[int, dict[str, str], bytes]:
        with contextlib.closing(
            http.client.HTTPConnection("127.0.0.1", port or self.port, timeout=60)
        ) as connection:
            connection.request("GET", path, headers=headers)
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()

    def memory(self) -> float:
        return float(psutil.Process(self.process.pid).memory_info().rss) / 1e6

    def open(self) -> int:
        found = psutil.Process(self.process.pid).net_connections("tcp")
        return sum(each.status != psutil.CONN_LISTEN for each in found)


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def crowd() -> Iterator[list[socket.socket]]:
    opened: list[socket.socket] = []
    yield opened
    for each in opened:
        each.close()


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    folder = tmp_path_factory.mktemp("web")
    port, log = free_port(), folder / "log"
    env = os.environ | {
        "DATABASE_URL": f"sqlite:///{folder}/db.sqlite",
        "DJANGO_SETTINGS_MODULE": "config.settings",
        "DEBUG": "true",
        "HTTPS": "false",
        "CHAT_ALLOW_ANONYMOUS": "true",
        "REDIS_URL": "redis://127.0.0.1:1/0",
        "WEB_MAX_CONNECTIONS": str(CONNECTIONS),
        "WEB_HEAD_SECONDS": "3",
        "WEB_SEND_SECONDS": "3",
        "LOG_LEVELS": "*=info",
        "LOG_FORMAT": "json",
    }
    for command in (["migrate", "-v0"], ["shell", "-v0", "-c", SEED]):
        subprocess.run([sys.executable, "manage.py", *command], cwd=ROOT, env=env, check=True)
    # With fewer files than connections, until it asks for more.
    serve = (
        f"ulimit -S -n 200; exec {sys.executable} -m uvicorn config.asgi:application "
        f"--http config.server.protocol:BoundedProtocol --host 127.0.0.1 --port {port} --lifespan off "
        "--ws none --no-access-log --no-proxy-headers --log-level warning"
    )
    with log.open("wb") as out:
        process = subprocess.Popen(["sh", "-c", serve], cwd=ROOT, env=env, stdout=out, stderr=out)
    served = Web(port, process, log)

    def answers() -> bool:
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(OSError):
            return served.get("/login")[0] == 200
        return False

    try:
        until(answers, 180)
        yield served
    finally:
        process.terminate()
        process.wait(60)


def test_a_hundred_logins_that_nobody_waits_for_hold_up_nobody(
    web: Web, crowd: list[socket.socket]
) -> None:
    _, headers, page = web.get("/login")
    cookie = headers["set-cookie"].partition(";")[0]
    token = re.findall(rb'csrfmiddlewaretoken" value="(\w+)', page)[0].decode()
    for number in range(100):
        form = f"csrfmiddlewaretoken={token}&username=user-{number}&password=wrong"
        crowd.append(web.connect())
        crowd[-1].sendall(
            f"POST /login HTTP/1.1\r\nHost: localhost\r\nCookie: {cookie}\r\nContent-Type: "
            "application/x-www-form-urlencoded\r\n"
            f"Content-Length: {len(form)}\r\n\r\n{form}".encode()
        )
    for each in crowd:
        each.close()
    began = time.monotonic()
    assert web.get("/healthz")[0] == 200
    assert web.get("/api")[0] == 200
    # One after the other they take half a minute of both processors.
    assert time.monotonic() - began < 8
    until(lambda: web.open() == 0)
    assert web.log.read_text().count('"route": "/login"') < 20


@pytest.mark.parametrize(
    "beginning", [b"", b"GET / HTTP/1.1\r\nHost: loc"], ids=["nothing", "half"]
)
def test_a_connection_without_a_request_is_closed(web: Web, beginning: bytes) -> None:
    with web.connect() as silent:
        silent.sendall(beginning)
        assert (b"408" in silent.recv(1000)) == bool(beginning)


def test_sixty_who_do_not_read_take_little_memory_and_are_let_go(
    web: Web, crowd: list[socket.socket]
) -> None:
    assert len(web.get("/api/chat/threads/big/messages")[2]) > 5_000_000
    before, most = web.memory(), 0.0
    for _ in range(60):
        crowd.append(socket.socket())
        crowd[-1].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        crowd[-1].connect(("127.0.0.1", web.port))
        crowd[-1].sendall(b"GET /api/chat/threads/big/messages HTTP/1.1\r\nHost: localhost\r\n\r\n")

    def are_let_go() -> bool:
        nonlocal most
        most = max(most, web.memory())
        return "slow_reader" in web.log.read_text() and web.open() == 0

    until(are_let_go)
    # All of them at once would be 360 MB.
    assert most - before < 150


def test_connections_beyond_the_soft_limit_of_files_and_then_503(
    web: Web, crowd: list[socket.socket]
) -> None:
    until(lambda: web.open() == 0)
    crowd += [web.connect() for _ in range(CONNECTIONS)]
    until(lambda: web.open() >= CONNECTIONS, 20)
    status, headers, _ = web.get("/healthz")
    assert (status, headers["retry-after"]) == (503, "2")
    for each in crowd:
        each.close()
    until(lambda: web.open() == 0)
    assert web.get("/healthz")[0] == 200
    assert web.log.read_text().count("too_many_connections") == 1


def test_what_is_no_http_is_one_line(web: Web) -> None:
    for _ in range(20):
        with web.connect() as other:
            other.sendall(b"\x16\x03\x01\x00\xa5\x01\x00\x00")
            assert b" 400 " in other.recv(1000)
    assert "Invalid HTTP request" not in web.log.read_text()
    assert web.log.read_text().count("no_http") == 1


def test_no_more_files_is_told_and_got_over(web: Web, crowd: list[socket.socket]) -> None:
    process = psutil.Process(web.process.pid)
    until(lambda: web.open() == 0)
    _, hard = process.rlimit(psutil.RLIMIT_NOFILE)
    process.rlimit(psutil.RLIMIT_NOFILE, (process.num_fds() + 5, hard))
    crowd += [web.connect() for _ in range(20)]
    until(lambda: "No file can be opened" in web.log.read_text())
    process.rlimit(psutil.RLIMIT_NOFILE, (hard, hard))
    for each in crowd:
        each.close()
    assert web.get("/healthz")[0] == 200


def test_the_second_port_ends_what_the_first_has_ended(web: Web) -> None:
    port = free_port()
    command = [sys.executable, "-I", "-S", "scripts/forward.py", str(port), str(web.port)]
    forwarder = subprocess.Popen(command, cwd=ROOT)
    try:

        def answers() -> bool:
            with contextlib.suppress(OSError):
                return web.get("/healthz", port)[0] == 200
            return False

        until(answers)
        process = psutil.Process(forwarder.pid)
        with socket.create_connection(("127.0.0.1", port), timeout=60) as silent:
            assert silent.recv(10) == b""
            until(lambda: process.num_threads() == 1)
            assert len(process.net_connections("tcp")) == 1
    finally:
        forwarder.terminate()
        forwarder.wait(60)
