"""The local stack installs and starts its homeserver once the pages answer (scripts/rooms.py)."""

import signal
import sys
from pathlib import Path

import psutil
import pytest

from tests import synapse
from tests.system.stack import Stack

pytestmark = pytest.mark.system
# Hides an installed Synapse for as long as the file named by SYNAPSE_HIDDEN is there.
SITECUSTOMIZE = """
import os
from importlib.machinery import PathFinder
find = PathFinder.find_spec
def find_spec(name, path=None, target=None):
    hidden = name == "synapse" and os.path.exists(os.environ["SYNAPSE_HIDDEN"])
    return None if hidden else find(name, path, target)
PathFinder.find_spec = staticmethod(find_spec)
"""
INSTALLER = """
import pathlib, sys, time
print("Installing for the test", flush=True)
while not pathlib.Path(sys.argv[2]).exists(): time.sleep(0.05)
if sys.argv[1] == "installs": pathlib.Path(sys.argv[3]).unlink()
"""


class Fresh(Stack):
    """A stack without Synapse, whose installer waits for `finish`."""

    def __init__(self, folder: Path, outcome: str) -> None:
        hidden, self.done = folder / "hidden", folder / "done"
        hidden.touch()
        (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
        (folder / "installer.py").write_text(INSTALLER)
        command = f"{sys.executable} {folder}/installer.py {outcome} {self.done} {hidden}"
        super().__init__(
            STACK_MATRIX="true",
            STACK_INSTALL_HOMESERVER=command,
            SYNAPSE_HIDDEN=str(hidden),
            PYTHONPATH=str(folder),
        )

    def wait_installing(self) -> None:
        self.wait("the installation", lambda: "Installing for the test" in self.log(), 180)

    def finish(self) -> None:
        self.done.touch()


@pytest.mark.skipif(not synapse.installed(), reason="matrix-synapse is not installed")
def test_pages_answer_during_the_installation_and_rooms_follow(tmp_path: Path) -> None:
    with Fresh(tmp_path, "installs") as stack:
        stack.wait_installing()
        stack.wait("the block", lambda: "Botrealm is ready." in stack.log(), 180)
        assert (stack.pid("homeserver"), stack.pid("bot")) == (0, 0)

        stack.finish()

        stack.wait("the rooms", lambda: "Matrix rooms ready" in stack.log(), 180)
        assert stack.pid("homeserver")
        assert stack.pid("bot")


def test_a_failed_installation_is_a_line_and_not_the_end(tmp_path: Path) -> None:
    with Fresh(tmp_path, "fails") as stack:
        stack.wait_installing()
        stack.finish()

        stack.wait(
            "the line", lambda: "No Matrix rooms, as Synapse is not installed" in stack.log()
        )
        stack.wait("the end of the program", lambda: not stack.pid("rooms"))
        assert (stack.pid("homeserver"), stack.pid("bot")) == (0, 0)
        assert stack.down() == []
        stack.wait_ready()


def test_ctrl_c_during_the_installation_leaves_nothing_running(tmp_path: Path) -> None:
    with Fresh(tmp_path, "installs") as stack:
        stack.wait_installing()
        assert stack._runner
        stack._runner.send_signal(signal.SIGINT)
        stack._runner.wait(timeout=90)

        psutil.wait_procs(stack._members(), timeout=5)
        assert stack._members() == []
