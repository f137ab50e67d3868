"""What a worker tells of itself, so that everybody can see who is there and who gets on."""

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


class Presence:
    """The row of this process."""

    def __init__(self, name: str, concurrency: int) -> None:
        self.name = name
        self.concurrency = concurrency
        self.started_at = timezone.now()
        self._read: float | None = None
        self.is_draining = False
        self._lock = threading.Lock()
        self._has_left = False

    def note_read(self) -> None:
        """The stream was read: the worker gets on, and not only its heart."""
        self._read = time.monotonic()

    def beat(self) -> None:
        """One UPDATE; the row is made by the first, and again should somebody have removed it.
        Raises what the database does."""
        with self._lock:
            if not self._has_left:
                self._write()

    def _write(self) -> None:
        heartbeat = leases.heartbeat()
        news = {
            # By the database's clock: that of this host may be wrong.
            "beat_at": Now(),
            "read_at": None if self._read is None else Now() - _since(self._read),
            "runs_in_hand": heartbeat.in_hand(),
            "last_finished_at": heartbeat.last_released_at,
            "is_draining": self.is_draining,
        }
        mine = Worker.objects.filter(worker=leases.worker_name())
        with transaction.atomic():
            if not mine.update(**news):
                Worker.objects.create(
                    worker=leases.worker_name(),
                    name=self.name,
                    host=socket.gethostname()[:255],
                    pid=os.getpid(),
                    version=settings.RELEASE[:100],
                    concurrency=self.concurrency,
                    started_at=self.started_at,
                    **news,
                )

    def drain(self) -> None:
        self.is_draining = True
        self.beat()

    def leave(self) -> None:
        with self._lock:
            self._has_left = True
        Worker.objects.filter(worker=leases.worker_name()).delete()


def forget_gone() -> None:
    """Drop the rows of workers that were killed."""
    if Worker.objects.gone().exists():
        Worker.objects.gone().delete()


def _since(moment: float) -> timedelta:
    return timedelta(seconds=time.monotonic() - moment)
