"""The local stack (scripts/stack.py), as a command finds it that is started beside it.

The stack has settings that no other process knows of: a private Redis, a homeserver, a directory for
metrics. While it runs it has them all written down, in the syntax of a shell and for its owner alone.
"""

import fcntl
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from django.conf import settings

WRITTEN = "stack.env"
# What tells one system from another.
PLACES = ("DATABASE_URL", "REDIS_URL", "MATRIX_URL")


@dataclass(frozen=True)
class Stack:
    folder: Path
    environment: Mapping[str, str]  # every setting; empty for one that is not set

    def is_meant_by(self, environment: Mapping[str, str]) -> bool:
        """Whether the environment names no other database, Redis or homeserver."""
        return all(
            environment.get(name, "").strip() in ("", self.environment.get(name, "").strip())
            for name in PLACES
        )


def running() -> Stack | None:
    """The stack that runs in STACK_DIR; None as well for one of another user."""
    folder = Path(os.environ.get("STACK_DIR", "").strip() or settings.BASE_DIR / ".local")
    try:
        lines = shlex.split((folder / WRITTEN).read_text())
        if not _is_held(folder / "lock"):
            return None  # it was killed outright
    except OSError:
        return None
    named = (line.partition("=") for line in lines)
    return Stack(folder, {name: value for name, _, value in named})


def _is_held(lock: Path) -> bool:
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
