"""Limits of open files and connections of this process."""

import errno
import os
import resource
from contextlib import suppress

# More than any process here needs. Some libraries close all numbers below the limit before they start a
# process, which takes long with a million.
MAX_FILES = 65_536
# For files other than clients' connections: databases, Redis, logs.
RESERVED = 256


def raise_limit() -> int:
    """Raise the soft limit of open files up to the hard one; return the new limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    target = MAX_FILES if hard == unlimited else min(hard, MAX_FILES)
    if soft == unlimited or soft >= target:
        return limit()
    # In a sandbox that forbids it, the process keeps its limit.
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
    return limit()


def limit() -> int:
    """Return the number of files that this process may have open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_FILES if soft == resource.RLIM_INFINITY else soft


def connections() -> int:
    """Return the number of clients' connections that the limit allows."""
    files = limit()
    return max(files - RESERVED, files // 2)


def exhausted() -> bool:
    """Return True if no file can be opened, in this process or on the whole machine."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        return error.errno in (errno.EMFILE, errno.ENFILE)
    return False
