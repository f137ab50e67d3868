"""Verdicts: the reason why each command that was considered did or did not fire on an event."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

# An account may have any number of commands, and each event stores their verdicts.
MAX_VERDICTS = 20


@dataclass(frozen=True)
class Verdict:
    """A snapshot: the command may have changed or be gone. `command_id` is empty for a registration
    without commands."""

    registration_id: str
    command_id: str = ""
    command: str = ""
    filter: str = ""
    reason: str = ""
    fired: bool = False


def stored(verdicts: Iterable[Verdict]) -> list[dict[str, Any]]:
    """Return at most `MAX_VERDICTS` as JSON, with those that fired at the front."""
    return [dict(vars(each)) for each in sorted(verdicts, key=lambda v: not v.fired)[:MAX_VERDICTS]]


def read(rows: Iterable[dict[str, Any]]) -> list[Verdict]:
    return [Verdict(**row) for row in rows]
