"""Why an event fired something or nothing: what each command that was looked at said to it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

# An account may have any number of commands, and each event is kept with what they said.
MAX_KEPT = 20


@dataclass(frozen=True)
class Verdict:
    """In words of the time it was given: the command may be gone or changed since. The ids of a
    command are empty for a registration without any."""

    registration_id: str
    command_id: str = ""
    command: str = ""
    filter: str = ""
    words: str = ""
    fires: bool = False


def stored(verdicts: Iterable[Verdict]) -> list[dict[str, Any]]:
    """As they stand in the database: those that fire come first, and not all of very many."""
    return [dict(vars(each)) for each in sorted(verdicts, key=lambda v: not v.fires)[:MAX_KEPT]]


def read(rows: Iterable[dict[str, Any]]) -> list[Verdict]:
    return [Verdict(**row) for row in rows]
