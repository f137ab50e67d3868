"""Objects that exist once per process: clients, publishers, caches, counters.

`@once` makes such an object at the first call; `shared` registers one that a module makes when it is
imported. `reset()` returns all of them to their first state: tests do so between two cases. A child
process makes its own: connections and threads of the parent do not work in it.
"""

import functools
import os
import threading
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

T = TypeVar("T")


class Resettable(Protocol):
    def reset(self) -> None: ...


R = TypeVar("R", bound=Resettable)
_resets: list[Callable[[], object]] = []
# Never finalised: that could close a connection that the parent still uses.
_inherited: list[Any] = []


class Once(Generic[T]):
    """A factory that runs once per process and shares its result."""

    def __init__(self, make: Callable[[], T]) -> None:
        functools.update_wrapper(self, make)
        self._make = make
        self._lock = threading.Lock()
        self._made: list[T] = []

    def __call__(self) -> T:
        try:
            return self._made[0]
        except IndexError:
            pass
        with self._lock:
            if not self._made:
                self._made.append(self._make())
            return self._made[0]

    def exists(self) -> bool:
        return bool(self._made)

    def reset(self) -> None:
        """Forget the object, and close it if it can be closed; the next call makes another."""
        made, self._made = self._made, []
        for each in made:
            if close := getattr(each, "close", None):
                close()

    def after_fork(self) -> None:
        _inherited.extend(self._made)
        self._lock = threading.Lock()
        self._made = []


_factories: list[Once[Any]] = []


def once(make: Callable[[], T]) -> Once[T]:
    """Decorate a factory without arguments: this process calls it once and shares the result."""
    factory = Once(make)
    _factories.append(factory)
    return factory


def shared(instance: R) -> R:
    """Register an object that `reset()` resets."""
    on_reset(instance.reset)
    return instance


def on_reset(clear: Callable[[], object]) -> None:
    """Register a function that `reset()` calls."""
    _resets.append(clear)


def reset() -> None:
    for factory in _factories:
        factory.reset()
    for clear in _resets:
        clear()


def _after_fork() -> None:
    for factory in _factories:
        factory.after_fork()


os.register_at_fork(after_in_child=_after_fork)
