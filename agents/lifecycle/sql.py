"""The conditions and changes of agents.lifecycle as Django expressions."""

from functools import reduce
from operator import and_, or_
from typing import Any

from django.db.models import F, Q
from django.db.models.functions import Now

from agents.lifecycle.conditions import And, Column, Compare, Condition, FromNow, Or
from agents.lifecycle.states import StateChange


def as_q(condition: Condition) -> Q:
    """Convert a condition to a WHERE. Times are of the database's clock: the workers' clocks need not
    agree."""
    match condition:
        case Compare(column, lookup, value):
            return Q(**{f"{column}__{lookup}": as_value(value)})
        case And(parts):
            return reduce(and_, map(as_q, parts), Q())
        case Or(parts) if parts:
            return reduce(or_, map(as_q, parts))
    return Q(pk__in=[])


def as_value(value: Any) -> Any:
    match value:
        case FromNow(delay):
            return Now() + delay if delay else Now()
        case Column(name):
            return F(name)
    return value


def as_columns(change: StateChange) -> dict[str, Any]:
    """Convert a change to the arguments of `update()`."""
    return {name: as_value(value) for name, value in change.columns.items()}
