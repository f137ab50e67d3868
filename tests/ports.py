"""Ports for servers of tests that are to listen on a certain one, or on the same one again."""

import contextlib
import itertools
import os
import random
import socket

# Below those from which Linux takes the ports of outgoing connections: a client that looks for a server
# that is away may be given its very port, and connect to itself. And not among those of which
# scripts/stack.py takes what it needs for itself.
PORTS = range(10_000, 20_000)


def _shares() -> list[int]:
    """Those of this process alone: several test at once, and a port is in use only later."""
    count = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    mine = list(PORTS[number % count :: count])
    random.SystemRandom().shuffle(mine)
    return mine


_candidates = itertools.cycle(_shares())


def free_port() -> int:
    """Return a port without a listener that this process has not received recently."""
    for port in itertools.islice(_candidates, len(PORTS)):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise RuntimeError("no port is free")
