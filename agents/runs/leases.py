"""Leases on the runs of this process, and the heartbeat that renews them.

One thread renews the leases of all runs of the process with one statement. The lease of a run that was
cancelled or claimed by another worker is revoked, and its thread stops at the next chunk of the answer.
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
    """Return the name of this process in claims. The consumer's name will not do, as an operator may
    give it to two processes; nor host and pid alone, as containers may share a host's name."""
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
        self._revoked = threading.Event()
        self._lock = threading.Lock()
        self._cancel: Callable[[], None] | None = None

    def is_revoked(self) -> bool:
        return self._revoked.is_set()

    def revoke(self) -> None:
        with self._lock:
            self._revoked.set()
            if self._cancel:
                self._cancel()

    @contextmanager
    def on_cancel(self, cancel: Callable[[], None]) -> Iterator[None]:
        """Call `cancel` if the lease is revoked during the block: the run's thread may be waiting for a
        model that sends nothing."""
        with self._lock:
            self._cancel = cancel
            if self.is_revoked():
                cancel()
        try:
            yield
        finally:
            with self._lock:
                self._cancel = None


class Heartbeat:
    def __init__(self) -> None:
        self._leases: set[Lease] = set()
        self.last_released_at: datetime | None = None
        self._lock = threading.Lock()
        self._has_leases = threading.Event()
        self._thread: threading.Thread | None = None

    @contextmanager
    def hold(self, run: Run) -> Iterator[Lease]:
        """Keep the lease of a run that was just claimed, for the duration of the block."""
        lease = Lease(run)
        with self._lock:
            self._leases.add(lease)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._beat, name="leases", daemon=True)
                self._thread.start()
        self._has_leases.set()
        try:
            yield lease
        finally:
            with self._lock:
                self._leases.discard(lease)
                self.last_released_at = timezone.now()

    def in_hand(self) -> int:
        """Return the number of runs that this process holds."""
        return len(self._leases)

    def revoke_all(self) -> None:
        """Stop every thread that holds a run at its next chunk."""
        with self._lock:
            leases = set(self._leases)
        for lease in leases:
            lease.revoke()

    def _beat(self) -> None:
        pause = threading.Event()
        while True:
            self._has_leases.wait()
            pause.wait(settings.AGENT_LEASE_SECONDS / 4)
            try:
                self.renew()
            except Exception:
                # Of any kind: the next beat may succeed. A lease that lapses meanwhile costs a
                # repeated call, never a second outcome.
                logger.exception("Leases were not renewed")
                connection.close()

    def renew(self) -> None:
        with self._lock:
            leases = set(self._leases)
            if not leases:
                self._has_leases.clear()
                return
        held = Run.objects.held_by(worker_name()).filter(pk__in={lease.run_id for lease in leases})
        with transaction.atomic():
            in_order = db.in_order(held, "thread", "position")
            renewed = in_order.update(lease_expires_at=Now() + rules().lease)
        if renewed < len(leases):
            still = set(held.values_list("pk", "attempt"))
            for lease in leases:
                if (lease.run_id, lease.attempt) not in still:
                    lease.revoke()
        connection.close_if_unusable_or_obsolete()


@process.once
def heartbeat() -> Heartbeat:
    return Heartbeat()
