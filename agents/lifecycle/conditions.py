"""Conditions on a record that are written once: Python asks them of an object, and the database in a
WHERE (`agents.models.as_q`). Times are told by the clock of whoever keeps the records."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from operator import eq, ge, gt, le, lt
from typing import Any

LOOKUPS: dict[str, Callable[[Any, Any], bool]] = {
    "exact": eq,
    "lt": lt,
    "lte": le,
    "gt": gt,
    "gte": ge,
    "in": lambda value, among: value in among,
    "isnull": lambda value, wanted: (value is None) is wanted,
}


@dataclass(frozen=True)
class Moment:
    """So long from when the statement is carried out."""

    delay: timedelta = timedelta()

    def __add__(self, delay: timedelta) -> "Moment":
        return Moment(self.delay + delay)

    def __sub__(self, delay: timedelta) -> "Moment":
        return Moment(self.delay - delay)


NOW = Moment()


@dataclass(frozen=True)
class Column:
    """What stands in another column of the record."""

    name: str


class Condition:
    def __and__(self, other: "Condition") -> "Condition":
        return Every((self, other))

    def __or__(self, other: "Condition") -> "Condition":
        return Some((self, other))

    def holds(self, record: Any, now: datetime) -> bool:
        raise NotImplementedError

    def given(self, record: Any, known: Collection[str]) -> "Condition":
        """What is left to ask of a record whose `known` columns are as they are in `record`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Is(Condition):
    """A comparison as Django has it. With nothing in the column none holds, but `isnull`."""

    column: str
    lookup: str
    value: Any

    def holds(self, record: Any, now: datetime) -> bool:
        found, value = getattr(record, self.column), self.value
        if isinstance(value, Moment):
            value = now + value.delay
        elif isinstance(value, Column):
            value = getattr(record, value.name)
        if self.lookup != "isnull" and (found is None or value is None):
            return False
        return LOOKUPS[self.lookup](found, value)

    def given(self, record: Any, known: Collection[str]) -> Condition:
        if self.column not in known:
            return self
        if isinstance(self.value, Moment | Column):
            return self if getattr(record, self.column) is not None else NEVER
        return ALWAYS if self.holds(record, datetime.max.replace(tzinfo=UTC)) else NEVER


@dataclass(frozen=True)
class Every(Condition):
    parts: tuple[Condition, ...]

    def holds(self, record: Any, now: datetime) -> bool:
        return all(part.holds(record, now) for part in self.parts)

    def given(self, record: Any, known: Collection[str]) -> Condition:
        parts = [part.given(record, known) for part in self.parts]
        if NEVER in parts:
            return NEVER
        return Every(tuple(part for part in parts if part != ALWAYS))


@dataclass(frozen=True)
class Some(Condition):
    parts: tuple[Condition, ...]

    def holds(self, record: Any, now: datetime) -> bool:
        return any(part.holds(record, now) for part in self.parts)

    def given(self, record: Any, known: Collection[str]) -> Condition:
        parts = [part.given(record, known) for part in self.parts]
        if ALWAYS in parts:
            return ALWAYS
        return Some(tuple(part for part in parts if part != NEVER))


ALWAYS = Every(())
NEVER = Some(())
