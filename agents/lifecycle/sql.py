"""agents.lifecycle.conditions and agents.lifecycle.states in Django's words."""

from functools import reduce
from operator import and_, or_
from typing import Any

from django.db.models import F, Q
from django.db.models.functions import Now

from agents.lifecycle.conditions import Column, Condition, Every, Is, Moment, Some
from agents.lifecycle.states import Change


def as_q(condition: Condition) -> Q:
    """A condition as the WHERE of a statement, with the times of the database's clock: the clocks of
    the workers need not agree."""
    match condition:
        case Is(column, lookup, value):
            return Q(**{f"{column}__{lookup}": as_value(value)})
        case Every(parts):
            return reduce(and_, map(as_q, parts), Q())
        case Some(parts) if parts:
            return reduce(or_, map(as_q, parts))
    return Q(pk__in=[])


def as_value(value: Any) -> Any:
    match value:
        case Moment(delay):
            return Now() + delay if delay else Now()
        case Column(name):
            return F(name)
    return value


def as_columns(change: Change) -> dict[str, Any]:
    """What to write of a run, for `update()`."""
    return {name: as_value(value) for name, value in change.columns.items()}
