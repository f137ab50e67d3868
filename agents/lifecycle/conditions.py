"""Conditions on a record, written once: Python checks them on an object, the database in a WHERE
(`agents.lifecycle.sql.as_q`). Times are of the database's clock."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from operator import eq, ge, gt, le, lt
from typing import Any

LOOKUPS: dict[str, Callable[[Any, Any], bool]] = {
    "exact": eq,
    "lt": lt,
    "lte": le,
    "gt": gt,
    "gte": ge,
    "in": lambda value, choices: value in choices,
    "isnull": lambda value, expected: (value is None) is expected,
}


@dataclass(frozen=True)
class FromNow:
    """A time: the moment that the statement is executed, plus `delay`."""

    delay: timedelta = timedelta()

    def __add__(self, delay: timedelta) -> "FromNow":
        return FromNow(self.delay + delay)

    def __sub__(self, delay: timedelta) -> "FromNow":
        return FromNow(self.delay - delay)


NOW = FromNow()


@dataclass(frozen=True)
class Column:
    """The value of another column of the record."""

    name: str


class Condition:
    def __and__(self, other: "Condition") -> "Condition":
        return And((self, other))

    def __or__(self, other: "Condition") -> "Condition":
        return Or((self, other))

    def matches(self, record: Any, now: datetime) -> bool:
        raise NotImplementedError


@dataclass(frozen=True)
class Compare(Condition):
    """A comparison with a lookup of Django's. An empty column matches `isnull` alone."""

    column: str
    lookup: str
    value: Any

    def matches(self, record: Any, now: datetime) -> bool:
        actual, value = getattr(record, self.column), self.value
        if isinstance(value, FromNow):
            value = now + value.delay
        elif isinstance(value, Column):
            value = getattr(record, value.name)
        if self.lookup != "isnull" and (actual is None or value is None):
            return False
        return LOOKUPS[self.lookup](actual, value)


@dataclass(frozen=True)
class And(Condition):
    parts: tuple[Condition, ...]

    def matches(self, record: Any, now: datetime) -> bool:
        return all(part.matches(record, now) for part in self.parts)


@dataclass(frozen=True)
class Or(Condition):
    parts: tuple[Condition, ...]

    def matches(self, record: Any, now: datetime) -> bool:
        return any(part.matches(record, now) for part in self.parts)


ALWAYS = And(())
NEVER = Or(())
