"""Django's SQLite backend, with a queue for the writers of a process.

SQLite lets one writer in at a time; the others sleep and ask again, for ever longer, and come in
whatever order. With many threads that wastes the database's time and starves some of them for
seconds. Here the threads of a process wait on a lock, so that the next one is let in at once, and
only the few processes ask again.
"""

import os
import threading
from typing import Any

from django.db.backends.sqlite3 import base
from django.db.utils import OperationalError

_turn = threading.Lock()


def _forget_turn() -> None:
    """The thread that had the turn when the process forked is not in the child."""
    global _turn
    _turn = threading.Lock()


os.register_at_fork(after_in_child=_forget_turn)


class DatabaseWrapper(base.DatabaseWrapper):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._has_turn: threading.Lock | None = None

    def _start_transaction_under_autocommit(self) -> None:
        turn = _turn
        if not turn.acquire(timeout=self.settings_dict["OPTIONS"].get("timeout", 5)):
            raise OperationalError("database is locked")
        self._has_turn = turn
        try:
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

    def _give_turn(self) -> None:
        turn, self._has_turn = self._has_turn, None
        if turn is not None:
            turn.release()
