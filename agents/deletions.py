"""Tombstones of runs, written by whatever deletes one."""

from typing import Any

from django.db.models.signals import post_delete

from agents.models import DeletedRun, Run


def connect() -> None:
    post_delete.connect(bury, Run, dispatch_uid="agents.deletions")


def bury(sender: Any, instance: Run, using: str, **_: Any) -> None:
    # As chat.deletions does of threads.
    DeletedRun.objects.using(using).bulk_create([DeletedRun(id=instance.pk)], ignore_conflicts=True)
