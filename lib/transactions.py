"""Transactions that run side by side: one order of locks, and a repeat where the database ends one."""

import functools
import random
import time
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from django.db import OperationalError, connection
from django.db.models import Model, QuerySet

# "deadlock detected" and "could not serialize access": PostgreSQL has ended the whole transaction, and
# the same once more will pass.
CONFLICTS = frozenset({"40P01", "40001"})
TRIES = 4
PAUSE_SECONDS = 0.02

Given = ParamSpec("Given")
Result = TypeVar("Result")
Row = TypeVar("Row", bound=Model)


def is_conflict(error: BaseException) -> bool:
    return getattr(error.__cause__, "sqlstate", None) in CONFLICTS


def repeated(work: Callable[Given, Result]) -> Callable[Given, Result]:
    """Decorate a function that is one transaction: carry it out again, a few times at most, where the
    database has ended it for a conflict with another.

    Inside a transaction of its caller's it is carried out once: what the database has ended is all of
    that, and only whoever began it can repeat it.
    """

    @functools.wraps(work)
    def again(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        for number in range(1, TRIES):
            try:
                return work(*args, **kwargs)
            except OperationalError as error:
                if connection.in_atomic_block or not is_conflict(error):
                    raise
            time.sleep(random.uniform(0, PAUSE_SECONDS * 2**number))  # noqa: S311
        return work(*args, **kwargs)

    return again


def in_order(rows: QuerySet[Row, Any], *order: str) -> QuerySet[Row]:
    """The same rows, for an UPDATE that locks them in an order: two that lock the same rows, each in
    the order of its own plan, can wait for each other."""
    found: QuerySet[Row] = rows.model._default_manager.all()
    if not connection.features.has_select_for_update:
        return rows
    ordered = rows.order_by(*order or ("pk",)).select_for_update(of=("self",), no_key=True)
    return found.filter(pk__in=ordered.values("pk"))


def lock(rows: QuerySet[Any, Any], *order: str) -> list[Any]:
    """Lock rows in an order until the transaction ends, as their deletion needs it. Their keys."""
    ordered = rows.order_by(*order or ("pk",)).select_for_update(of=("self",))
    return list(ordered.values_list("pk", flat=True))
