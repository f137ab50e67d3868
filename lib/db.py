"""Transient errors, pooled connections, and concurrent transactions."""

import functools
import logging
import random
import re
import time
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

from django.conf import settings
from django.db import (
    Error,
    IntegrityError,
    InterfaceError,
    InternalError,
    OperationalError,
    connection,
)
from django.db.models import Model, QuerySet
from redis.exceptions import RedisError

logger = logging.getLogger(__name__)

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
UNDEFINED_TABLE = "42P01"
# Of the text of an error; it may name several addresses.
MAX_REASON = 600
LOG_SECONDS = 30.0
MAX_REASONS = 20

DUPLICATE, NO_SUCH_ROW = "23505", "23503"
# "Key (thread_id, position)=(...) already exists.", in any language.
KEY = re.compile(r"\(([^)]*)\)=\(")
SQLITE_DUPLICATE = "UNIQUE constraint failed: "

Params = ParamSpec("Params")
Result = TypeVar("Result")
Row = TypeVar("Row", bound=Model)


def release_connection() -> None:
    """Return this thread's connection to its pool, if there is one, before a long wait."""
    if not connection.in_atomic_block:
        connection.close_if_unusable_or_obsolete()


def one_line(error: BaseException) -> str:
    """Return the text of an error in one line and without secrets."""
    return str(settings.SCRUBBER(" ".join(str(error).split())[:MAX_REASON]))


def why(error: BaseException) -> str | None:
    """Return why the database is unavailable, for an operator; None for another error of it."""
    if "no such table" in str(error) or getattr(error.__cause__, "sqlstate", "") == UNDEFINED_TABLE:
        return "The database of DATABASE_URL lacks tables: run manage.py migrate."
    if isinstance(error, TRANSIENT_ERRORS):
        text = one_line(error)
        return f"DATABASE_URL: {text}" if text.endswith((".", "?")) else f"DATABASE_URL: {text}."
    return None


class Availability:
    """Logs why the database is unavailable: each reason once in a while, and the end."""

    def __init__(self) -> None:
        self._next: dict[str, float] = {}
        self.reason = ""  # empty while it is available

    def unavailable(self, reason: str) -> None:
        self.reason = reason
        now = time.monotonic()
        if now < self._next.get(reason, 0.0):
            return
        if len(self._next) > MAX_REASONS:
            self._next.clear()
        self._next[reason] = now + LOG_SECONDS
        logger.warning("No connection to the database: %s", reason)

    def available(self) -> None:
        self._next.clear()
        self.reason = ""
        logger.info("The database is available again")


availability = Availability()


def is_conflict(error: BaseException) -> bool:
    return getattr(error.__cause__, "sqlstate", None) in CONFLICTS


def is_duplicate(error: IntegrityError, model: type[Model], *fields: str) -> bool:
    """Return whether a row with the same values of these fields exists, and not whether some other
    constraint refused the row."""
    options = model._meta
    columns = {cast("Any", options.get_field(name)).column for name in fields}
    if connection.vendor == "sqlite":
        found = {f"{options.db_table}.{column}" for column in columns}
        _, is_unique, names = str(error).partition(SQLITE_DUPLICATE)
        return bool(is_unique) and set(names.split(", ")) == found
    cause: Any = error.__cause__
    if getattr(cause, "sqlstate", None) != DUPLICATE or cause.diag.table_name != options.db_table:
        return False
    key = KEY.search(cause.diag.message_detail or "")
    return key is not None and {name.strip(' "') for name in key[1].split(",")} == columns


def is_missing_row(error: IntegrityError) -> bool:
    """Return whether the row refers to one that does not exist, such as one deleted just now."""
    if connection.vendor == "sqlite":
        return "FOREIGN KEY constraint failed" in str(error)
    return getattr(error.__cause__, "sqlstate", None) == NO_SUCH_ROW


def may_be_a_race(error: IntegrityError) -> bool:
    """Return whether a concurrent change can have caused the error: a duplicate, or a missing row. A
    column without a value or with a wrong one is a defect."""
    return (
        is_missing_row(error)
        or SQLITE_DUPLICATE in str(error)
        or getattr(error.__cause__, "sqlstate", None) == DUPLICATE
    )


def is_defect(error: Error) -> bool:
    """Return whether a repeat of the request must fail as well."""
    return isinstance(error, IntegrityError) and not may_be_a_race(error)


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
