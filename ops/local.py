"""Find the running local stack (scripts/stack.py) and its settings.

The stack sets up a private Redis, a homeserver and a directory for metrics. While it runs, a file that
only its owner can read holds all its settings, in shell syntax. Commands take their settings from it
before they load Django: this module imports nothing of it.
"""

import fcntl
import os
import shlex
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lib import dotenv

REPO = Path(__file__).resolve().parent.parent
SETTINGS_FILE = "stack.env"
# The ports of the stack: the variables and their defaults. scripts/stack.py has the same.
PORTS = {"PORT": 3000, "REALM_SERVER_PORT": 4201}
# The settings that distinguish one system from another.
LOCATIONS = ("DATABASE_URL", "REDIS_URL", "MATRIX_URL")
# Set in a process that has the settings of a stack: its folder.
FOUND = "STACK_FOUND"


@dataclass(frozen=True)
class Stack:
    folder: Path
    environment: Mapping[str, str]  # every setting; empty for one that is not set

    def is_meant_by(self, environment: Mapping[str, str]) -> bool:
        """Return whether the environment names no other database, Redis or homeserver."""
        return all(
            environment.get(name, "").strip() in ("", self.environment.get(name, "").strip())
            for name in LOCATIONS
        )


def adopt(environment: MutableMapping[str, str] = os.environ) -> Stack | None:
    """Add the settings of the running stack to the environment, unless it names another system. What
    the environment has stays, and what `.env` has if it was changed after the stack's start. Return
    the stack, or None if there is none to adopt."""
    environment.pop(FOUND, None)
    stack = running(environment)
    if stack is None:
        return None
    file = REPO / ".env"
    with suppress(OSError, dotenv.InvalidFile):  # the settings report it
        if file.stat().st_mtime > (stack.folder / SETTINGS_FILE).stat().st_mtime:
            dotenv.load(file, environment)
    if not stack.is_meant_by(environment):
        return None
    for name, value in stack.environment.items():
        if not environment.get(name, "").strip():
            environment[name] = value
    # Absolute: it is found from any working directory.
    environment.update({"STACK_DIR": str(stack.folder), FOUND: str(stack.folder)})
    return stack


def names_redis() -> bool:
    """Return whether the environment or `.env` names a Redis."""
    with suppress(dotenv.InvalidFile):
        return bool(os.environ.get("REDIS_URL") or dotenv.read(REPO / ".env").get("REDIS_URL"))
    return True


def running(environment: Mapping[str, str] = os.environ) -> Stack | None:
    """Return the stack that runs in STACK_DIR; None without one, or if it is another user's."""
    folder = _folder(environment)
    try:
        lines = shlex.split((folder / SETTINGS_FILE).read_text())
        if not _is_held(folder / "lock"):
            return None  # the stack was killed
    except OSError:
        return None
    pairs = (line.partition("=") for line in lines)
    return Stack(folder, {name: value for name, _, value in pairs})


def _folder(environment: Mapping[str, str]) -> Path:
    """Return the folder as the stack does: a relative path starts at the repository's root."""
    name = environment.get("STACK_DIR", "").strip()
    if not name:
        with suppress(dotenv.InvalidFile):
            name = dotenv.read(REPO / ".env").get("STACK_DIR", ("", 0))[0].strip()
    return (REPO / (name or ".local")).resolve()


def _is_held(lock: Path) -> bool:
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
