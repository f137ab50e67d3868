"""Cursor pagination by keyset, without counting or offsets: every page costs the same, and rows that
are added or deleted meanwhile shift nothing."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from django.core.exceptions import ValidationError
from django.db.models import DateTimeField, Model, Q, QuerySet
from django.http import QueryDict

from lib.httperrors import BadRequest

SIZE = 50
MAX_SIZE = 100
SIDES = ("after", "before")
PARAMETERS = frozenset({"page[size]", "page[after]", "page[before]"})
CURSOR = re.compile(r"([0-9]{1,16})\.([A-Za-z0-9_-]{1,64})\Z")
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

# A column and the id as a tiebreaker, each with a sign, as in an index.
Order = tuple[str, str]


@dataclass(frozen=True)
class CursorPage:
    rows: list[Any]
    links: dict[str, str | None]


def paginate(
    rows: QuerySet[Any],
    query: QueryDict,
    order: Order,
    link: Callable[[QueryDict], str],
    fitting: Callable[[list[Any]], int] = len,
) -> CursorPage:
    """Return the page of a query. `link` builds the URL of another query; `fitting` returns how many of
    the rows fit on a page. Raises `BadRequest`."""
    size = _size(query)
    after, before = (_position(query, f"page[{side}]", rows.model, order) for side in SIDES)
    if after:
        rows = rows.filter(_beyond(order, after))
    if before:
        rows = rows.filter(_beyond(_reversed(order), before))
    backwards = before is not None and after is None
    fetched = list(rows.order_by(*(_reversed(order) if backwards else order))[: size + 1])
    count = fitting(fetched[:size])
    more, shown = len(fetched) > count, fetched[:count]
    if backwards:
        shown.reverse()

    def neighbour(side: str, row: Any) -> str:
        other_query = query.copy()
        for other in SIDES:
            other_query.pop(f"page[{other}]", None)
        other_query[f"page[{side}]"] = cursor(row, order)
        return link(other_query)

    has_next, has_previous = (True, more) if backwards else (more, after is not None)
    return CursorPage(
        shown,
        {
            "prev": neighbour("before", shown[0]) if shown and has_previous else None,
            "next": neighbour("after", shown[-1]) if shown and has_next else None,
        },
    )


def order_of(query: QueryDict, sorts: Mapping[str, Order]) -> Order:
    """Return the requested order, by default the first one. Raises `BadRequest`."""
    name = query.get("sort")
    if name is None:
        return next(iter(sorts.values()))
    order = sorts.get(name.removeprefix("-"))
    if order is None:
        raise BadRequest(
            f"Must be one of {', '.join(sorts)}, or one with a leading '-'.", parameter="sort"
        )
    descending = name.startswith("-")
    return order if order[0].startswith("-") == descending else _reversed(order)


def cursor(row: Any, order: Order) -> str:
    value = getattr(row, order[0].removeprefix("-"))
    if isinstance(value, datetime):
        value = (value - EPOCH) // timedelta(microseconds=1)
    return f"{value}.{row.pk}"


def _size(query: QueryDict) -> int:
    value = query.get("page[size]", str(SIZE))
    if re.fullmatch("[0-9]{1,3}", value, re.ASCII) and 1 <= int(value) <= MAX_SIZE:
        return int(value)
    raise BadRequest(f"Must be a whole number from 1 to {MAX_SIZE}.", parameter="page[size]")


def _position(
    query: QueryDict, parameter: str, model: type[Model], order: Order
) -> tuple[Any, Any] | None:
    text = query.get(parameter)
    if text is None:
        return None
    error = BadRequest("Not a valid cursor. Take it from a page link.", parameter=parameter)
    match = CURSOR.match(text)
    if not match:
        raise error
    try:
        pk = model._meta.pk.to_python(match[2])
    except ValidationError:
        raise error from None
    number = int(match[1])
    column = model._meta.get_field(order[0].removeprefix("-"))
    if isinstance(column, DateTimeField):
        return EPOCH + timedelta(microseconds=number), pk
    return number, pk


def _beyond(order: Order, position: tuple[Any, Any]) -> Q:
    (column, comparison), (_, tie) = map(_comparison, order)
    value, pk = position
    # The first condition is implied by the second; an index scan can start at it.
    return Q(**{f"{column}__{comparison}e": value}) & (
        Q(**{f"{column}__{comparison}": value}) | Q(**{f"pk__{tie}": pk})
    )


def _comparison(name: str) -> tuple[str, str]:
    return (name[1:], "lt") if name.startswith("-") else (name, "gt")


def _reversed(order: Order) -> Order:
    first, second = (name[1:] if name.startswith("-") else f"-{name}" for name in order)
    return first, second
