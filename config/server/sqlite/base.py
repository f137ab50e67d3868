"""Django's SQLite backend with a queue of writers.

SQLite allows one writer at a time. The others sleep and retry, with growing pauses and in no order: the
database idles while they sleep, and some starve for seconds. Here a transaction waits on locks before
it begins, so that the next one is woken at once: the threads of a process on a lock of the process,
then the processes on a file beside the database. Code that writes often does so in a transaction, even
for one statement: a bare statement does not queue.

It can go when Python's sqlite3 offers SQLite's own blocking locks (sqlite3_setlk_timeout, SQLite 3.50,
a compile-time option) and Django sets them. Django's `transaction_mode` (ticket 29280), which the
settings use, does not queue.
"""

import fcntl
import os
import threading
from typing import Any

from django.db.backends.sqlite3 import base
from django.db.backends.sqlite3.operations import DatabaseOperations as SQLiteOperations
from django.db.models.constants import OnConflict
from django.db.utils import OperationalError

_turn = threading.Lock()


def _reset_turn() -> None:
    """Free the lock in a child process, which does not have the thread that holds it."""
    global _turn
    _turn = threading.Lock()


os.register_at_fork(after_in_child=_reset_turn)


class DatabaseOperations(SQLiteOperations):
    """Let `ignore_conflicts` ignore duplicates only, as on PostgreSQL. Django's INSERT OR IGNORE also
    drops rows that a NOT NULL or CHECK constraint refuses, without an error."""

    def insert_statement(self, on_conflict: Any = None) -> str:
        return super().insert_statement(None if on_conflict == OnConflict.IGNORE else on_conflict)

    def on_conflict_suffix_sql(
        self, fields: Any, on_conflict: Any, update_fields: Any, unique_fields: Any
    ) -> str:
        if on_conflict == OnConflict.IGNORE:
            return "ON CONFLICT DO NOTHING"
        return super().on_conflict_suffix_sql(fields, on_conflict, update_fields, unique_fields)


class DatabaseWrapper(base.DatabaseWrapper):
    ops_class = DatabaseOperations

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._turn: threading.Lock | None = None
        self._file: int | None = None

    def _start_transaction_under_autocommit(self) -> None:
        try:
            self._take_turn()
            super()._start_transaction_under_autocommit()  # type: ignore[misc]
        except BaseException:
            self._give_turn()
            raise

    def _commit(self) -> None:
        super()._commit()  # type: ignore[misc]
        self._give_turn()

    def _rollback(self) -> None:
        try:
            super()._rollback()  # type: ignore[misc]
        finally:
            self._give_turn()

    def _close(self) -> None:
        try:
            super()._close()  # type: ignore[misc]
        finally:
            self._give_turn()
            if self._file is not None:
                os.close(self._file)
                self._file = None

    def _take_turn(self) -> None:
        turn = _turn
        if not turn.acquire(timeout=self.settings_dict["OPTIONS"].get("timeout", 5)):
            raise OperationalError("database is locked")
        self._turn = turn
        if self.is_in_memory_db():
            return
        try:
            if self._file is None:
                path = f"{self.settings_dict['NAME']}.lock"
                self._file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            # Without a time limit, but at most one thread of a process waits here: the others time
            # out above. The kernel releases the lock of a process that dies.
            fcntl.flock(self._file, fcntl.LOCK_EX)
        except OSError as error:
            raise OperationalError(
                f"the lock beside the database cannot be taken: {error}"
            ) from error

    def _give_turn(self) -> None:
        turn, self._turn = self._turn, None
        if turn is None:
            return
        if self._file is not None:
            fcntl.flock(self._file, fcntl.LOCK_UN)
        turn.release()
