"""How many files and connections this process may have open."""

import errno
import os
import resource
from contextlib import suppress

# More than any process here needs. What walks through all numbers below the limit, as some libraries
# do before they start another process, takes long where it is a million.
MOST = 65_536
# For all that is no connection of a client: databases, Redis, logs.
RESERVED = 256


def raise_limit() -> int:
    """Raise the soft limit of open files as far as the hard one permits; return what it is now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    wanted = MOST if hard == unlimited else min(hard, MOST)
    if soft == unlimited or soft >= wanted:
        return limit()
    # Where a sandbox forbids it, the process goes on with what it has.
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return limit()


def limit() -> int:
    """The number of files that this process may have open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST if soft == resource.RLIM_INFINITY else soft


def connections() -> int:
    """The number of clients' connections that the limit leaves room for."""
    most = limit()
    return max(most - RESERVED, most // 2)


def exhausted() -> bool:
    """True while no more can be opened, in this process or on the whole machine."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        return error.errno in (errno.EMFILE, errno.ENFILE)
    return False
