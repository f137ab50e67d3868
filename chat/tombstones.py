"""Tombstones of deleted threads, written by each deletion: API, console, retention or cascade."""

from typing import Any

from django.db.models.signals import post_delete

from chat.models import DeletedThread, Thread
from lib import revocations


def connect() -> None:
    post_delete.connect(write_tombstone, Thread, dispatch_uid="chat.tombstones")


def write_tombstone(sender: Any, instance: Thread, using: str, **_: Any) -> None:
    # In the transaction of the deletion, which holds the lock of the thread's row: no thread of this id
    # can be created in between. Of two concurrent deletions one writes it.
    tombstone = DeletedThread(id=instance.pk, owner_id=instance.owner_id, room_id=instance.room_id)
    DeletedThread.objects.using(using).bulk_create([tombstone], ignore_conflicts=True)
    revocations.publish_on_commit(thread=instance.pk)
