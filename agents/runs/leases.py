"""Leases: what this process has claimed, and the heartbeat that keeps it.

One thread renews the leases of all runs of the process with one statement. A run that is no longer
held (somebody else claimed it, or it was cancelled) is marked, and its thread gives up at the next
chunk of the answer.
"""

import logging
import os
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta

from django.conf import settings
from django.db import connection, transaction
from django.db.models.functions import Now
from django.utils import timezone

from agents.lifecycle import states
from agents.models import Run
from lib import db, process

logger = logging.getLogger(__name__)

_BIRTH = secrets.token_hex(3)


def worker_name() -> str:
    """Who claims: not the consumer's name, which an operator may give to two processes. Containers
    may share a host's name and each have a process 1."""
    return f"{socket.gethostname()}:{os.getpid()}:{_BIRTH}"


def rules() -> states.Rules:
    return states.Rules(
        max_attempts=settings.AGENT_MAX_ATTEMPTS,
        lease=timedelta(seconds=settings.AGENT_LEASE_SECONDS),
        time=timedelta(seconds=settings.AGENT_DEADLINE_SECONDS),
    )


class Lease:
    def __init__(self, run: Run) -> None:
        self.run_id = run.pk
        self.attempt = run.attempt
        self._lost = threading.Event()
        self._lock = threading.Lock()
        self._cut: Callable[[], None] | None = None

    def lost(self) -> bool:
        return self._lost.is_set()

    def lose(self) -> None:
        with self._lock:
            self._lost.set()
            if self._cut:
                self._cut()

    @contextmanager
    def cutting(self, cut: Callable[[], None]) -> Iterator[None]:
        """Have `cut` called when the lease is lost meanwhile: the run's thread may be waiting for
        somebody who has nothing to say."""
        with self._lock:
            self._cut = cut
            if self.lost():
                cut()
        try:
            yield
        finally:
            with self._lock:
                self._cut = None


class Heartbeat:
    def __init__(self) -> None:
        self._leases: set[Lease] = set()
        self.last_put_down: datetime | None = None
        self._lock = threading.Lock()
        self._wanted = threading.Event()
        self._thread: threading.Thread | None = None

    @contextmanager
    def hold(self, run: Run) -> Iterator[Lease]:
        """Keep the lease of a run just claimed for as long as the block runs."""
        lease = Lease(run)
        with self._lock:
            self._leases.add(lease)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._beat, name="leases", daemon=True)
                self._thread.start()
        self._wanted.set()
        try:
            yield lease
        finally:
            with self._lock:
                self._leases.discard(lease)
                self.last_put_down = timezone.now()

    def in_hand(self) -> int:
        """How many runs this process holds."""
        return len(self._leases)

    def lose_all(self) -> None:
        """Have every thread that holds a run give it up at its next chunk."""
        with self._lock:
            leases = set(self._leases)
        for lease in leases:
            lease.lose()

    def _beat(self) -> None:
        pause = threading.Event()
        while True:
            self._wanted.wait()
            pause.wait(settings.AGENT_LEASE_SECONDS / 4)
            try:
                self.renew()
            except Exception:
                # Whatever it is, the next beat may come through. A lease that lapses meanwhile costs
                # a repeated call, never a second outcome.
                logger.exception("Leases were not renewed")
                connection.close()

    def renew(self) -> None:
        with self._lock:
            leases = set(self._leases)
            if not leases:
                self._wanted.clear()
                return
        held = Run.objects.held_by(worker_name()).filter(pk__in={lease.run_id for lease in leases})
        with transaction.atomic():
            in_order = db.in_order(held, "thread", "position")
            renewed = in_order.update(lease_expires_at=Now() + rules().lease)
        if renewed < len(leases):
            still = set(held.values_list("pk", "attempt"))
            for lease in leases:
                if (lease.run_id, lease.attempt) not in still:
                    lease.lose()
        connection.close_if_unusable_or_obsolete()


@process.once
def heartbeat() -> Heartbeat:
    return Heartbeat()
