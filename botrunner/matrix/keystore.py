"""nio's key store, shared by all bot runners: only the process that opened it last may write.

A process that was suspended while another took over resumes in the middle of its work. It would
write outdated ratchets and one-time keys, which makes the device unreachable. So every write
checks, in the same statement, that this process still holds the store; and counts, to recognize a
store restored from a backup.
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
    """A key store whose writes raise `LeaseLost` once another process has opened it."""

    def _create_database(self) -> Database:
        return Database(self.database_path, pragmas={"foreign_keys": 1, "secure_delete": 1})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._me = secrets.token_hex(8)
        with self.database.atomic("IMMEDIATE"):
            self._acquire()

    def _acquire(self) -> None:
        run = self.database.execute_sql
        run("CREATE TABLE IF NOT EXISTS keeper (holder TEXT NOT NULL, writes INTEGER NOT NULL)")
        if not run("UPDATE keeper SET holder = ?, writes = writes + 1", (self._me,)).rowcount:
            run("INSERT INTO keeper VALUES (?, 1)", (self._me,))
        # Temporary triggers end with this connection, which identifies this process.
        for table in self.models:
            name = table._meta.table_name
            for change in ("INSERT", "UPDATE", "DELETE"):
                run(GUARD.format(table=name, change=change, taken=TAKEN, me=self._me))

    def check_holder(self) -> None:
        """Check that this process holds the store. Raises `LeaseLost`."""
        [holder] = self.database.execute_sql("SELECT holder FROM keeper").fetchone()
        if holder != self._me:
            raise LeaseLost

    @property
    def writes(self) -> int:
        """The number of writes so far."""
        return int(self.database.execute_sql("SELECT writes FROM keeper").fetchone()[0])


def writes_of(path: Path) -> int | None:
    """Return the number of writes to a store; None if it does not exist or is not readable."""
    if not path.exists():
        return None
    try:
        with closing(sqlite3.connect(path)) as database:
            names = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
            if "keeper" not in names:
                # A store from before writes were counted, or no store.
                return 0 if "accounts" in names else None
            row = database.execute("SELECT writes FROM keeper").fetchone()
            return int(row[0]) if row else 0
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError):
            raise
        return None
