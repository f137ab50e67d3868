import re
import uuid
from collections.abc import Collection, Iterable
from itertools import accumulate
from typing import Any, Literal, TypedDict

import cuid2
from django.conf import settings
from django.contrib.auth.models import AnonymousUser
from django.db import models
from django.db.models import Case, F, OuterRef, Q, Subquery, Value, When
from django.db.models.functions import Coalesce, Length, Now, Substr
from django.utils import timezone

from chat import membership
from realm.models import User

# Ids that clients may choose; generated ones are PREFIX_ and 24 characters of [a-z0-9].
CHOSEN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")
MAX_TITLE_LENGTH = 200
PREVIEW_LENGTH = 100


def new_thread_id() -> str:
    return f"thr_{cuid2.create_id()}"


class ThreadQuerySet(models.QuerySet["Thread"]):
    def open_to(self, user: User | AnonymousUser | None) -> "ThreadQuerySet":
        """Return the threads that `user` may read: those of `owned_by` and of the user's rooms."""
        return self.filter(_owned_by(user) | _of_rooms(user))

    def owned_by(self, user: User | AnonymousUser | None) -> "ThreadQuerySet":
        """Return the threads that `user` may read and write: the user's own, and those without an owner
        if CHAT_ALLOW_ANONYMOUS is set. Never a room's thread."""
        return self.filter(_owned_by(user))

    def owned_pairs(self, pairs: Collection[tuple[int, str]]) -> set[tuple[int, str]]:
        """Return the pairs of a user and a thread in which the user owns the thread. One query."""
        threads = {thread for _, thread in pairs}
        owners = dict(self.filter(pk__in=threads).values_list("pk", "owner")) if threads else {}
        return {pair for pair in pairs if owners.get(pair[1]) == pair[0]}

    def listed_for(self, user: User | AnonymousUser | None) -> "ThreadQuerySet":
        """Return the threads of `user`, or those without an owner if `user` is None, most recent first.
        One index covers the list."""
        owner = user.pk if user is not None else None
        return self.owned_by(user).filter(owner=owner).order_by("-updated_at", "-id")

    def outside_rooms(self) -> "ThreadQuerySet":
        return self.filter(room_id="")

    def with_preview(self) -> "ThreadQuerySet":
        """Annotate `preview`. Threads of rooms have none: not every member may see their beginning."""
        first = Message.objects.filter(thread=OuterRef("pk"), position=0)
        beginning = first.annotate(text=Substr("content", 1, PREVIEW_LENGTH)).values("text")
        preview = Coalesce(Subquery(beginning), Value(""))
        return self.annotate(preview=Case(When(room_id="", then=preview), default=Value("")))

    def active(self) -> "ThreadQuerySet":
        return self.filter(archived_at=None)

    def before(self, edge: "Thread") -> "ThreadQuerySet":
        """Return the threads after `edge` in the order of the list."""
        # The second condition is implied by the first; an index scan can start at it.
        return self.filter(
            Q(updated_at__lt=edge.updated_at) | Q(updated_at=edge.updated_at, id__lt=edge.pk),
            updated_at__lte=edge.updated_at,
        )


def _owned_by(user: User | AnonymousUser | None, thread: str = "") -> Q:
    """Return a condition on rows with the path `thread` to their thread."""
    owned = Q(pk__in=[])
    if user is not None and user.pk:
        owned = Q(**{f"{thread}owner": user.pk})
    if settings.CHAT_ALLOW_ANONYMOUS:
        owned |= Q(**{f"{thread}owner": None, f"{thread}room_id": ""})
    return owned


def _of_rooms(user: User | AnonymousUser | None, thread: str = "", sent_at: str | None = None) -> Q:
    user_id = getattr(user, "matrix_user_id", None)
    return (
        Q(membership.member_condition(user_id, f"{thread}room_id", sent_at))
        if user_id
        else Q(pk__in=[])
    )


def visible(user: User | AnonymousUser | None, *, sent_at: str) -> Q:
    """Return a condition on rows of threads that `user` may read: those of own threads, and in a room's
    thread those since the user joined. `sent_at`: the column with the time of the row's message."""
    return _owned_by(user, "thread__") | _of_rooms(user, "thread__", sent_at)


class Thread(models.Model):
    id = models.CharField(primary_key=True, max_length=64, default=new_thread_id, editable=False)
    owner = models.ForeignKey(
        User, models.CASCADE, null=True, blank=True, related_name="threads", db_index=False
    )
    room_id = models.CharField(
        "Matrix room id",
        max_length=255,
        blank=True,
        default="",
        db_default="",  # for processes of the previous version during a rollout
        editable=False,
        help_text="The room of the thread: its members may read it, and it has no owner.",
    )
    title = models.CharField(
        max_length=MAX_TITLE_LENGTH,
        blank=True,
        help_text="If empty, the beginning of the first message is shown.",
    )
    archived_at = models.DateTimeField(
        null=True, blank=True, help_text="Hidden from the owner's list until the next message."
    )
    # The number of turns, and the turn of the next message.
    turns = models.PositiveIntegerField(default=0)
    # The rolling summary covers the messages up to and including the position `summary_reach`.
    summary = models.TextField(blank=True)
    summary_reach = models.IntegerField(default=-1)
    # Set while messages that left the window are not summarised yet. A worker that claims the work
    # moves it ahead, so it is also the worker's lease.
    summary_due_at = models.DateTimeField(null=True, blank=True)
    # Counts the edits and redactions: a summary of what was read before is discarded.
    memory_version = models.PositiveIntegerField(default=0, db_default=0, editable=False)
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    # The time of the last message.
    updated_at = models.DateTimeField(default=timezone.now, editable=False)

    objects = ThreadQuerySet.as_manager()

    class Meta:
        indexes = [
            # The admin's list, newest first.
            models.Index(fields=["-created_at", "id"], name="thread_newest"),
            # listed_for(), with archived threads and without.
            models.Index(fields=["owner", "-updated_at", "-id"], name="thread_of_owner"),
            models.Index(
                fields=["owner", "-updated_at", "-id"],
                name="thread_active_of_owner",
                condition=Q(archived_at=None),
            ),
            # agents.runs.memory.due(): the sweep that makes summaries.
            models.Index(
                fields=["summary_due_at"],
                name="thread_summary_due",
                condition=Q(summary_due_at__isnull=False),
            ),
        ]
        constraints = [
            models.CheckConstraint(
                condition=Q(room_id="") | Q(owner=None), name="thread_of_a_room_has_no_owner"
            ),
        ]

    def __str__(self) -> str:
        return self.id

    def change(self, *, title: str | None = None, archived: bool | None = None) -> None:
        """Change the given fields; None leaves one as it is."""
        thread = Thread.objects.filter(pk=self.pk)
        if title is not None:
            thread.update(title=title)
        if archived is not None:
            # A repeat keeps the time.
            since = Coalesce(F("archived_at"), Now()) if archived else None
            thread.update(archived_at=since)


class MessageQuerySet(models.QuerySet["Message"]):
    def visible_to(self, user: User | AnonymousUser | None) -> "MessageQuerySet":
        """Return the messages that `user` may read. An answer is visible if its message is."""
        message = Message.objects.filter(
            thread=OuterRef("thread"), position=OuterRef("position") - OuterRef("position") % 2
        )
        sent_at = Subquery(message.order_by().values("created_at")[:1])
        return self.alias(sent_at=sent_at).filter(visible(user, sent_at="sent_at"))


class DeletedThreadQuerySet(models.QuerySet["DeletedThread"]):
    def open_to(self, user: User | AnonymousUser | None) -> "DeletedThreadQuerySet":
        """Return the threads that were open to `user`, as far as the tombstones record it."""
        owned = Q(owner_id=user.pk) if user is not None and user.pk else Q(pk__in=[])
        if settings.CHAT_ALLOW_ANONYMOUS:
            owned |= Q(owner_id=None, room_id="")
        return self.filter(owned)


class DeletedThread(models.Model):
    """A tombstone: the id of a deleted thread is never used again. Written in the transaction of the
    deletion (chat.tombstones) and never deleted."""

    id = models.CharField(primary_key=True, max_length=64, editable=False)
    # No foreign key: the row outlives the owner.
    owner_id = models.BigIntegerField(null=True, editable=False)
    room_id = models.CharField(max_length=255, blank=True, default="", editable=False)
    deleted_at = models.DateTimeField(default=timezone.now, editable=False)

    objects = DeletedThreadQuerySet.as_manager()

    def __str__(self) -> str:
        return self.id


class Quotation(TypedDict):
    """A message elsewhere that a message refers to."""

    kind: Literal["reply", "root"]  # the message replied to; the start of the branch
    author: Literal["user", "assistant", "other"]  # the author of the message, the agent, another
    text: str
    source: str  # the id of the quoted message, as the source of the message has it


class Message(models.Model):
    class Role(models.TextChoices):
        USER = "user"
        ASSISTANT = "assistant"
        SYSTEM = "system"

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    thread = models.ForeignKey(Thread, models.CASCADE, related_name="messages", db_index=False)
    # The message of turn n has the position 2n, its answer 2n + 1: an answer follows its message
    # however late it comes, and a message cannot have two.
    position = models.PositiveIntegerField()
    role = models.CharField(max_length=9, choices=Role.choices)
    content = models.TextField()
    # `Quotation`s as JSON, in order: what the message replies to, or the start of its branch. Not part
    # of the API: not every reader of the thread may see them.
    quotations = models.JSONField(
        default=list, db_default=Value([], models.JSONField()), blank=True
    )
    correlation_id = models.CharField(max_length=200)
    redacted_at = models.DateTimeField(
        null=True,
        blank=True,
        editable=False,
        help_text="The content was removed then. The place in the thread stays.",
    )
    # In a room: the time at which the bot received the event.
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    objects = MessageQuerySet.as_manager()

    class Meta:
        ordering = ["thread", "position"]
        indexes = [
            # The admin's list, newest first, whole and by role.
            models.Index(fields=["-created_at", "id"], name="message_newest"),
            models.Index(fields=["role", "-created_at"], name="message_by_role"),
        ]
        permissions = [("read_messages", "Can read messages of others")]
        constraints = [
            # Also the index for reading the history.
            models.UniqueConstraint(
                fields=["thread", "position"], name="message_position_is_unique"
            ),
        ]

    def __str__(self) -> str:
        # Without the content, since titles, log lines and form choices show it to every admin.
        return f"{self.get_role_display()}, turn {self.turn} of {self.thread_id}"

    @property
    def turn(self) -> int:
        """Return the number of its turn, from 1."""
        return self.position // 2 + 1


# A page of more than one row has at most this many characters of content.
PAGE_CHARACTERS = 4_000_000
# Characters read of each row before the size of the page is known.
BEGINNING = 20_000


def fitting(sizes: Iterable[int]) -> int:
    """Return how many rows of these sizes, in characters, fit on a page: at least one."""
    return max(1, sum(total <= PAGE_CHARACTERS for total in accumulate(sizes)))


def read_contents(messages: Iterable[Message]) -> None:
    """Load the deferred contents of messages. One query."""
    rows = list(messages)
    keys = {row.pk for row in rows}
    stored = Message.objects.filter(pk__in=keys).order_by()
    contents = dict(stored.values_list("pk", "content")) if keys else {}
    for row in rows:
        row.content = contents.get(row.pk, "")  # deleted meanwhile


def page_of(messages: models.QuerySet[Message], limit: int) -> tuple[list[Message], bool]:
    """Return the first `limit` messages that fit on a page, and whether there are more. Loads no more
    than a page into memory: one query, and another for long messages."""
    beginning = Substr("content", 1, BEGINNING)
    rows: list[Any] = list(
        messages.annotate(size=Length("content"), beginning=beginning).defer(
            "content", "quotations"
        )[: limit + 1]
    )
    shown = rows[: min(limit, fitting(row.size for row in rows))]
    long = [row.pk for row in shown if row.size > BEGINNING]
    whole = dict(Message.objects.filter(pk__in=long).values_list("pk", "content")) if long else {}
    for row in shown:
        row.content = whole.get(row.pk, row.beginning)
    return shown, len(rows) > len(shown)
