"""One id ties together what belongs to a question: the request or room event that brought it, its run,
the lines in the logs and the reply.

Over HTTP it is the client's `X-Request-ID` or one made here; in a room, the Matrix event's id; on the
stream, the event's. It is bound while the question is being taken in, and afterwards read from the run.
"""

import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import sentry_sdk
import structlog

MAX_LENGTH = 255  # of a Matrix event id
# Nothing that could break a header or a line of the log, or hide in either.
CLIENTS_OWN = re.compile(r"[A-Za-z0-9._~:/+=@$-]{1,128}")


def choose(offered: str | None) -> str:
    """The id that a client offers, if it will do; else a new one."""
    if offered and CLIENTS_OWN.fullmatch(offered):
        return offered
    return uuid.uuid4().hex


def request_id() -> str:
    """The id bound where this is called; empty outside of any question."""
    return str(structlog.contextvars.get_contextvars().get("request_id", ""))[:MAX_LENGTH]


@contextmanager
def tagged(**tags: object) -> Iterator[None]:
    """What is logged within, here or to Sentry, says which room, event or run it is about."""
    told = {name: value for name, value in tags.items() if value}
    with structlog.contextvars.bound_contextvars(**told), sentry_sdk.new_scope() as scope:
        scope.set_tags(told)
        yield
