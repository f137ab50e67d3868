"""A value that is loaded again every few seconds, not for every use."""

import time
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class TimedCache(Generic[T]):
    """The result of `load`, at most `seconds` old. Threads that find it stale may each load it."""

    def __init__(self, load: Callable[[], T], seconds: float) -> None:
        self._load = load
        self._seconds = seconds
        self._value: list[T] = []
        self._stale_at = 0.0

    def get(self) -> T:
        if not self._value or time.monotonic() >= self._stale_at:
            self._value = [self._load()]
            self._stale_at = time.monotonic() + self._seconds
        return self._value[0]

    def reset(self) -> None:
        """Load the value again at its next use."""
        self._value = []
