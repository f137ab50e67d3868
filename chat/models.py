import re
import uuid
from collections.abc import Collection, Iterable
from itertools import accumulate
from typing import Any

import cuid2
from django.conf import settings
from django.contrib.auth.models import AnonymousUser
from django.db import models
from django.db.models import Case, F, OuterRef, Q, Subquery, Value, When
from django.db.models.functions import Coalesce, Length, Now, Substr
from django.utils import timezone

from chat import membership
from realm.models import User

# Ids that clients and other programs may choose themselves; ours are PREFIX_ and 24 of [a-z0-9].
CHOSEN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")
MAX_TITLE_LENGTH = 200
PREVIEW_LENGTH = 100


def new_thread_id() -> str:
    return f"thr_{cuid2.create_id()}"


class ThreadQuerySet(models.QuerySet["Thread"]):
    def open_to(self, user: User | AnonymousUser | None) -> "ThreadQuerySet":
        """Threads that `user` may read: those of `owned_by`, and those of the rooms they are in."""
        return self.filter(_owned_by(user) | _of_rooms(user))

    def owned_by(self, user: User | AnonymousUser | None) -> "ThreadQuerySet":
        """Threads that `user` may read and write: their own, and those without an owner where that is
        allowed. A room's thread is never among them."""
        return self.filter(_owned_by(user))

    def owned_pairs(self, pairs: Collection[tuple[int, str]]) -> set[tuple[int, str]]:
        """Of pairs of a user and a thread, those that `owned_by` has because the user is the owner: in
        one query, however many users there are."""
        threads = {thread for _, thread in pairs}
        owners = dict(self.filter(pk__in=threads).values_list("pk", "owner")) if threads else {}
        return {pair for pair in pairs if owners.get(pair[1]) == pair[0]}

    def listed_for(self, user: User | AnonymousUser | None) -> "ThreadQuerySet":
        """Those of `owned_by` that belong to `user`, or to no one where `user` is none: the last asked
        in first, so that a list can be read along one index."""
        owner = user.pk if user is not None else None
        return self.owned_by(user).filter(owner=owner).order_by("-updated_at", "-id")

    def outside_rooms(self) -> "ThreadQuerySet":
        return self.filter(room_id="")

    def with_preview(self) -> "ThreadQuerySet":
        """Those of rooms have none: not every member has seen how they began."""
        first = Message.objects.filter(thread=OuterRef("pk"), position=0)
        words = first.annotate(words=Substr("content", 1, PREVIEW_LENGTH)).values("words")
        preview = Coalesce(Subquery(words), Value(""))
        return self.annotate(preview=Case(When(room_id="", then=preview), default=Value("")))

    def active(self) -> "ThreadQuerySet":
        return self.filter(archived_at=None)

    def before(self, edge: "Thread") -> "ThreadQuerySet":
        """What a list goes on with after the thread `edge`."""
        # The first condition says no more than the second, and is one that an index can begin at.
        return self.filter(
            Q(updated_at__lt=edge.updated_at) | Q(updated_at=edge.updated_at, id__lt=edge.pk),
            updated_at__lte=edge.updated_at,
        )


def _owned_by(user: User | AnonymousUser | None, thread: str = "") -> Q:
    """`thread`: the path to the thread from the rows that the condition is for."""
    mine = Q(pk__in=[])
    if user is not None and user.pk:
        mine = Q(**{f"{thread}owner": user.pk})
    if settings.CHAT_ALLOW_ANONYMOUS:
        mine |= Q(**{f"{thread}owner": None, f"{thread}room_id": ""})
    return mine


def _of_rooms(
    user: User | AnonymousUser | None, thread: str = "", asked_at: str | None = None
) -> Q:
    user_id = getattr(user, "matrix_user_id", None)
    return (
        Q(membership.member_condition(user_id, f"{thread}room_id", asked_at))
        if user_id
        else Q(pk__in=[])
    )


def visible(user: User | AnonymousUser | None, *, asked_at: str) -> Q:
    """What may be read by `user`, of rows that stand in a thread: all that stands in their own
    threads, and in those of a room what was asked since they joined it. `asked_at` names the column
    with the time at which the turn of a row was asked."""
    return _owned_by(user, "thread__") | _of_rooms(user, "thread__", asked_at)


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
        db_default="",  # for what runs as the version before while this one is rolled out
        editable=False,
        help_text="Of the room that it belongs to: its members read it, and it has no owner.",
    )
    title = models.CharField(
        max_length=MAX_TITLE_LENGTH,
        blank=True,
        help_text="Empty: the first words of the first question tell.",
    )
    archived_at = models.DateTimeField(
        null=True, blank=True, help_text="Left out of its owner's list until somebody asks in it."
    )
    # How many questions were asked; the next one takes this number as its turn.
    turns = models.PositiveIntegerField(default=0)
    # The rolling summary tells everything up to and including the position `summary_reach`.
    summary = models.TextField(blank=True)
    summary_reach = models.IntegerField(default=-1)
    # Set while messages have left the window that no summary tells yet; a worker that takes the
    # work moves it ahead, so it is the worker's lease as well.
    summary_due_at = models.DateTimeField(null=True, blank=True)
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    # When something was last asked.
    updated_at = models.DateTimeField(default=timezone.now, editable=False)

    objects = ThreadQuerySet.as_manager()

    class Meta:
        indexes = [
            # The admin's list, newest first.
            models.Index(fields=["-created_at", "id"], name="thread_newest"),
            # listed_for(), with what is archived and without.
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
        """What its owner wants of it; what is None stays."""
        mine = Thread.objects.filter(pk=self.pk)
        if title is not None:
            mine.update(title=title)
        if archived is not None:
            # Since when, if it is archived already.
            since = Coalesce(F("archived_at"), Now()) if archived else None
            mine.update(archived_at=since)


class MessageQuerySet(models.QuerySet["Message"]):
    def visible_to(self, user: User | AnonymousUser | None) -> "MessageQuerySet":
        """An answer is visible to whom its question is."""
        question = Message.objects.filter(
            thread=OuterRef("thread"), position=OuterRef("position") - OuterRef("position") % 2
        )
        asked_at = Subquery(question.order_by().values("created_at")[:1])
        return self.alias(asked_at=asked_at).filter(visible(user, asked_at="asked_at"))


class DeletedThreadQuerySet(models.QuerySet["DeletedThread"]):
    def open_to(self, user: User | AnonymousUser | None) -> "DeletedThreadQuerySet":
        """Those that were open to `user`, as far as the tombstones record it."""
        mine = Q(owner_id=user.pk) if user is not None and user.pk else Q(pk__in=[])
        if settings.CHAT_ALLOW_ANONYMOUS:
            mine |= Q(owner_id=None, room_id="")
        return self.filter(mine)


class DeletedThread(models.Model):
    """A tombstone: the id of a deleted thread stands for that thread alone and is never used again.
    Written in the transaction of the deletion (chat.tombstones), kept for good."""

    id = models.CharField(primary_key=True, max_length=64, editable=False)
    # No foreign key: it outlives its owner.
    owner_id = models.BigIntegerField(null=True, editable=False)
    room_id = models.CharField(max_length=255, blank=True, default="", editable=False)
    deleted_at = models.DateTimeField(default=timezone.now, editable=False)

    objects = DeletedThreadQuerySet.as_manager()

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
    # Of what was asked in a room: when the bot was shown it.
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    objects = MessageQuerySet.as_manager()

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


# A page ends before what was said in it has more characters than this, unless it has one row.
PAGE_CHARACTERS = 4_000_000
# What is read of each before it is known which have room.
BEGINNING = 20_000


def fitting(sizes: Iterable[int]) -> int:
    """How many of some rows a page has room for, each with so many characters: at least one."""
    return max(1, sum(total <= PAGE_CHARACTERS for total in accumulate(sizes)))


def read_contents(messages: Iterable[Message]) -> None:
    """Fill in what was said, where it was left out. One query."""
    rows = list(messages)
    keys = {row.pk for row in rows}
    kept = Message.objects.filter(pk__in=keys).order_by()
    found = dict(kept.values_list("pk", "content")) if keys else {}
    for row in rows:
        row.content = found.get(row.pk, "")  # deleted meanwhile


def page_of(messages: models.QuerySet[Message], limit: int) -> tuple[list[Message], bool]:
    """The first of some messages, at most `limit`, and whether there are more: no more of them are in
    memory at once than fit on a page. One query, and another where one is long."""
    beginning = Substr("content", 1, BEGINNING)
    rows: list[Any] = list(
        messages.annotate(size=Length("content"), beginning=beginning).defer("content")[: limit + 1]
    )
    shown = rows[: min(limit, fitting(row.size for row in rows))]
    long = [row.pk for row in shown if row.size > BEGINNING]
    whole = dict(Message.objects.filter(pk__in=long).values_list("pk", "content")) if long else {}
    for row in shown:
        row.content = whole.get(row.pk, row.beginning)
    return shown, len(rows) > len(shown)
