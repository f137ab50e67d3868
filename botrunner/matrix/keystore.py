"""nio's store of keys, shared by all bot runners: only who opened it last may write.

A process that was frozen while another took its place goes on in the middle of what it was doing. What
it would write then are ratchets and one-time keys of the past, and the device could not be talked to
any more. So every write asks, in the same statement, whether the store is still this process's; and
counts, so that a store from a backup is told from the one that was in use.
"""

import secrets
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from nio.store import SqliteStore
from peewee import IntegrityError, SqliteDatabase

from botrunner.models import LeaseLost

TAKEN = "another process has opened the store"
GUARD = """
CREATE TEMP TRIGGER keep_{table}_{change} BEFORE {change} ON main.{table} BEGIN
    SELECT RAISE(ABORT, '{taken}') FROM keeper WHERE holder <> '{me}';
    UPDATE keeper SET writes = writes + 1;
END
"""


class Database(SqliteDatabase):
    def execute_sql(self, sql: str, params: Any = None, **options: Any) -> Any:
        try:
            return super().execute_sql(sql, params, **options)
        except IntegrityError as error:
            if TAKEN in str(error):
                raise LeaseLost from None
            raise


class Store(SqliteStore):
    """Whatever writes raises `LeaseLost` once another process has opened it."""

    def _create_database(self) -> Database:
        return Database(self.database_path, pragmas={"foreign_keys": 1, "secure_delete": 1})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._me = secrets.token_hex(8)
        with self.database.atomic("IMMEDIATE"):
            self._take()

    def _take(self) -> None:
        run = self.database.execute_sql
        run("CREATE TABLE IF NOT EXISTS keeper (holder TEXT NOT NULL, writes INTEGER NOT NULL)")
        if not run("UPDATE keeper SET holder = ?, writes = writes + 1", (self._me,)).rowcount:
            run("INSERT INTO keeper VALUES (?, 1)", (self._me,))
        # Temporary ones, which end with this connection: they stand for who this process was.
        for table in self.models:
            name = table._meta.table_name
            for change in ("INSERT", "UPDATE", "DELETE"):
                run(GUARD.format(table=name, change=change, taken=TAKEN, me=self._me))

    def check_holder(self) -> None:
        """Raises `LeaseLost`."""
        [holder] = self.database.execute_sql("SELECT holder FROM keeper").fetchone()
        if holder != self._me:
            raise LeaseLost

    @property
    def writes(self) -> int:
        """How much was written to it, ever."""
        return int(self.database.execute_sql("SELECT writes FROM keeper").fetchone()[0])


def writes_of(path: Path) -> int | None:
    """How much was written to a store, ever; None where there is none that can be read."""
    if not path.exists():
        return None
    try:
        with closing(sqlite3.connect(path)) as database:
            names = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
            if "keeper" not in names:
                # From before writes were counted, unless it is no store.
                return 0 if "accounts" in names else None
            found = database.execute("SELECT writes FROM keeper").fetchone()
            return int(found[0]) if found else 0
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError):
            raise
        return None
