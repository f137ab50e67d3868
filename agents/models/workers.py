"""Worker processes and their heartbeats."""

from datetime import timedelta

from django.db import models
from django.db.models.functions import Now

# A worker has a heartbeat every few seconds; one that is silent for so long is gone or stuck.
WORKER_TIMEOUT = timedelta(seconds=15)
WORKER_RETENTION = timedelta(hours=1)


class WorkerQuerySet(models.QuerySet["Worker"]):
    def alive(self) -> "WorkerQuerySet":
        """Filter workers with a fresh heartbeat, by the database's clock."""
        return self.filter(beat_at__gte=Now() - WORKER_TIMEOUT)

    def reading(self) -> "WorkerQuerySet":
        """Filter the live workers that have read the stream just now."""
        return self.alive().filter(is_draining=False, read_at__gte=Now() - WORKER_TIMEOUT)

    def gone(self) -> "WorkerQuerySet":
        """Filter workers that were killed so long ago that their rows can go."""
        return self.filter(beat_at__lt=Now() - WORKER_RETENTION)


class Worker(models.Model):
    """A worker process, which updates its row every few seconds and deletes it when it stops. The
    row of a killed one stays for an hour."""

    worker = models.CharField(
        max_length=200, unique=True, help_text="Its name in runs and attempts."
    )
    name = models.CharField(max_length=200, help_text="Its name in the consumer group.")
    host = models.CharField(max_length=255)
    pid = models.PositiveIntegerField()
    version = models.CharField(max_length=100)
    concurrency = models.PositiveIntegerField()
    started_at = models.DateTimeField()
    beat_at = models.DateTimeField()
    read_at = models.DateTimeField(null=True, blank=True, help_text="When it last read the stream.")
    runs_in_hand = models.PositiveIntegerField(default=0)
    last_finished_at = models.DateTimeField(
        null=True,
        blank=True,
        help_text="The time at which it last finished a run, with any result.",
    )
    is_draining = models.BooleanField(
        default=False, help_text="It claims no more runs, and stops when its own have ended."
    )

    objects = WorkerQuerySet.as_manager()

    class Meta:
        ordering = ["host", "started_at"]

    def __str__(self) -> str:
        return self.name
