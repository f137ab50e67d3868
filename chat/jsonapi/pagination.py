"""Pages of a list, cut at a place in its order and never by counting: a page costs the same wherever
it begins, and what comes or goes meanwhile moves nothing."""

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

# A column and the id, which decides between equals; each with a sign, as an index has them.
Order = tuple[str, str]


@dataclass(frozen=True)
class Page:
    rows: list[Any]
    links: dict[str, str | None]


def cut(
    rows: QuerySet[Any],
    query: QueryDict,
    order: Order,
    link: Callable[[QueryDict], str],
    fitting: Callable[[list[Any]], int] = len,
) -> Page:
    """The page that a query asks for. `link` makes an address of another query; `fitting` says how
    many of the rows there is room for, from the first on. Raises `BadRequest`."""
    size = _size(query)
    after, before = (_place(query, f"page[{side}]", rows.model, order) for side in SIDES)
    if after:
        rows = rows.filter(_beyond(order, after))
    if before:
        rows = rows.filter(_beyond(_reversed(order), before))
    backwards = before is not None and after is None
    found = list(rows.order_by(*(_reversed(order) if backwards else order))[: size + 1])
    shown = fitting(found[:size])
    more, found = len(found) > shown, found[:shown]
    if backwards:
        found.reverse()

    def beside(side: str, row: Any) -> str:
        there = query.copy()
        for other in SIDES:
            there.pop(f"page[{other}]", None)
        there[f"page[{side}]"] = cursor(row, order)
        return link(there)

    has_next, has_previous = (True, more) if backwards else (more, after is not None)
    return Page(
        found,
        {
            "prev": beside("before", found[0]) if found and has_previous else None,
            "next": beside("after", found[-1]) if found and has_next else None,
        },
    )


def chosen(query: QueryDict, sorts: Mapping[str, Order]) -> Order:
    """The order asked for, else the first of them. Raises `BadRequest`."""
    name = query.get("sort")
    if name is None:
        return next(iter(sorts.values()))
    order = sorts.get(name.removeprefix("-"))
    if order is None:
        raise BadRequest(f"It can be sorted by {', '.join(sorts)}.", parameter="sort")
    falling = name.startswith("-")
    return order if order[0].startswith("-") == falling else _reversed(order)


def cursor(row: Any, order: Order) -> str:
    value = getattr(row, order[0].removeprefix("-"))
    if isinstance(value, datetime):
        value = (value - EPOCH) // timedelta(microseconds=1)
    return f"{value}.{row.pk}"


def _size(query: QueryDict) -> int:
    value = query.get("page[size]", str(SIZE))
    if re.fullmatch("[0-9]{1,3}", value, re.ASCII) and 1 <= int(value) <= MAX_SIZE:
        return int(value)
    raise BadRequest(f"A whole number from 1 to {MAX_SIZE}.", parameter="page[size]")


def _place(
    query: QueryDict, parameter: str, model: type[Model], order: Order
) -> tuple[Any, Any] | None:
    text = query.get(parameter)
    if text is None:
        return None
    refusal = BadRequest("It must be taken from a link to a page.", parameter=parameter)
    found = CURSOR.match(text)
    if not found:
        raise refusal
    try:
        pk = model._meta.pk.to_python(found[2])
    except ValidationError:
        raise refusal from None
    number = int(found[1])
    column = model._meta.get_field(order[0].removeprefix("-"))
    if isinstance(column, DateTimeField):
        return EPOCH + timedelta(microseconds=number), pk
    return number, pk


def _beyond(order: Order, place: tuple[Any, Any]) -> Q:
    (column, way), (_, tie) = map(_way, order)
    value, pk = place
    # The first says no more than the second, and is what an index can begin at.
    return Q(**{f"{column}__{way}e": value}) & (
        Q(**{f"{column}__{way}": value}) | Q(**{f"pk__{tie}": pk})
    )


def _way(name: str) -> tuple[str, str]:
    return (name[1:], "lt") if name.startswith("-") else (name, "gt")


def _reversed(order: Order) -> Order:
    first, second = (name[1:] if name.startswith("-") else f"-{name}" for name in order)
    return first, second
