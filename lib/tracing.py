"""The request id, which connects a message, the request or room event that submitted it, its run, its
log lines and the reply.

Over HTTP it is the client's `X-Request-ID` or a new one; in a room, the id of the Matrix event; on the
stream, that of the event. It is bound while the message is accepted, and afterwards read from the run.
"""

import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import sentry_sdk
import structlog

MAX_LENGTH = 255  # of a Matrix event id
# No character that could break a header or a log line, or be invisible.
CLIENT_ID = re.compile(r"[A-Za-z0-9._~:/+=@$-]{1,128}")


def choose(offered: str | None) -> str:
    """Return the client's id if it is valid, or else a new one."""
    if offered and CLIENT_ID.fullmatch(offered):
        return offered
    return uuid.uuid4().hex


def request_id() -> str:
    """Return the bound id; empty outside of requests and runs."""
    return str(structlog.contextvars.get_contextvars().get("request_id", ""))[:MAX_LENGTH]


@contextmanager
def tagged(**tags: object) -> Iterator[None]:
    """Tag log lines and Sentry events of the block with the room, event or run."""
    present = {name: value for name, value in tags.items() if value}
    with structlog.contextvars.bound_contextvars(**present), sentry_sdk.new_scope() as scope:
        scope.set_tags(present)
        yield
