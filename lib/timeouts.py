"""Questions that may hang, asked without hanging.

A database or a Redis that swallows packets keeps the thread that asks for as long as its driver
waits. Until that is back no other thread is sent after it.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Generic, NoReturn, TypeVar

from django.db import connection

from lib.db import SERVICE_ERRORS

logger = logging.getLogger(__name__)

T = TypeVar("T")


class NoAnswer(Exception):
    """The message says why."""


class Bounded(Generic[T]):
    def __init__(self, ask: Callable[[], T]) -> None:
        self.ask = ask
        self._asking = threading.Lock()

    def start(self) -> Callable[[float], T]:
        """Begin to ask. What is returned waits for the answer until a moment of `time.monotonic()`
        and raises `NoAnswer`."""
        if not self._asking.acquire(blocking=False):
            return _unasked
        answers: list[T] = []
        failures = ["No answer in time."]
        answered = threading.Event()

        def work() -> None:
            try:
                answers.append(self.ask())
            except SERVICE_ERRORS as error:
                # The text may hold an address or a row.
                failures.append(type(error).__name__)
            except Exception as error:
                logger.exception("A check broke")
                failures.append(type(error).__name__)
            self._end()
            answered.set()

        def wait(until: float) -> T:
            answered.wait(max(0.0, until - time.monotonic()))
            if not answers:
                raise NoAnswer(failures[-1])
            return answers[0]

        threading.Thread(target=work, name="check", daemon=True).start()
        return wait

    def _end(self) -> None:
        try:
            connection.close()
        except SERVICE_ERRORS:
            pass  # it was lost already
        finally:
            self._asking.release()


def _unasked(until: float) -> NoReturn:
    raise NoAnswer("Still no answer to an earlier check.")


def ask_all(questions: Mapping[str, Bounded[T]], seconds: float) -> dict[str, T | NoAnswer]:
    """The answers of all, asked at the same time."""
    until = time.monotonic() + seconds
    waits = {name: question.start() for name, question in questions.items()}
    return {name: _answer(wait, until) for name, wait in waits.items()}


def _answer(wait: Callable[[float], T], until: float) -> T | NoAnswer:
    try:
        return wait(until)
    except NoAnswer as none:
        return none
