"""Find the running local stack (scripts/stack.py) and its settings.

The stack sets up a private Redis, a homeserver and a directory for metrics. While it runs, a file that
only its owner can read holds all its settings, in shell syntax.
"""

import fcntl
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from django.conf import settings

SETTINGS_FILE = "stack.env"
# The ports of the stack: the variables and their defaults. scripts/stack.py has the same.
PORTS = {"PORT": 3000, "REALM_SERVER_PORT": 4201}
# The settings that distinguish one system from another.
LOCATIONS = ("DATABASE_URL", "REDIS_URL", "MATRIX_URL")


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


def running() -> Stack | None:
    """Return the stack that runs in STACK_DIR; None without one, or if it is another user's."""
    folder = Path(os.environ.get("STACK_DIR", "").strip() or settings.BASE_DIR / ".local")
    try:
        lines = shlex.split((folder / SETTINGS_FILE).read_text())
        if not _is_held(folder / "lock"):
            return None  # the stack was killed
    except OSError:
        return None
    pairs = (line.partition("=") for line in lines)
    return Stack(folder, {name: value for name, _, value in pairs})


def _is_held(lock: Path) -> bool:
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
