"""The thread pools of a web process, and which of them serves a request."""

import asyncio
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

from django.conf import settings

from config.server.callers import HeldBytes
from config.server.pool import Pool
from config.server.streaming import end_streams_on_stop
from lib import process

THREADS = 8
# For clients with no request in progress.
SPARE_THREADS = 2
STREAM_THREADS = 3
LOGIN_THREADS = 2
MAX_QUEUED_LOGINS = 100
MAX_QUEUED_PROBES = 50
PROBES = {
    "/healthz": "healthz",
    "/healthz/deep": "probes",
    "/readyz": "probes",
    "/metrics": "probes",
}
# Paths where a POST hashes a password, which takes a processor for a quarter of a second.
HASHING = re.compile(
    r"/login|/admin/(login|password_change|realm/user/add|realm/user/[^/]+/password)/?"
)


@dataclass(frozen=True)
class Threads:
    web: Pool
    logins: Pool
    healthz: Pool
    probes: Pool
    bodies: HeldBytes
    answers: HeldBytes

    def for_request(self, scope: dict[str, Any]) -> Pool:
        path = scope["path"]
        if name := PROBES.get(path):
            return cast("Pool", getattr(self, name))
        if scope["method"] == "POST" and HASHING.fullmatch(path):
            return self.logins
        return self.web

    def is_bounded(self, pool: Pool) -> bool:
        """Return False for probes, which are answered however much else waits."""
        return pool is self.web or pool is self.logins


@process.once
def threads() -> Threads:
    """Make the pools in the process that serves, also the one for the database work of streams."""
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(STREAM_THREADS, thread_name_prefix="streams"))
    end_streams_on_stop(loop)
    return Threads(
        web=Pool("web", THREADS, spare=SPARE_THREADS, waiting=settings.WEB_MAX_WAITING),
        logins=Pool("logins", LOGIN_THREADS, waiting=MAX_QUEUED_LOGINS),
        healthz=Pool("healthz", 1, waiting=MAX_QUEUED_PROBES),
        probes=Pool("probes", 1, waiting=MAX_QUEUED_PROBES),
        bodies=HeldBytes(),
        answers=HeldBytes(),
    )
