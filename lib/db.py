"""Transient errors, pooled connections, and concurrent transactions."""

import functools
import random
import time
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from django.db import Error, InterfaceError, InternalError, OperationalError, connection
from django.db.models import Model, QuerySet
from redis.exceptions import RedisError

# The database is unavailable, or this connection to it is lost; another try may succeed. PostgreSQL
# reports a transaction that it ended because it was idle as an internal error.
TRANSIENT_ERRORS = (OperationalError, InterfaceError, InternalError)
# Any error of the database, those of one row included: a background loop logs it and retries, because a
# loop that ends does more harm.
DATABASE_ERRORS = (Error,)
SERVICE_ERRORS = (*DATABASE_ERRORS, RedisError, OSError)

# "deadlock detected" and "could not serialize access": PostgreSQL has rolled back the transaction, and
# a retry will succeed.
CONFLICTS = frozenset({"40P01", "40001"})
ATTEMPTS = 4
PAUSE_SECONDS = 0.02

Params = ParamSpec("Params")
Result = TypeVar("Result")
Row = TypeVar("Row", bound=Model)


def release_connection() -> None:
    """Return this thread's connection to its pool, if there is one, before a long wait."""
    if not connection.in_atomic_block:
        connection.close_if_unusable_or_obsolete()


def is_conflict(error: BaseException) -> bool:
    return getattr(error.__cause__, "sqlstate", None) in CONFLICTS


def retry_on_conflict(transaction: Callable[Params, Result]) -> Callable[Params, Result]:
    """Decorate a function that is one transaction: run it again, a few times at most, if the database
    rolled it back for a conflict with another.

    Inside a transaction of the caller it runs once: the database has rolled back all of that, and only
    its owner can repeat it.
    """

    @functools.wraps(transaction)
    def run(*args: Params.args, **kwargs: Params.kwargs) -> Result:
        for attempt in range(1, ATTEMPTS):
            try:
                return transaction(*args, **kwargs)
            except OperationalError as error:
                if connection.in_atomic_block or not is_conflict(error):
                    raise
            time.sleep(random.uniform(0, PAUSE_SECONDS * 2**attempt))  # noqa: S311
        return transaction(*args, **kwargs)

    return run


def in_order(rows: QuerySet[Row, Any], *order: str) -> QuerySet[Row]:
    """Return the same rows for an UPDATE that locks them in an order: two statements that lock the same
    rows, each in the order of its own plan, can deadlock."""
    if not connection.features.has_select_for_update:
        return rows
    all_rows: QuerySet[Row] = rows.model._default_manager.all()
    ordered = rows.order_by(*order or ("pk",)).select_for_update(of=("self",), no_key=True)
    return all_rows.filter(pk__in=ordered.values("pk"))


def lock(rows: QuerySet[Any, Any], *order: str) -> list[Any]:
    """Lock rows in an order until the transaction ends, as strongly as a deletion does; return their
    keys."""
    ordered = rows.order_by(*order or ("pk",)).select_for_update(of=("self",))
    return list(ordered.values_list("pk", flat=True))
