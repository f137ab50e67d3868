"""A build is started and stopped by make, and leaves nothing running."""

import os
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.benchmarks.builds import Build, BuildFailed, is_alive

MAKEFILE = "run:\n\t@exec $(PYTHON) stack.py\n"
SOUND = """
import http.server, os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {child!r}], stdout=subprocess.PIPE)
child.stdout.readline()
class Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/readyz" else 404)
        self.end_headers()
try:
    http.server.HTTPServer(("127.0.0.1", int(os.environ["PORT"])), Ready).serve_forever()
except KeyboardInterrupt:
    pass
"""
IDLE = """
import time
try:
    print("runs", flush=True)
    time.sleep(600)
except KeyboardInterrupt:
    pass
"""
DEAF = """
import signal, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
print("runs", flush=True)
time.sleep(600)
"""


@pytest.fixture
def build(tmp_path: Path) -> Callable[[str], Build]:
    def made(stack: str) -> Build:
        (tmp_path / "Makefile").write_text(MAKEFILE)
        (tmp_path / "stack.py").write_text(stack)
        return Build("base", tmp_path, tmp_path / "none.sqlite")

    return made


def test_a_stop_ends_all_that_was_started(build: Callable[[str], Build]) -> None:
    with build(SOUND.format(child=IDLE)).running() as running:
        processes = running._processes()
        assert len(processes) >= 2
        folder = running.folder

    assert not any(map(is_alive, processes))
    assert not folder.exists()


def test_an_interrupt_ends_all_that_was_started(build: Callable[[str], Build]) -> None:
    seen: list[psutil.Process] = []

    def interrupted() -> None:
        with build(SOUND.format(child=IDLE)).running() as running:
            seen.extend(running._processes())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()

    assert seen
    assert not any(map(is_alive, seen))


def test_what_survives_a_stop_is_killed_and_reported(
    build: Callable[[str], Build], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.benchmarks.builds.VANISH_SECONDS", 0.5)
    with (
        pytest.raises(BuildFailed, match="base left running"),
        build(SOUND.format(child=DEAF)).running() as running,
    ):
        processes = running._processes()

    assert not any(map(is_alive, processes))


def test_a_build_that_does_not_start_is_reported_with_its_log(
    build: Callable[[str], Build],
) -> None:
    failing = build("import sys; sys.exit('No such module.')")
    with (
        pytest.raises(BuildFailed, match=r"ended itself\.\n(.|\n)*No such module"),
        failing.running(),
    ):
        pass


def test_nothing_of_the_developers_environment_reaches_it(
    build: Callable[[str], Build], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://canary")
    with build(SOUND.format(child=IDLE)).running() as running:
        (process,) = [p for p in running._processes() if p.cmdline()[-1:] == ["stack.py"]]
        environment = process.environ()

    assert "REDIS_URL" not in environment
    assert environment["OPENAI_BASE_URL"].startswith("http://127.0.0.1:")
    assert environment["STACK_DIR"] != os.environ.get("STACK_DIR")
