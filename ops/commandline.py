"""Start a command beside the local stack: with its settings, and with errors in one sentence."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from lib import terminal
from ops import local

START = "Start the local stack (make run), or set DATABASE_URL and REDIS_URL."


def main(arguments: list[str]) -> None:
    """Run `manage.py`."""
    stack = local.adopt()
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")
    from django.core.management import execute_from_command_line

    with (
        terminal.streams(),
        errors_in_a_sentence(is_running=stack is not None, verbose="--traceback" in arguments),
    ):
        execute_from_command_line(arguments)


@contextmanager
def errors_in_a_sentence(*, is_running: bool, verbose: bool = False) -> Iterator[None]:
    """End the process with a sentence if the settings are invalid, or a service is unavailable."""
    from django.core.exceptions import ImproperlyConfigured
    from django.db import OperationalError, ProgrammingError
    from kombu.exceptions import OperationalError as BrokerError
    from redis.exceptions import RedisError

    try:
        yield
    except ImproperlyConfigured as error:
        if verbose:
            raise
        sys.exit(f"{error}")
    except (OperationalError, ProgrammingError, RedisError, BrokerError) as error:
        problem = None if verbose else _sentence(error)
        if problem is None:
            raise
        hint = "Its log has more." if is_running else START
        sys.exit(f"{problem} {hint}")


def _sentence(error: Exception) -> str | None:
    """Return why a service is unavailable; None for a defect."""
    from django.db import Error
    from redis.exceptions import RedisError

    from lib import db, redis

    if isinstance(error, Error):
        return db.why(error)
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, RedisError):
        cause = cause.__cause__ or cause.__context__
    return redis.why(cause) if cause else "No answer at REDIS_URL."
