"""Processes that stand still, as a virtual machine does that is moved."""

import fcntl
import os
import signal
import sqlite3
from contextlib import closing
from pathlib import Path

from tests.synapse import wait_for


def freeze(pid: int, sqlite: str = "") -> bool:
    """Stop a process, but not within a write of the SQLite file, for which everybody else would wait:
    then it goes on, and the answer is False. (A transaction of PostgreSQL is ended by the server:
    `idle_in_transaction_session_timeout`.)"""
    os.kill(pid, signal.SIGSTOP)
    # A thread that is within the kernel may still get a lock that it waits for.
    wait_for("its threads to stop", lambda: _is_stopped(pid))
    if not sqlite or may_write(sqlite):
        return True
    os.kill(pid, signal.SIGCONT)
    return False


def _is_stopped(pid: int) -> bool:
    try:
        stats = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    except OSError:  # a thread has just ended
        return False
    return all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)


def may_write(path: str) -> bool:
    """Return whether no process uses it, in the writers' queue (config.server.sqlite) or directly."""
    with open(f"{path}.lock") as queue, closing(sqlite3.connect(path, timeout=0)) as database:
        try:
            fcntl.flock(queue, fcntl.LOCK_EX | fcntl.LOCK_NB)
            database.execute("BEGIN IMMEDIATE")
        except (BlockingIOError, sqlite3.OperationalError):
            return False
        return True
