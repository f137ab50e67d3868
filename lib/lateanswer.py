"""Responses whose answer may still change while their request waits: the web server awaits it on the
event loop, where a waiting request takes no thread (config.server.bridge)."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class LateAnswer:
    """A status, a body and headers that replace those of a response."""

    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)


# Returns None if the response is to be sent as it is.
Waiting = Callable[[], Awaitable[LateAnswer | None]]


def of(response: Any) -> Waiting | None:
    return getattr(response, "waiting", None)


def set_on(response: Any, waiting: Waiting) -> None:
    """Have the web server await `waiting` before it sends the response. Other servers, such as Django's
    test client, send it at once."""
    response.waiting = waiting
