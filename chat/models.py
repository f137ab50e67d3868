import re
import uuid

import cuid2
from django.conf import settings
from django.contrib.auth.models import AnonymousUser
from django.db import models
from django.db.models import Q
from django.utils import timezone

from realm.models import User

# Ids that clients and other programs may choose themselves; ours are PREFIX_ and 24 of [a-z0-9].
CHOSEN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")


def new_thread_id() -> str:
    return f"thr_{cuid2.create_id()}"


class ThreadQuerySet(models.QuerySet["Thread"]):
    def open_to(self, user: User | AnonymousUser | None) -> "ThreadQuerySet":
        """Threads that `user` may read and write: their own, and nobody's where that is allowed."""
        mine = Q(owner_id=user.pk) if user is not None and user.pk else Q(pk__in=[])
        return self.filter(mine | Q(owner=None) if settings.CHAT_ALLOW_ANONYMOUS else mine)


class Thread(models.Model):
    id = models.CharField(primary_key=True, max_length=64, default=new_thread_id, editable=False)
    owner = models.ForeignKey(User, models.CASCADE, null=True, blank=True, related_name="threads")
    # How many questions were asked; the next one takes this number as its turn.
    turns = models.PositiveIntegerField(default=0)
    # The rolling summary tells everything up to and including the position `summary_reach`.
    summary = models.TextField(blank=True)
    summary_reach = models.IntegerField(default=-1)
    # Set while messages have left the window that no summary tells yet; a worker that takes the
    # work moves it ahead, so it is the worker's lease as well.
    summary_due_at = models.DateTimeField(null=True, blank=True)
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    updated_at = models.DateTimeField(default=timezone.now, editable=False)

    objects = ThreadQuerySet.as_manager()

    class Meta:
        indexes = [
            # The admin's list, newest first.
            models.Index(fields=["-created_at", "id"], name="thread_newest"),
            # agents.memory.due(): the sweep that makes summaries.
            models.Index(
                fields=["summary_due_at"],
                name="thread_summary_due",
                condition=Q(summary_due_at__isnull=False),
            ),
        ]

    def __str__(self) -> str:
        return self.id


class Message(models.Model):
    class Role(models.TextChoices):
        USER = "user"
        ASSISTANT = "assistant"
        SYSTEM = "system"

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    thread = models.ForeignKey(Thread, models.CASCADE, related_name="messages", db_index=False)
    # What is asked in turn n stands at 2n, its answer at 2n + 1. So an answer follows its own
    # question however late it comes, and a question cannot have two.
    position = models.PositiveIntegerField()
    role = models.CharField(max_length=9, choices=Role.choices)
    content = models.TextField()
    correlation_id = models.CharField(max_length=200)
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    class Meta:
        ordering = ["thread", "position"]
        indexes = [
            # The admin's list, newest first, whole and by role.
            models.Index(fields=["-created_at", "id"], name="message_newest"),
            models.Index(fields=["role", "-created_at"], name="message_by_role"),
        ]
        permissions = [("read_messages", "Can read what others said and were told")]
        constraints = [
            # Also the index that the history is read by.
            models.UniqueConstraint(
                fields=["thread", "position"], name="message_position_is_unique"
            ),
        ]

    def __str__(self) -> str:
        # Not what was said: titles, log lines and choices of a form show it to everybody.
        return f"{self.get_role_display()} {self.position} of {self.thread_id}"
