"""Record which workers are running, and what each of them is doing."""

import os
import socket
import threading
import time
from datetime import timedelta

from django.conf import settings
from django.db import transaction
from django.db.models.functions import Now
from django.utils import timezone

from agents.models import Worker
from agents.runs import leases

BEAT_SECONDS = 3.0


class WorkerHeartbeat:
    """The database row of this worker."""

    def __init__(self, name: str, concurrency: int) -> None:
        self.name = name
        self.concurrency = concurrency
        self.started_at = timezone.now()
        self._read_at: float | None = None
        self.is_draining = False
        self._lock = threading.Lock()
        self._has_left = False

    def note_read(self) -> None:
        """Note that the stream was read: the worker makes progress, and is not only alive."""
        self._read_at = time.monotonic()

    def beat(self) -> None:
        """Update the row, or create it if it is missing. Raises `DatabaseError`."""
        with self._lock:
            if not self._has_left:
                self._write()

    def _write(self) -> None:
        heartbeat = leases.heartbeat()
        columns = {
            # By the database's clock: that of this host may be wrong.
            "beat_at": Now(),
            "read_at": None if self._read_at is None else Now() - _since(self._read_at),
            "runs_in_hand": heartbeat.in_hand(),
            "last_finished_at": heartbeat.last_released_at,
            "is_draining": self.is_draining,
        }
        row = Worker.objects.filter(worker=leases.worker_name())
        with transaction.atomic():
            if not row.update(**columns):
                Worker.objects.create(
                    worker=leases.worker_name(),
                    name=self.name,
                    host=socket.gethostname()[:255],
                    pid=os.getpid(),
                    version=settings.RELEASE[:100],
                    concurrency=self.concurrency,
                    started_at=self.started_at,
                    **columns,
                )

    def drain(self) -> None:
        self.is_draining = True
        self.beat()

    def leave(self) -> None:
        with self._lock:
            self._has_left = True
        Worker.objects.filter(worker=leases.worker_name()).delete()


def delete_gone() -> None:
    """Delete the rows of workers that were killed."""
    if Worker.objects.gone().exists():
        Worker.objects.gone().delete()


def _since(moment: float) -> timedelta:
    return timedelta(seconds=time.monotonic() - moment)
