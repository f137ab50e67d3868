"""Tombstones of runs, written with each deletion."""

from typing import Any

from django.db.models.signals import post_delete

from agents.models import DeletedRun, Run


def connect() -> None:
    post_delete.connect(write_tombstone, Run, dispatch_uid="agents.deletions")


def write_tombstone(sender: Any, instance: Run, using: str, **_: Any) -> None:
    # As chat.tombstones does for threads.
    DeletedRun.objects.using(using).bulk_create([DeletedRun(id=instance.pk)], ignore_conflicts=True)
