"""What the bot runner knows: its account, its rooms, what was said in them to the bot, and what is
still to be said."""

import secrets
from collections.abc import Iterable
from datetime import timedelta

from django.conf import settings
from django.db import models
from django.db.models import Exists, OuterRef, Q
from django.db.models.functions import Now
from django.utils import timezone

from agents.models import Run
from botrunner import verdicts
from botrunner.verdicts import Verdict
from chat.models import Thread
from lib.secrets import EncryptedTextField
from realm.models import BotCommand, BotRegistration

MAX_TYPE_LENGTH = 255
# No one counts as a member of a room once the bot has not synced for this long: it would not see a
# leave.
MEMBERS_PATIENCE = timedelta(minutes=5)


class LeaseLost(Exception):
    """Another process holds the lease on the session: the state of this one is stale."""


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
    access_token = EncryptedTextField(
        blank=True, editable=False, bound_to=("homeserver", "username")
    )
    store_key = EncryptedTextField(
        blank=True,
        editable=False,
        bound_to=("homeserver", "username"),
        help_text="What the files of BOT_RUNNER_STORE are encrypted with.",
    )
    key_writes = models.PositiveBigIntegerField(
        default=0, help_text="Less was written to a key store that comes from a backup."
    )
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

    def try_now(self) -> bool:
        """Let replies and joins that wait for their next try not wait. False when there were none."""
        now = timezone.now()
        replies = Reply.objects.ready().filter(room__session=self, due_at__gt=now)
        joins = self.rooms.filter(membership=Room.Membership.INVITED, join_due_at__gt=now)
        return bool(replies.update(due_at=None) + joins.update(join_due_at=now))

    def note_error(self, error: str) -> None:
        Session.objects.filter(pk=self.pk).update(
            last_error=error, last_error_at=Now(), connected_since=None
        )

    def distrust_keys(self, writes: int) -> None:
        """Let a store that this was written to count as outdated."""
        Session.objects.filter(pk=self.pk).update(key_writes=writes + 1)

    def own_store_key(self) -> str:
        """What its key store is encrypted with, made at first use. Raises `lib.secrets.Unreadable`."""
        if not self.store_key:
            self.store_key = secrets.token_urlsafe(32)
            self.save(update_fields=["store_key"])
        return self.store_key

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
    members_known = models.BooleanField(
        default=False,
        db_default=False,
        help_text="While they are not, its threads are open to no one over HTTP.",
    )
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


class RoomMemberQuerySet(models.QuerySet["RoomMember"]):
    def current(self) -> "RoomMemberQuerySet":
        """Those who are members now: the bot is in the room, and has synced of late."""
        return self.filter(
            room__members_known=True,
            room__membership=Room.Membership.JOINED,
            room__session__last_sync_at__gte=Now() - MEMBERS_PATIENCE,
        )


class RoomMember(models.Model):
    """A member of a room, by the bot's last sync. The row goes when they leave."""

    room = models.ForeignKey(Room, models.CASCADE, related_name="members")
    user_id = models.CharField("Matrix user id", max_length=255)
    # The membership event: another one that the bot has not seen come may hide a leave.
    event_id = models.CharField(max_length=255)
    joined_at = models.DateTimeField(help_text="When the bot was shown the join.")

    objects = RoomMemberQuerySet.as_manager()

    class Meta:
        constraints = [
            # Also the index by which a user's rooms are found.
            models.UniqueConstraint(fields=["user_id", "room"], name="room_member_is_unique"),
        ]

    def __str__(self) -> str:
        return f"{self.user_id} in {self.room_id}"


def is_member(user_id: str, room: str, at: str | None) -> Exists:
    """For chat.membership."""
    rows = RoomMember.objects.current().filter(user_id=user_id, room__room_id=OuterRef(room))
    return Exists(rows.filter(joined_at__lte=OuterRef(at)) if at else rows)


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


class RoomEventQuerySet(models.QuerySet["RoomEvent"]):
    def questions_among(self, event_ids: Iterable[str]) -> set[str]:
        """Those of the events that can be edited or taken back."""
        found = self.filter(event_id__in=list(event_ids), kind__in=RoomEvent.QUESTIONS)
        return set(found.values_list("event_id", flat=True))

    def prunable(self, state: str) -> "RoomEventQuerySet":
        """Those of a state that may be forgotten: nothing that is unfinished, and nothing that would be
        handled again if the homeserver told of it once more. That goes by the time at which it was
        said, which the sender's homeserver tells and may have set in the future; hence both times."""
        if state not in RoomEvent.ENDED:
            return self.none()
        days = settings.BOT_RUNNER_EVENT_RETENTION_DAYS
        if state == RoomEvent.State.HANDLED:
            days = settings.BOT_RUNNER_REPLY_RETENTION_DAYS
        limit = timezone.now() - timedelta(days=days)
        open_replies = Reply.objects.unfinished().filter(question=OuterRef("pk"))
        return self.filter(
            ~Exists(open_replies),
            state=state,
            created_at__lt=limit,
            said_at__lt=limit,
        )


class RoomEvent(models.Model):
    """Something that was said in a room, so that nothing is handled twice, and that it can be told why
    it fired nothing. Whatever was not for the bot is kept without its words."""

    class Kind(models.TextChoices):
        QUESTION = "question"  # it matched a bot command when it came
        EDIT = "edit"  # of a question, if it is not ignored
        REDACTION = "redaction"  # of a question, if it is not ignored
        CANCEL = "cancel"  # an answer is not wanted any more
        FORGET = "forget"  # what was asked here is to be deleted
        SEALED = "sealed"  # encrypted with a key that has not come yet
        REMARK = "remark"  # anything else

    class State(models.TextChoices):
        PENDING = "pending"
        HANDLED = "handled"
        IGNORED = "ignored"  # the note says why
        FAILED = "failed"  # it could not be handled, see the log

    QUESTIONS = (Kind.QUESTION, Kind.SEALED)
    ORDERS = (Kind.CANCEL, Kind.FORGET)
    ENDED = (State.IGNORED, State.FAILED, State.HANDLED)

    room = models.ForeignKey(Room, models.CASCADE, related_name="events")
    event_id = models.CharField(max_length=255, unique=True)
    kind = models.CharField(max_length=9, choices=Kind.choices)
    state = models.CharField(max_length=7, choices=State.choices, default=State.PENDING)
    sender = models.CharField(max_length=255)
    # Of the event and of its content, as filters name them.
    type = models.CharField(max_length=MAX_TYPE_LENGTH, blank=True)
    content_type = models.CharField(max_length=MAX_TYPE_LENGTH, blank=True)
    said_at = models.DateTimeField(help_text="By the clock of the sender's homeserver.")
    # As the homeserver gave it, decrypted. Gone once the event is ignored.
    source = models.JSONField(null=True, blank=True)
    note = models.TextField(blank=True)
    # Read it through `command_verdicts`.
    verdicts = models.JSONField(default=list, blank=True)
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    objects = RoomEventQuerySet.as_manager()

    class Meta:
        ordering = ["id"]
        indexes = [
            # acting.pending(), acting.sealed()
            models.Index(fields=["id"], name="roomevent_pending", condition=Q(state="pending")),
            # The filters of the admin's list.
            models.Index(fields=["state", "-id"], name="roomevent_newest_by_state"),
            models.Index(fields=["kind", "-id"], name="roomevent_by_kind"),
            # prunable()
            models.Index(fields=["state", "created_at"], name="roomevent_by_state"),
            # Its search, and what somebody said last.
            models.Index(fields=["sender", "-id"], name="roomevent_newest_of_sender"),
        ]
        constraints = [
            models.CheckConstraint(
                condition=Q(state="ignored", source__isnull=True)
                | (~Q(state="ignored") & Q(source__isnull=False)),
                name="roomevent_ignored_is_kept_without_its_words",
            ),
        ]

    def __str__(self) -> str:
        return self.event_id

    @property
    def command_verdicts(self) -> list[Verdict]:
        """What each command that was looked at said to it; not all of very many."""
        return verdicts.read(self.verdicts)


class ReplyQuerySet(models.QuerySet["Reply"]):
    def waiting(self) -> "ReplyQuerySet":
        return self.filter(status=Reply.Status.WAITING)

    def ready(self) -> "ReplyQuerySet":
        return self.filter(status=Reply.Status.READY)

    def unfinished(self) -> "ReplyQuerySet":
        return self.filter(status__in=[Reply.Status.WAITING, Reply.Status.READY])


class Reply(models.Model):
    """What the bot owes a room for a question. A run has one, and another for each time that it is
    asked for again after its outcome was told; each is sent under a transaction id made of `key`, so
    the homeserver takes it once."""

    class Status(models.TextChoices):
        WAITING = "waiting"  # for the outcome of its run
        READY = "ready"
        SENT = "sent"
        # The question was taken back or is answered with a later one, or the room lets the bot say
        # nothing.
        DROPPED = "dropped"

    question = models.ForeignKey(RoomEvent, models.CASCADE, related_name="replies")
    room = models.ForeignKey(Room, models.CASCADE, related_name="replies", db_index=False)
    # None: the question was refused, or the run was deleted, which the room is told all the same.
    run = models.ForeignKey(
        Run, models.SET_NULL, null=True, blank=True, related_name="replies", db_index=False
    )
    cycle = models.PositiveSmallIntegerField(
        default=0, help_text="How often the run had been retried when it came to what this tells."
    )
    # Which were fired; gone when they are.
    registration = models.ForeignKey(
        BotRegistration,
        models.SET_NULL,
        null=True,
        blank=True,
        related_name="replies",
        db_index=False,
    )
    bot_command = models.ForeignKey(
        BotCommand, models.SET_NULL, null=True, blank=True, related_name="replies", db_index=False
    )
    key = models.CharField(max_length=255, unique=True)
    status = models.CharField(max_length=7, choices=Status.choices, default=Status.WAITING)
    # The contents to send, frozen: what is repeated is the same. How many were, and as what events.
    parts = models.JSONField(default=list, blank=True)
    event_ids = models.JSONField(default=list, blank=True)
    # With BOT_STREAM_EDITS the first part may be in the room before the outcome is known.
    drafted_at = models.DateTimeField(
        null=True, blank=True, help_text="Since then a draft of it may be in the room."
    )
    draft_id = models.CharField(
        max_length=255, blank=True, help_text="The draft's event, once the homeserver has told."
    )
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
        permissions = [("resend_reply", "Can have replies sent again")]
        indexes = [
            # queue.next_of(): the queue of a room.
            models.Index(
                fields=["room", "ready_at", "id"],
                name="reply_ready",
                condition=Q(status="ready"),
            ),
            # queue.load_ended(), queue.typing_rooms()
            models.Index(fields=["run"], name="reply_waiting", condition=Q(status="waiting")),
            # The filter of the admin's list.
            models.Index(fields=["status", "-id"], name="reply_by_status"),
            # activity.with_activity(), and the admin's lists of what one of them fired, newest first
            models.Index(fields=["registration", "-created_at"], name="reply_by_registration"),
            models.Index(fields=["bot_command", "-created_at"], name="reply_by_command"),
            # Its search.
            models.Index(fields=["room"], name="reply_by_room"),
        ]
        constraints = [
            models.UniqueConstraint(fields=["run", "cycle"], name="reply_tells_an_outcome_once"),
            models.CheckConstraint(
                condition=Q(draft_id="") | Q(drafted_at__isnull=False),
                name="reply_draft_was_begun_before_it_was_sent",
            ),
        ]

    def __str__(self) -> str:
        return self.key

    def try_now(self) -> bool:
        """Let it not wait for its next try. False where it does not wait for one."""
        waits = Reply.objects.ready().filter(pk=self.pk, due_at__isnull=False)
        return bool(waits.update(due_at=None))

    def begin_draft(self, device_id: str) -> bool:
        """Note that a draft is about to be sent. False when the outcome is known meanwhile."""
        now = timezone.now()
        waiting = Reply.objects.waiting().filter(pk=self.pk)
        if not waiting.update(drafted_at=now, device_id=device_id):
            return False
        self.drafted_at, self.device_id = now, device_id
        return True

    def note_draft(self, event_id: str) -> None:
        self.draft_id = event_id
        Reply.objects.filter(pk=self.pk).update(draft_id=event_id)
