"""What the bot runner knows: its account, its rooms, what was said in them to the bot, and what is
still to be said."""

from datetime import timedelta

from django.db import models
from django.db.models import Q
from django.db.models.functions import Now
from django.utils import timezone

from agents.models import Run
from chat.models import Thread
from realm.models import BotRegistration


class SessionQuerySet(models.QuerySet["Session"]):
    def held_by(self, holder: str) -> "SessionQuerySet":
        return self.filter(holder=holder, lease_expires_at__gt=Now())

    def free_for(self, holder: str) -> "SessionQuerySet":
        return self.filter(
            Q(holder=holder) | Q(lease_expires_at=None) | Q(lease_expires_at__lte=Now())
        )


class Session(models.Model):
    """An account of the bot on a homeserver. One process at a time works with it: two that sync one
    device lose each other's keys."""

    homeserver = models.CharField(max_length=500)
    username = models.CharField(max_length=255)
    user_id = models.CharField("Matrix user id", max_length=255, blank=True)
    # Kept over logins: transaction ids and keys belong to a device.
    device_id = models.CharField(max_length=255, blank=True)
    access_token = models.TextField(blank=True)
    since = models.TextField(blank=True, help_text="Everything before this has been written down.")
    holder = models.CharField(max_length=255, blank=True, help_text="The process that works.")
    lease_expires_at = models.DateTimeField(null=True, blank=True)
    connected_since = models.DateTimeField(null=True, blank=True)
    last_sync_at = models.DateTimeField(null=True, blank=True)
    last_error = models.TextField(blank=True)
    last_error_at = models.DateTimeField(null=True, blank=True)

    objects = SessionQuerySet.as_manager()

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["homeserver", "username"], name="session_is_unique"),
        ]

    def __str__(self) -> str:
        return self.user_id or f"{self.username} at {self.homeserver}"

    def acquire(self, holder: str, duration: timedelta) -> bool:
        """Take or keep the lease, by the database's clock. False while another process has it."""
        mine = Session.objects.free_for(holder).filter(pk=self.pk)
        return bool(mine.update(holder=holder, lease_expires_at=Now() + duration))

    def release(self, holder: str) -> None:
        Session.objects.filter(pk=self.pk, holder=holder).update(
            lease_expires_at=None, connected_since=None
        )

    def note_error(self, error: str) -> None:
        Session.objects.filter(pk=self.pk).update(
            last_error=error, last_error_at=Now(), connected_since=None
        )

    def set_login(self, user_id: str, device_id: str, access_token: str) -> None:
        self.user_id, self.device_id, self.access_token = user_id, device_id, access_token
        self.save(update_fields=["user_id", "device_id", "access_token"])


class Room(models.Model):
    class Membership(models.TextChoices):
        INVITED = "invited"  # and to be joined
        JOINED = "joined"
        REFUSED = "refused"  # whoever invited may not, or the server lets nobody in
        LEFT = "left"  # left, kicked or banned

    session = models.ForeignKey(Session, models.CASCADE, related_name="rooms", db_index=False)
    room_id = models.CharField(max_length=255)
    membership = models.CharField(max_length=7, choices=Membership.choices)
    inviter = models.CharField(max_length=255, blank=True)
    is_encrypted = models.BooleanField(default=False)
    join_attempts = models.PositiveSmallIntegerField(default=0)
    join_due_at = models.DateTimeField(null=True, blank=True)
    error = models.TextField(blank=True)
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    updated_at = models.DateTimeField(default=timezone.now, editable=False)

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["session", "room_id"], name="room_is_unique"),
        ]

    def __str__(self) -> str:
        return self.room_id


class Conversation(models.Model):
    """The thread that a room, or a thread within it, is to the agent."""

    room = models.ForeignKey(Room, models.CASCADE, related_name="conversations", db_index=False)
    root = models.CharField(
        max_length=255,
        blank=True,
        help_text="The event that began the Matrix thread, if it is one.",
    )
    thread = models.OneToOneField(Thread, models.CASCADE, related_name="conversation")

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["room", "root"], name="conversation_is_unique"),
        ]

    def __str__(self) -> str:
        return f"{self.room_id} {self.root}"


class RoomEvent(models.Model):
    """Something that was said to the bot: kept for good, so that nothing is handled twice."""

    class Kind(models.TextChoices):
        QUESTION = "question"  # it matched a bot command when it came
        EDIT = "edit"  # of a question
        REDACTION = "redaction"  # of a question
        SEALED = "sealed"  # encrypted with a key that has not come yet

    class State(models.TextChoices):
        PENDING = "pending"
        HANDLED = "handled"
        IGNORED = "ignored"  # the note says why

    room = models.ForeignKey(Room, models.CASCADE, related_name="events")
    event_id = models.CharField(max_length=255, unique=True)
    kind = models.CharField(max_length=9, choices=Kind.choices)
    state = models.CharField(max_length=7, choices=State.choices, default=State.PENDING)
    sender = models.CharField(max_length=255)
    said_at = models.DateTimeField(help_text="By the clock of the sender's homeserver.")
    # As the homeserver gave it, decrypted.
    source = models.JSONField()
    note = models.TextField(blank=True)
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    class Meta:
        ordering = ["id"]
        indexes = [
            # timeline.pending(), timeline.sealed()
            models.Index(fields=["id"], name="roomevent_pending", condition=Q(state="pending")),
        ]

    def __str__(self) -> str:
        return self.event_id


class ReplyQuerySet(models.QuerySet["Reply"]):
    def waiting(self) -> "ReplyQuerySet":
        return self.filter(status=Reply.Status.WAITING)

    def ready(self) -> "ReplyQuerySet":
        return self.filter(status=Reply.Status.READY)


class Reply(models.Model):
    """What the bot owes a room for a question. A run has one; it is sent under a transaction id made
    of `key`, so the homeserver takes it once."""

    class Status(models.TextChoices):
        WAITING = "waiting"  # for the outcome of its run
        READY = "ready"
        SENT = "sent"
        DROPPED = "dropped"  # the question was taken back, or the room lets the bot say nothing

    question = models.ForeignKey(RoomEvent, models.CASCADE, related_name="replies")
    room = models.ForeignKey(Room, models.CASCADE, related_name="replies", db_index=False)
    run = models.OneToOneField(Run, models.CASCADE, null=True, blank=True, related_name="reply")
    registration = models.ForeignKey(
        BotRegistration, models.SET_NULL, null=True, blank=True, related_name="+"
    )
    key = models.CharField(max_length=255, unique=True)
    status = models.CharField(max_length=7, choices=Status.choices, default=Status.WAITING)
    # The contents to send, frozen: what is repeated is the same. How many were, and as what events.
    parts = models.JSONField(default=list, blank=True)
    event_ids = models.JSONField(default=list, blank=True)
    device_id = models.CharField(
        max_length=255, blank=True, help_text="That tried to send it first."
    )
    attempts = models.PositiveIntegerField(default=0)
    due_at = models.DateTimeField(null=True, blank=True, help_text="Not to be tried before.")
    error = models.TextField(blank=True)
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    ready_at = models.DateTimeField(null=True, blank=True)
    sent_at = models.DateTimeField(null=True, blank=True)

    objects = ReplyQuerySet.as_manager()

    class Meta:
        verbose_name_plural = "replies"
        indexes = [
            # replies.next_of(): the queue of a room.
            models.Index(
                fields=["room", "ready_at", "id"],
                name="reply_ready",
                condition=Q(status="ready"),
            ),
            # replies.compose(), replies.typing_rooms()
            models.Index(fields=["run"], name="reply_waiting", condition=Q(status="waiting")),
        ]

    def __str__(self) -> str:
        return self.key
