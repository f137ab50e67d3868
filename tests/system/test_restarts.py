"""Whatever dies is started again, for ever."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import synapse
from tests.fakes.llm import FakeLLM
from tests.synapse import wait_for
from tests.system.stack import BASE_DIR, Stack

pytestmark = pytest.mark.system

PROGRAMS = ("redis", "homeserver", "worker", "worker2", "web", "realm", "bot")
CRASH_LOOP = """
[supervisord]
logfile={folder}/supervisord.log
pidfile={folder}/supervisord.pid
silent=true

[program:sick]
command=/bin/false
startsecs=10
startretries=3
stdout_logfile=NONE
"""
SUPERVISE = """
import sys
sys.path.insert(0, "scripts")
import supervise
supervise.LONGEST_PAUSE_SECONDS = 2
supervise.run(sys.argv[1])
"""


@pytest.fixture(scope="module")
def stack(database: dict[str, str]) -> Iterator[Stack]:
    matrix = str(synapse.installed()).lower()
    with (
        FakeLLM() as llm,
        Stack(llm.url, STACK_MATRIX=matrix, STACK_WORKERS="2", **database) as stack,
    ):
        yield stack


def test_every_program_of_the_stack_is_started_again(stack: Stack) -> None:
    stack.wait("the rooms", lambda: not stack.pid("rooms"), 180)
    running = set(stack.processes()) - {"stack", "ready"}
    assert running == set(PROGRAMS) - (set() if synapse.installed() else {"homeserver", "bot"})
    for program in sorted(running):
        stack.wait_restarted(program, stack.kill(program))

    stack.wait_ready()
    stack.wait("all to be up", lambda: not stack.down())
    ended = set(re.findall(r"exited: (\w+) \(terminated by SIGKILL", stack.log()))
    assert ended == running


def test_one_that_dies_over_and_over_is_given_growing_pauses_and_never_up(tmp_path: Path) -> None:
    config = tmp_path / "supervisord.conf"
    config.write_text(CRASH_LOOP.format(folder=tmp_path))
    log = tmp_path / "output.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", SUPERVISE, str(config)],
            cwd=BASE_DIR,
            env={"PATH": os.environ["PATH"]},
            stdout=output,
            stderr=output,
        )

    def pauses() -> list[int]:
        found = re.findall(r"restarting sick in (\d+) s", log.read_text())
        return [int(seconds) for seconds in found]

    try:
        # One more than supervisor itself would have tried it.
        wait_for("five pauses", lambda: len(pauses()) >= 5, 180)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(90)
    assert pauses()[:5] == [1, 2, 2, 2, 2]
    assert log.read_text().count("exited: sick (exit status 1") >= 5
    assert "gave up" not in log.read_text()
