"""Run checks that may hang, each with a timeout.

A database or a Redis that swallows packets blocks the thread of a check until its driver times out.
Until then no second thread is started for the same check.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Generic, NoReturn, TypeVar

from django.db import connection
from redis.exceptions import RedisError

from lib import db, redis
from lib.db import SERVICE_ERRORS

logger = logging.getLogger(__name__)

T = TypeVar("T")


class CheckFailed(Exception):
    """The message is for anyone; `reason`, for operators, may name a host, a database or a user."""

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason or message


class BoundedCheck(Generic[T]):
    def __init__(self, check: Callable[[], T]) -> None:
        self.check = check
        self._running = threading.Lock()

    def start(self) -> Callable[[float], T]:
        """Start the check. Return a function that waits for the result until a moment of
        `time.monotonic()` and raises `CheckFailed`."""
        if not self._running.acquire(blocking=False):
            return _still_running
        results: list[T] = []
        failures = [CheckFailed("No answer in time.")]
        done = threading.Event()

        def work() -> None:
            try:
                results.append(self.check())
            except SERVICE_ERRORS as error:
                failures.append(CheckFailed(type(error).__name__, _reason(error)))
            except Exception as error:
                logger.exception("Unexpected error in a check")
                failures.append(CheckFailed(type(error).__name__))
            self._end()
            done.set()

        def wait(until: float) -> T:
            done.wait(max(0.0, until - time.monotonic()))
            if not results:
                raise failures[-1]
            return results[0]

        threading.Thread(target=work, name="check", daemon=True).start()
        return wait

    def _end(self) -> None:
        try:
            connection.close()
        except SERVICE_ERRORS:
            pass  # it was lost already
        finally:
            self._running.release()


def _reason(error: Exception) -> str:
    """Return the reason for operators. Only of a service that is unavailable: other texts may hold a
    row."""
    if isinstance(error, RedisError):
        return redis.why(error)
    return db.why(error) or type(error).__name__


def _still_running(until: float) -> NoReturn:
    raise CheckFailed("Still no answer to an earlier check.")


def run_checks(checks: Mapping[str, BoundedCheck[T]], seconds: float) -> dict[str, T | CheckFailed]:
    """Run checks at the same time; return the result of each."""
    until = time.monotonic() + seconds
    waits = {name: check.start() for name, check in checks.items()}
    return {name: _result(wait, until) for name, wait in waits.items()}


def _result(wait: Callable[[float], T], until: float) -> T | CheckFailed:
    try:
        return wait(until)
    except CheckFailed as failure:
        return failure
