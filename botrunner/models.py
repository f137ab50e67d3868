"""Records of the bot runner: sessions, rooms and members, room events, and replies."""

import secrets
from collections.abc import Collection, Iterable
from datetime import timedelta

from django.conf import settings
from django.db import models
from django.db.models import Exists, OuterRef, Q, Value
from django.db.models.functions import Now
from django.utils import timezone

from agents.models import Run
from botrunner import verdicts
from botrunner.verdicts import Verdict
from chat.models import Message, Thread
from lib.secrets import EncryptedTextField
from realm.models import BotCommand, BotRegistration

MAX_TYPE_LENGTH = 255
# Of the bot's display names.
MAX_NAMES = 10
MAX_NAME_LENGTH = 255
# Memberships older than this do not count: without a sync the bot would miss a leave.
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
    """An account of the bot on a homeserver. One process at a time holds its lease: two processes that
    sync one device lose each other's keys."""

    homeserver = models.CharField(max_length=500)
    username = models.CharField(max_length=255)
    user_id = models.CharField("Matrix user id", max_length=255, blank=True)
    # Kept across logins: transaction ids and keys belong to a device.
    device_id = models.CharField(max_length=255, blank=True)
    access_token = EncryptedTextField(
        blank=True, editable=False, bound_to=("homeserver", "username")
    )
    store_key = EncryptedTextField(
        blank=True,
        editable=False,
        bound_to=("homeserver", "username"),
        help_text="Encrypts the files of BOT_RUNNER_STORE.",
    )
    key_writes = models.PositiveBigIntegerField(
        default=0, help_text="Writes to the key store. A store restored from a backup has fewer."
    )
    since = models.TextField(
        blank=True, help_text="Sync position: everything before it is recorded."
    )
    holder = models.CharField(
        max_length=255, blank=True, help_text="The process that holds the lease."
    )
    lease_expires_at = models.DateTimeField(null=True, blank=True)
    connected_since = models.DateTimeField(null=True, blank=True)
    last_sync_at = models.DateTimeField(null=True, blank=True)
    last_error = models.TextField(blank=True)
    last_error_at = models.DateTimeField(null=True, blank=True)
    names = models.JSONField(
        default=list,
        db_default=Value([], models.JSONField()),
        blank=True,
        help_text="Display names of the bot, the latest first. Messages may address it by them.",
    )

    objects = SessionQuerySet.as_manager()

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["homeserver", "username"], name="session_is_unique"),
        ]

    def __str__(self) -> str:
        return self.user_id or f"{self.username} at {self.homeserver}"

    def acquire(self, holder: str, duration: timedelta) -> bool:
        """Take or renew the lease, by the database's clock; return False while another process has
        it."""
        free = Session.objects.free_for(holder).filter(pk=self.pk)
        return bool(free.update(holder=holder, lease_expires_at=Now() + duration))

    def release(self, holder: str) -> None:
        Session.objects.filter(pk=self.pk, holder=holder).update(
            lease_expires_at=None, connected_since=None
        )

    def try_now(self) -> bool:
        """Make waiting replies and joins due now; return False if there were none."""
        now = timezone.now()
        replies = Reply.objects.ready().filter(room__session=self, due_at__gt=now)
        joins = self.rooms.filter(membership=Room.Membership.INVITED, join_due_at__gt=now)
        return bool(replies.update(due_at=None) + joins.update(join_due_at=now))

    def record_error(self, error: str) -> None:
        Session.objects.filter(pk=self.pk).update(
            last_error=error, last_error_at=Now(), connected_since=None
        )

    def remember_name(self, name: str) -> bool:
        """Put a display name first; return False if it was."""
        name = name.strip()[:MAX_NAME_LENGTH]
        if not name or self.names[:1] == [name]:
            return False
        self.names = [name, *(each for each in self.names if each != name)][:MAX_NAMES]
        Session.objects.filter(pk=self.pk).update(names=self.names)
        return True

    def mark_keys_outdated(self, writes: int) -> None:
        """Reject the key store with this number of writes from now on."""
        Session.objects.filter(pk=self.pk).update(key_writes=writes + 1)

    def get_or_create_store_key(self) -> str:
        """Return the key of the key store. Raises `lib.secrets.Unreadable`."""
        if not self.store_key:
            self.store_key = secrets.token_urlsafe(32)
            self.save(update_fields=["store_key"])
        return self.store_key

    def set_login(self, user_id: str, device_id: str, access_token: str) -> None:
        self.user_id, self.device_id, self.access_token = user_id, device_id, access_token
        self.save(update_fields=["user_id", "device_id", "access_token"])


class Room(models.Model):
    class Membership(models.TextChoices):
        INVITED = "invited"  # and waiting to be joined
        JOINED = "joined"
        REFUSED = "refused"  # the inviter is not allowed, or joining failed
        LEFT = "left"  # left, kicked or banned

    session = models.ForeignKey(Session, models.CASCADE, related_name="rooms", db_index=False)
    room_id = models.CharField(max_length=255)
    membership = models.CharField(max_length=7, choices=Membership.choices)
    inviter = models.CharField(max_length=255, blank=True)
    is_encrypted = models.BooleanField(default=False)
    members_known = models.BooleanField(
        default=False,
        db_default=False,
        help_text="Until they are known, the room's threads are closed over HTTP.",
    )
    join_attempts = models.PositiveSmallIntegerField(default=0)
    join_due_at = models.DateTimeField(null=True, blank=True)
    leave_due_at = models.DateTimeField(
        null=True,
        blank=True,
        help_text="A refused invitation is declined, or a room without others is left, from then on.",
    )
    error = models.TextField(blank=True)
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    updated_at = models.DateTimeField(default=timezone.now, editable=False)

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["session", "room_id"], name="room_is_unique"),
        ]
        indexes = [
            # leaving._due()
            models.Index(
                fields=["leave_due_at"],
                name="room_leave_due",
                condition=Q(leave_due_at__isnull=False),
            ),
        ]

    def __str__(self) -> str:
        return self.room_id


class RoomMemberQuerySet(models.QuerySet["RoomMember"]):
    def current(self) -> "RoomMemberQuerySet":
        """Filter to current members: the bot is in the room and has synced recently."""
        return self.filter(
            room__members_known=True,
            room__membership=Room.Membership.JOINED,
            room__session__last_sync_at__gte=Now() - MEMBERS_PATIENCE,
        )


class RoomMember(models.Model):
    """A member of a room, by the bot's last sync; deleted when the user leaves."""

    room = models.ForeignKey(Room, models.CASCADE, related_name="members")
    user_id = models.CharField("Matrix user id", max_length=255)
    # The membership event. If the current one has another id, the bot may have missed a leave.
    event_id = models.CharField(max_length=255)
    joined_at = models.DateTimeField(help_text="When the bot saw the join.")

    objects = RoomMemberQuerySet.as_manager()

    class Meta:
        constraints = [
            # Also the index for the rooms of a user.
            models.UniqueConstraint(fields=["user_id", "room"], name="room_member_is_unique"),
        ]

    def __str__(self) -> str:
        return f"{self.user_id} in {self.room_id}"


def is_member(user_id: str, room: str, at: str | None) -> Exists:
    """Return a condition for chat.membership: the user is a member of the room since `at`."""
    rows = RoomMember.objects.current().filter(user_id=user_id, room__room_id=OuterRef(room))
    return Exists(rows.filter(joined_at__lte=OuterRef(at)) if at else rows)


class Conversation(models.Model):
    """The thread of the agent that belongs to a room, or to a Matrix thread within it."""

    room = models.ForeignKey(Room, models.CASCADE, related_name="conversations", db_index=False)
    root = models.CharField(
        max_length=255,
        blank=True,
        help_text="The root event of the Matrix thread; empty for the room itself.",
    )
    thread = models.OneToOneField(Thread, models.CASCADE, related_name="conversation")

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["room", "root"], name="conversation_is_unique"),
        ]

    def __str__(self) -> str:
        return f"{self.room_id} {self.root}"


class QuotedEventQuerySet(models.QuerySet["QuotedEvent"]):
    def ids_among(self, event_ids: Iterable[str]) -> set[str]:
        """Return the ids of the events that are quoted."""
        return set(self.filter(event_id__in=list(event_ids)).values_list("event_id", flat=True))


class QuotedEvent(models.Model):
    """An event that a message quotes: once it is redacted, the quotation is removed."""

    message = models.ForeignKey(
        Message, models.CASCADE, related_name="quoted_events", db_index=False
    )
    room = models.ForeignKey(Room, models.CASCADE, related_name="+", db_index=False)
    event_id = models.CharField(max_length=255)

    objects = QuotedEventQuerySet.as_manager()

    class Meta:
        indexes = [
            # quotations.remove()
            models.Index(fields=["event_id"], name="quoted_event_by_id"),
            # The deletion of messages and rooms.
            models.Index(fields=["message"], name="quoted_event_by_message"),
            models.Index(fields=["room"], name="quoted_event_by_room"),
        ]

    def __str__(self) -> str:
        return self.event_id


class RoomEventQuerySet(models.QuerySet["RoomEvent"]):
    def with_session(self) -> "RoomEventQuerySet":
        """Load the room and its session with the events, without the session's secrets."""
        rows = self.select_related("room__session")
        return rows.defer("room__session__access_token", "room__session__store_key")

    def messages_among(self, event_ids: Iterable[str]) -> set[str]:
        """Return the ids of recorded messages, which can be edited and redacted."""
        rows = self.filter(event_id__in=list(event_ids), kind__in=RoomEvent.MESSAGES)
        return set(rows.values_list("event_id", flat=True))

    def prunable(self, state: str) -> "RoomEventQuerySet":
        """Filter to the events of a state that may be deleted: nothing unfinished, and nothing that
        would be handled again if the homeserver repeated it. That depends on `sent_at`, which the
        sender's homeserver may have set in the future; so both times are compared."""
        if state not in RoomEvent.ENDED:
            return self.none()
        days = settings.BOT_RUNNER_EVENT_RETENTION_DAYS
        if state == RoomEvent.State.HANDLED:
            days = settings.BOT_RUNNER_REPLY_RETENTION_DAYS
        limit = timezone.now() - timedelta(days=days)
        open_replies = Reply.objects.unfinished().filter(message=OuterRef("pk"))
        return self.filter(
            ~Exists(open_replies),
            state=state,
            created_at__lt=limit,
            sent_at__lt=limit,
        )


class RoomEvent(models.Model):
    """An event of a room, recorded so that it is handled once and that the console can explain which
    commands matched. Events that are not for the bot are recorded without their content."""

    class Kind(models.TextChoices):
        MESSAGE = "message"  # matched a bot command when it was received
        EDIT = "edit"  # of a message, unless ignored
        REDACTION = "redaction"  # of a message, unless ignored
        CANCEL = "cancel"  # cancels runs
        FORGET = "forget"  # deletes the conversation
        RESUME = "resume"  # answers a sender again after a loop
        ENCRYPTED = "encrypted"  # its key has not been received yet
        OTHER = "other"

    class State(models.TextChoices):
        PENDING = "pending"
        HANDLED = "handled"
        IGNORED = "ignored"  # the note says why
        FAILED = "failed"  # see the log

    MESSAGES = (Kind.MESSAGE, Kind.ENCRYPTED)
    ENDED = (State.IGNORED, State.FAILED, State.HANDLED)

    room = models.ForeignKey(Room, models.CASCADE, related_name="events")
    event_id = models.CharField(max_length=255, unique=True)
    kind = models.CharField(max_length=9, choices=Kind.choices)
    state = models.CharField(max_length=7, choices=State.choices, default=State.PENDING)
    sender = models.CharField(max_length=255)
    # The types of the event and of its content, as in filters.
    type = models.CharField(max_length=MAX_TYPE_LENGTH, blank=True)
    content_type = models.CharField(max_length=MAX_TYPE_LENGTH, blank=True)
    sent_at = models.DateTimeField(help_text="By the clock of the sender's homeserver.")
    # From the homeserver, decrypted. Null once the event is ignored.
    source = models.JSONField(null=True, blank=True)
    note = models.TextField(blank=True)
    # Read through `command_verdicts`.
    verdicts = models.JSONField(default=list, blank=True)
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    objects = RoomEventQuerySet.as_manager()

    class Meta:
        ordering = ["id"]
        indexes = [
            # handling.pending(), decryption.undecrypted()
            models.Index(fields=["id"], name="roomevent_pending", condition=Q(state="pending")),
            # The filters of the admin's list.
            models.Index(fields=["state", "-id"], name="roomevent_newest_by_state"),
            models.Index(fields=["kind", "-id"], name="roomevent_by_kind"),
            # prunable()
            models.Index(fields=["state", "created_at"], name="roomevent_by_state"),
            # Its search, and a user's latest events.
            models.Index(fields=["sender", "-id"], name="roomevent_newest_of_sender"),
        ]
        constraints = [
            models.CheckConstraint(
                condition=Q(state="ignored", source__isnull=True)
                | (~Q(state="ignored") & Q(source__isnull=False)),
                name="roomevent_ignored_has_no_source",
            ),
        ]

    def __str__(self) -> str:
        return self.event_id

    @property
    def command_verdicts(self) -> list[Verdict]:
        """The verdicts of the commands that were considered, up to `MAX_VERDICTS`."""
        return verdicts.read(self.verdicts)


# Redactions name any event of a room.
SEARCHED_REPLIES = 1000


class ReplyQuerySet(models.QuerySet["Reply"]):
    def waiting(self) -> "ReplyQuerySet":
        return self.filter(status=Reply.Status.WAITING)

    def ready(self) -> "ReplyQuerySet":
        return self.filter(status=Reply.Status.READY)

    def by_event(self, event_ids: Collection[str]) -> dict[str, "Reply"]:
        """Return the replies that events are parts of, among the latest `SEARCHED_REPLIES`."""
        latest = self.order_by("-id").only("event_ids", "draft_id", "run")
        return {
            event_id: reply
            for reply in latest[:SEARCHED_REPLIES]
            for event_id in reply.sent_event_ids
            if event_id in event_ids
        }

    def unfinished(self) -> "ReplyQuerySet":
        return self.filter(status__in=[Reply.Status.WAITING, Reply.Status.READY])


class Reply(models.Model):
    """A reply that the bot owes a room for a message. A run has one, and another for each retry
    after its outcome was sent. Transaction ids are derived from `key`, so the homeserver accepts
    each part once."""

    class Status(models.TextChoices):
        WAITING = "waiting"  # for the outcome of its run
        READY = "ready"
        SENT = "sent"
        # The message was redacted or merged into a later one, or the bot may not write in the room.
        DROPPED = "dropped"

    message = models.ForeignKey(RoomEvent, models.CASCADE, related_name="replies")
    room = models.ForeignKey(Room, models.CASCADE, related_name="replies", db_index=False)
    # None if the message was refused or the run was deleted; the room gets a reply all the same.
    run = models.ForeignKey(
        Run, models.SET_NULL, null=True, blank=True, related_name="replies", db_index=False
    )
    cycle = models.PositiveSmallIntegerField(
        default=0, help_text="The number of retries of the run that this reply belongs to."
    )
    # Null once they are deleted.
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
    # The frozen contents, so that a resend is identical, and the ids of the parts that were sent.
    parts = models.JSONField(default=list, blank=True)
    event_ids = models.JSONField(default=list, blank=True)
    # With BOT_STREAM_EDITS the first part may be in the room before the outcome is known.
    drafted_at = models.DateTimeField(
        null=True, blank=True, help_text="Since then the room may have a draft."
    )
    draft_id = models.CharField(
        max_length=255, blank=True, help_text="The event id of the draft, once known."
    )
    device_id = models.CharField(
        max_length=255, blank=True, help_text="The device that first tried to send it."
    )
    attempts = models.PositiveIntegerField(default=0)
    due_at = models.DateTimeField(null=True, blank=True, help_text="Not sent before this time.")
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
            # activity.with_activity(), and the admin's lists of replies of a registration or command
            models.Index(fields=["registration", "-created_at"], name="reply_by_registration"),
            models.Index(fields=["bot_command", "-created_at"], name="reply_by_command"),
            # Its search.
            models.Index(fields=["room"], name="reply_by_room"),
        ]
        constraints = [
            models.UniqueConstraint(fields=["run", "cycle"], name="reply_is_unique_per_outcome"),
            models.CheckConstraint(
                condition=Q(draft_id="") | Q(drafted_at__isnull=False),
                name="reply_draft_id_needs_drafted_at",
            ),
        ]

    def __str__(self) -> str:
        return self.key

    @property
    def sent_event_ids(self) -> set[str]:
        """The ids of its events in the room."""
        return {*self.event_ids, self.draft_id} - {""}

    def try_now(self) -> bool:
        """Make it due now; return False if it is not waiting for a retry."""
        waits = Reply.objects.ready().filter(pk=self.pk, due_at__isnull=False)
        return bool(waits.update(due_at=None))

    def begin_draft(self, device_id: str) -> bool:
        """Record that a draft is about to be sent; return False if the run has ended meanwhile."""
        now = timezone.now()
        waiting = Reply.objects.waiting().filter(pk=self.pk)
        if not waiting.update(drafted_at=now, device_id=device_id):
            return False
        self.drafted_at, self.device_id = now, device_id
        return True

    def record_draft(self, event_id: str) -> None:
        self.draft_id = event_id
        Reply.objects.filter(pk=self.pk).update(draft_id=event_id)
