"""Django's PostgreSQL backend with a pool that reports why it has no connection.

The pool of psycopg connects in threads of its own, and logs the reason of a failure as a warning; the
thread that waits for a connection gets "couldn't get a connection after 5.00 sec". Here it gets the
reason of PostgreSQL, and at once if a retry cannot help: a wrong password, an unknown database.

An idle pool holds connections that other processes need. So a process opens at most a quarter of what
PostgreSQL permits, and closes what it does not use.
"""

import re
import time
from typing import Any, Self

import psycopg
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.db.backends.base.base import NO_DB_ALIAS
from django.db.backends.postgresql import base
from psycopg_pool import ConnectionPool, PoolTimeout

from lib import db
from lib.postgresql import PERMITTED, share

# While no connection was ever made, or the last attempt failed, a waiting thread looks for the reason.
LOOK_SECONDS = 0.25
# After these another attempt fails as well. libpq has no codes for them, and PostgreSQL may translate
# its words: what is not recognized is retried for the time of the pool.
PERMANENT = re.compile(
    r"authentication failed|no password supplied|does not exist|pg_hba\.conf|not permitted to log in"
    r"|permission denied for database|not currently accepting connections|certificate|SSL"
    r"|unsupported startup parameter|unrecognized configuration parameter|no such (user|database)"
    r"|invalid \S+ (value|option)|invalid (port|integer)|connection option|sslmode",
    re.IGNORECASE,
)
TOO_MANY = re.compile(r"too many (clients|connections)|remaining connection slots", re.IGNORECASE)
FEWER = "Run fewer processes, lower DATABASE_POOL_SIZE, or raise max_connections of PostgreSQL."
POOLER = "If that is PgBouncer, set DATABASE_PGBOUNCER=transaction, or =session."
GUARD = "SET idle_in_transaction_session_timeout = '10s'"


class Connection(psycopg.Connection[Any]):
    """A connection of a pool, whose class has the reason why the last attempt failed."""

    failure = ""  # empty after a success
    succeeded = False

    @classmethod
    def connect(cls, conninfo: str = "", **options: Any) -> Self:
        try:
            made = super().connect(conninfo, **options)
        except psycopg.Error as error:
            cls.failure = reason(error, options)
            db.availability.unavailable(cls.failure)
            raise
        if cls.failure:
            db.availability.available()
        cls.failure, cls.succeeded = "", True
        return made


class ReportingPool(ConnectionPool[Connection]):
    def __init__(self, **options: Any) -> None:
        super().__init__(open=False, connection_class=Connection, **options)
        self._is_fitted = False

    def getconn(self, timeout: float | None = None) -> Connection:
        """Return a connection. Raises `psycopg.OperationalError` with the reason if there is none."""
        until = time.monotonic() + (self.timeout if timeout is None else timeout)
        while True:
            remaining = until - time.monotonic()
            is_sure = Connection.succeeded and not Connection.failure
            try:
                made = super().getconn(remaining if is_sure else min(LOOK_SECONDS, remaining))
            except PoolTimeout:
                failure = Connection.failure
                if PERMANENT.search(failure) or time.monotonic() >= until:
                    raise psycopg.OperationalError(failure or self._is_used_up()) from None
            else:
                self._fit(made)
                return made

    def _is_used_up(self) -> str:
        return (
            f"All {self.max_size} connections of this process were in use for {self.timeout:g} s. "
            "Raise DATABASE_POOL_SIZE, or max_connections of PostgreSQL if that limits it."
        )

    def _fit(self, connection: Connection) -> None:
        """Limit the pool to a part of what PostgreSQL permits, once."""
        if self._is_fitted:
            return
        self._is_fitted = True
        row = connection.execute(PERMITTED).fetchone()
        if row and row[0] is not None:
            limit = share(row[0])
            if limit < self.max_size:
                self.resize(min(self.min_size, limit), limit)
                db.logger.info(
                    "PostgreSQL permits %d connections: this process opens at most %d",
                    row[0],
                    limit,
                )


def reason(error: Exception, options: dict[str, Any]) -> str:
    """Return PostgreSQL's reason in one line, without the password."""
    text = db.one_line(error)
    if password := str(options.get("password") or ""):
        text = text.replace(f'"{password}"', '"[removed]"')
    if TOO_MANY.search(text):
        return f"{text}. {FEWER}"
    return f"{text}. {POOLER}" if "startup parameter" in text else text


class DatabaseWrapper(base.DatabaseWrapper):
    @property
    def pool(self) -> ReportingPool | None:
        """Return the pool of this process, as Django's, of another class."""
        options = self.settings_dict["OPTIONS"].get("pool")
        if self.alias == NO_DB_ALIAS or not options:
            return None
        pools: dict[str, ReportingPool] = self._connection_pools  # type: ignore[attr-defined]
        if self.alias not in pools:
            if self.settings_dict.get("CONN_MAX_AGE", 0) != 0:
                raise ImproperlyConfigured("Pooling doesn't support persistent connections.")
            made = ReportingPool(
                kwargs=self.get_connection_params() | {"autocommit": True},
                configure=self._configure_connection,
                check=ReportingPool.check_connection
                if self.settings_dict["CONN_HEALTH_CHECKS"]
                else None,
                **options,
            )
            pools.setdefault(self.alias, made)
        return pools[self.alias]

    def _configure_connection(self, connection: Any) -> bool:
        if settings.DATABASE_PGBOUNCER == "session":
            # It refuses the startup parameter; in this mode the setting lasts as long as the session.
            connection.execute(GUARD)
        return bool(super()._configure_connection(connection))  # type: ignore[misc]

    def get_new_connection(self, conn_params: dict[str, Any]) -> Any:
        try:
            return super().get_new_connection(conn_params)
        except psycopg.Error as error:
            raise psycopg.OperationalError(reason(error, conn_params)) from None
