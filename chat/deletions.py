"""Tombstones of threads, written with each deletion: by the API, the console, retention, a cascade."""

from typing import Any

from django.db.models.signals import post_delete

from chat.models import DeletedThread, Thread
from lib import revocations


def connect() -> None:
    post_delete.connect(bury, Thread, dispatch_uid="chat.deletions")


def bury(sender: Any, instance: Thread, using: str, **_: Any) -> None:
    # After the row was deleted, whose lock is taken first by all who delete or begin a thread; and in
    # its transaction, so that no thread can begin in between. Two deletions at once write it once.
    tombstone = DeletedThread(id=instance.pk, owner_id=instance.owner_id, room_id=instance.room_id)
    DeletedThread.objects.using(using).bulk_create([tombstone], ignore_conflicts=True)
    revocations.publish_on_commit(thread=instance.pk)
