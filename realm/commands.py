"""The table of the commands that a bot command may run. The app that executes them fills it in."""

from collections.abc import Callable
from typing import Any

from django.conf import settings

from lib import outgoing

# By name; agents.runs.commands has the type of the functions.
COMMANDS: dict[str, Callable[[Any], str]] = {}


class UnknownCommand(Exception):
    """There is no such command; the message lists the known ones and is safe to show."""


def known() -> list[str]:
    """Return the names that a bot command may have; `https://HOST/...` for allowed hosts."""
    hosts = [f"https://{host}/..." for host in settings.AGENT_WEBHOOK_HOSTS]
    return [*sorted(COMMANDS), *hosts]


def is_allowed_url(command: str) -> bool:
    """Return whether the command is a URL that may be called, as far as its text shows."""
    return outgoing.allowed(command, settings.AGENT_WEBHOOK_HOSTS)


def check(command: str) -> None:
    """Raise `UnknownCommand` for a command that could not be executed."""
    if command in COMMANDS or is_allowed_url(command):
        return
    if outgoing.is_url(command):
        why = outgoing.why_forbidden(command, settings.AGENT_WEBHOOK_HOSTS, "AGENT_WEBHOOK_HOSTS")
        raise UnknownCommand(f"{why} Known commands: {', '.join(known())}.")
    raise UnknownCommand(
        f"There is no command {command[:200]!r}. Known commands: {', '.join(known())}."
    )
