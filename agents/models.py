"""The records of a run. The rules of its life are in agents/runs.py."""

import uuid
from datetime import timedelta

import cuid2
from django.db import models
from django.db.models import Exists, F, OuterRef, Q
from django.db.models.functions import Now
from django.utils import timezone

from chat.models import Message, Thread

CHAT_REPLY = "chat.reply"


def new_run_id() -> str:
    return f"run_{cuid2.create_id()}"


UNTOLD = Q(handed_at=None) | Q(handed_at__lt=F("lease_expires_at"))


class RunQuerySet(models.QuerySet["Run"]):
    def unfinished(self) -> "RunQuerySet":
        # As the partial indexes say it; a constraint ties it to the status.
        return self.filter(due_at__isnull=False)

    def first_of_thread(self) -> "RunQuerySet":
        """Runs with no unfinished run before them in their thread: the only ones that may go on."""
        earlier = Run.objects.unfinished().filter(
            thread=OuterRef("thread"), position__lt=OuterRef("position")
        )
        return self.filter(~Exists(earlier))

    def claimable(self) -> "RunQuerySet":
        """Due ones that wait, and ones whose worker let the lease lapse. By the database's clock:
        the clocks of the workers need not agree."""
        waiting = Q(status=Run.Status.QUEUED)
        abandoned = Q(status=Run.Status.PROCESSING, lease_expires_at__lt=Now())
        return self.filter(waiting | abandoned, due_at__lte=Now()).first_of_thread()

    def untold(self) -> "RunQuerySet":
        """Claimable ones that no worker was told of, or not since the last one was lost."""
        return self.claimable().filter(UNTOLD)

    def overlooked(self, *, after: timedelta) -> "RunQuerySet":
        """Those, and the ones told so long ago that the hand-over must be lost."""
        return self.claimable().filter(UNTOLD | Q(handed_at__lt=Now() - after))

    def held_by(self, worker: str) -> "RunQuerySet":
        return self.filter(status=Run.Status.PROCESSING, worker=worker)


class Run(models.Model):
    class Status(models.TextChoices):
        QUEUED = "queued"
        PROCESSING = "processing"
        COMPLETED = "completed"
        FAILED = "failed"
        CANCELLED = "cancelled"

    class Source(models.TextChoices):
        HTTP = "http"
        MATRIX = "matrix"
        STREAM = "stream"  # another program's agent.run.requested

    UNFINISHED = (Status.QUEUED, Status.PROCESSING)

    id = models.CharField(primary_key=True, max_length=64, default=new_run_id, editable=False)
    thread = models.ForeignKey(Thread, models.CASCADE, related_name="runs", db_index=False)
    message = models.OneToOneField(Message, models.CASCADE, related_name="run")
    position = models.PositiveIntegerField(help_text="That of the message, which orders the runs.")
    answer = models.OneToOneField(
        Message, models.CASCADE, null=True, blank=True, related_name="answered_run"
    )
    correlation_id = models.CharField(max_length=200, db_index=True)
    # The event that asked; each outcome names it. No foreign key: the event needs the run first.
    request_event_id = models.UUIDField(default=uuid.uuid4, editable=False)
    source = models.CharField(max_length=6, choices=Source.choices)
    # What is carried out, as agents.commands names it, and what it was fired with.
    command = models.CharField(max_length=2000, default=CHAT_REPLY)
    input = models.JSONField(default=dict, blank=True)
    model = models.CharField(max_length=100)
    status = models.CharField(max_length=10, choices=Status.choices, default=Status.QUEUED)
    # Grows with every claim. Whoever writes an outcome must name the number that it claimed with,
    # so a worker that lost its lease can write nothing.
    attempt = models.PositiveSmallIntegerField(default=0)
    worker = models.CharField(max_length=200, blank=True, help_text="The last one to claim it.")
    claimed_at = models.DateTimeField(null=True, blank=True)
    lease_expires_at = models.DateTimeField(null=True, blank=True)
    due_at = models.DateTimeField(
        null=True,
        blank=True,
        default=timezone.now,
        help_text="Not to be started before. Empty once the run has ended.",
    )
    handed_at = models.DateTimeField(
        null=True, blank=True, default=timezone.now, help_text="Last told to the workers."
    )
    safe_error = models.TextField(blank=True, help_text="What went wrong, safe to show.")
    error_code = models.CharField(max_length=40, blank=True)
    prompt_tokens = models.PositiveIntegerField(default=0)
    completion_tokens = models.PositiveIntegerField(default=0)
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    started_at = models.DateTimeField(null=True, blank=True)
    finished_at = models.DateTimeField(null=True, blank=True)
    updated_at = models.DateTimeField(default=timezone.now, editable=False)

    objects = RunQuerySet.as_manager()

    class Meta:
        indexes = [
            # overlooked(): the queue, and no finished run. Not by status: SQLite cannot tell that a
            # status given as a parameter fits the condition of an index.
            models.Index(
                fields=["due_at"], name="run_unfinished_due", condition=Q(due_at__isnull=False)
            ),
            # first_of_thread(): a claim in a long thread looks at no finished run.
            models.Index(
                fields=["thread", "position"],
                name="run_unfinished_in_thread",
                condition=Q(due_at__isnull=False),
            ),
            # The admin's list, newest first, whole and by status.
            models.Index(fields=["-created_at", "id"], name="run_newest"),
            models.Index(fields=["status", "-created_at"], name="run_by_status"),
        ]
        constraints = [
            models.UniqueConstraint(fields=["thread", "position"], name="run_position_is_unique"),
            models.CheckConstraint(
                condition=Q(status__in=["queued", "processing"], due_at__isnull=False)
                | (~Q(status__in=["queued", "processing"]) & Q(due_at__isnull=True)),
                name="run_is_due_until_it_ends",
            ),
            models.CheckConstraint(
                condition=Q(status="processing", lease_expires_at__isnull=False)
                | (~Q(status="processing") & Q(lease_expires_at__isnull=True)),
                name="run_has_a_lease_while_processing",
            ),
            models.CheckConstraint(
                condition=Q(status="completed", answer__isnull=False) | ~Q(status="completed"),
                name="run_completed_has_an_answer",
            ),
        ]

    def __str__(self) -> str:
        return self.id

    @property
    def is_finished(self) -> bool:
        return self.status not in self.UNFINISHED


class Attempt(models.Model):
    """One claim of a run by a worker, written when it has ended. The one that is going on stands in
    the run itself."""

    class Result(models.TextChoices):
        COMPLETED = "completed"
        FAILED = "failed"
        RETRIED = "retried"  # failed in a way that another attempt may mend
        LOST = "lost"  # its worker let the lease lapse
        CANCELLED = "cancelled"

    run = models.ForeignKey(Run, models.CASCADE, related_name="attempts", db_index=False)
    number = models.PositiveSmallIntegerField()
    worker = models.CharField(max_length=200)
    result = models.CharField(max_length=9, choices=Result.choices)
    error = models.TextField(blank=True)
    prompt_tokens = models.PositiveIntegerField(default=0)
    completion_tokens = models.PositiveIntegerField(default=0)
    started_at = models.DateTimeField()
    ended_at = models.DateTimeField(default=timezone.now)

    class Meta:
        ordering = ["run", "number"]
        constraints = [
            models.UniqueConstraint(fields=["run", "number"], name="attempt_number_is_unique"),
        ]

    def __str__(self) -> str:
        return f"{self.run_id} attempt {self.number}"


class Step(models.Model):
    """One call of a model or a tool, kept whatever became of its attempt."""

    class Kind(models.TextChoices):
        MODEL = "model"
        TOOL = "tool"

    run = models.ForeignKey(Run, models.CASCADE, related_name="steps")
    attempt = models.PositiveSmallIntegerField()
    kind = models.CharField(max_length=5, choices=Kind.choices)
    name = models.CharField(max_length=100, help_text="The model or the tool.")
    # agents.memory.Context.sent for the first model call of an attempt, a tool's arguments for a tool.
    input = models.JSONField(default=dict)
    output = models.TextField(blank=True)
    error = models.TextField(blank=True)
    prompt_tokens = models.PositiveIntegerField(default=0)
    completion_tokens = models.PositiveIntegerField(default=0)
    duration_ms = models.PositiveIntegerField()
    created_at = models.DateTimeField(default=timezone.now)

    class Meta:
        ordering = ["id"]

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


class EventQuerySet(models.QuerySet["Event"]):
    def unpublished(self) -> "EventQuerySet":
        return self.filter(published_at=None)


class Event(models.Model):
    """What is told on the stream: written with the change it tells of, added to the stream after the
    commit, and added again by the relay until a worker has seen it there."""

    class Type(models.TextChoices):
        REQUESTED = "agent.run.requested"
        COMPLETED = "agent.run.completed"
        FAILED = "agent.run.failed"
        CANCELLED = "agent.run.cancelled"

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    type = models.CharField(max_length=30, choices=Type.choices)
    run = models.ForeignKey(Run, models.CASCADE, related_name="events")
    correlation_id = models.CharField(max_length=200)
    payload = models.JSONField()
    created_at = models.DateTimeField(default=timezone.now)
    published_at = models.DateTimeField(
        null=True, blank=True, help_text="When it was seen on the stream."
    )

    objects = EventQuerySet.as_manager()

    class Meta:
        ordering = ["created_at"]
        indexes = [
            # The relay's query.
            models.Index(
                fields=["created_at"], name="event_unpublished", condition=Q(published_at=None)
            ),
        ]

    def __str__(self) -> str:
        return f"{self.type} {self.run_id}"

    def as_entry(self) -> dict[str, object]:
        """The event as it stands on the stream."""
        return {
            "id": str(self.id),
            "type": self.type,
            "timestamp": self.created_at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "correlationId": self.correlation_id,
            "payload": self.payload,
        }


class Summary(models.Model):
    """A version of a thread's rolling summary: the one before it, extended by what had left the
    window since."""

    thread = models.ForeignKey(Thread, models.CASCADE, related_name="summaries", db_index=False)
    # Positions, both included. The text tells what came before `covers_from` too.
    covers_from = models.IntegerField()
    covers_to = models.IntegerField()
    text = models.TextField()
    model = models.CharField(max_length=100)
    prompt_tokens = models.PositiveIntegerField(default=0)
    completion_tokens = models.PositiveIntegerField(default=0)
    created_at = models.DateTimeField(default=timezone.now)

    class Meta:
        ordering = ["thread", "covers_to"]
        verbose_name_plural = "summaries"
        constraints = [
            models.UniqueConstraint(fields=["thread", "covers_from"], name="summary_extends_once"),
        ]

    def __str__(self) -> str:
        return f"{self.thread_id} up to {self.covers_to}"


class IdempotencyKey(models.Model):
    """What a caller's key was used for, kept for good: it outlives the run and the thread."""

    caller = models.CharField(max_length=255)
    key = models.CharField(max_length=255)
    fingerprint = models.CharField(max_length=64, help_text="SHA-256 of the request.")
    run_id = models.CharField(max_length=64)
    thread_id = models.CharField(max_length=64)
    message_id = models.UUIDField()
    model = models.CharField(max_length=100)
    correlation_id = models.CharField(max_length=200)
    created_at = models.DateTimeField(default=timezone.now)

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["caller", "key"], name="idempotency_key_is_unique"),
        ]

    def __str__(self) -> str:
        return f"{self.caller}: {self.key}"
