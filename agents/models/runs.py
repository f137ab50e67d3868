"""Runs. Their transitions are in agents/lifecycle/states.py."""

import dataclasses
import time
import uuid
from datetime import datetime, timedelta
from typing import Any

import cuid2
from django.contrib.auth.models import AnonymousUser
from django.db import models
from django.db.models import Exists, F, OuterRef, Q, Subquery
from django.db.models.expressions import RawSQL
from django.db.models.functions import Coalesce, Greatest, Now
from django.utils import timezone

from agents.lifecycle import states
from agents.lifecycle.conditions import Condition
from agents.lifecycle.sql import as_q
from agents.models.limits import MAX_NAME_LENGTH
from agents.models.usage import cost_field, finish_reason_field, usage_is_estimated_field
from chat.models import Message, Thread, visible
from lib.tracing import MAX_LENGTH as MAX_REQUEST_ID_LENGTH
from realm.models import User

CHAT_REPLY = "chat.reply"
CHAT_SUMMARIZE = "chat.summarize"
# The error code of a run that had not ended at its `deadline_at`.
OVERDUE = "deadline_exceeded"

CUT_OFF = "The answer was cut off at the output limit."


def new_run_id() -> str:
    return f"run_{cuid2.create_id()}"


STATE = [field.name for field in dataclasses.fields(states.State)]
SEARCHED_FOR_OLDEST = 200


# As limits.requester_of() names an account. Django would take longer to build this than to read the
# run.
IS_OF_DEACTIVATED_ACCOUNT = RawSQL(
    """EXISTS(SELECT 1 FROM realm_user gone WHERE NOT gone.is_active AND (
        gone.matrix_user_id = agents_run.requester
        OR (gone.username = agents_run.requester AND gone.matrix_user_id IS NULL)))""",
    (),
    output_field=models.BooleanField(),
)


class RunQuerySet(models.QuerySet["Run"]):
    def matching(self, condition: Condition) -> "RunQuerySet":
        return self.filter(as_q(condition))

    def unfinished(self) -> "RunQuerySet":
        return self.matching(states.UNFINISHED)

    def first_of_thread(self) -> "RunQuerySet":
        """Filter runs without an unfinished run before them in their thread: only these may proceed."""
        earlier = Run.objects.unfinished().filter(
            thread=OuterRef("thread"), position__lt=OuterRef("position")
        )
        return self.filter(~Exists(earlier))

    def claimable(self) -> "RunQuerySet":
        """Filter runs that a worker may claim now: `states.CLAIMABLE`, in their turn. Only a
        retried run has later ones in its thread that a worker may hold."""
        later = Run.objects.unfinished().filter(
            as_q(states.HELD), thread=OuterRef("thread"), position__gt=OuterRef("position")
        )
        return self.matching(states.CLAIMABLE).first_of_thread().filter(~Exists(later))

    def overdue(self) -> "RunQuerySet":
        """Filter runs past their deadline that no worker will end."""
        return self.matching(states.OVERDUE)

    def claimable_unchanged(self, run: "Run") -> "RunQuerySet":
        """Filter an unfinished run, if it is unchanged since it was read and claimable. A row that is
        unchanged needs only the conditions on time of `claimable()`: each claim runs this, and
        all of them would cost it 0.2 to 0.4 ms more on SQLite."""
        conditions: dict[str, Any] = {"due_at__lte": Now()}
        if run.deadline_at:
            conditions["deadline_at__gt"] = Now()
        if run.status == Run.Status.PROCESSING:
            conditions["lease_expires_at__lt"] = Now()
        claimable = self.unchanged(run).filter(**conditions)
        others = Run.objects.unfinished().filter(thread=run.thread_id)
        if run.position:
            claimable = claimable.filter(~Exists(others.filter(position__lt=run.position)))
        if run.retries:
            # A later run can have started only after a retry.
            later = others.matching(states.HELD).filter(position__gt=run.position)
            claimable = claimable.filter(~Exists(later))
        return claimable

    def undispatched(self) -> "RunQuerySet":
        """Filter claimable runs that were not dispatched, or not since their worker was lost."""
        return self.claimable().matching(states.UNDISPATCHED)

    def dispatch_lost(self) -> "RunQuerySet":
        """Filter these, and runs dispatched so long ago that the task must be lost."""
        return self.claimable().matching(states.DISPATCH_LOST)

    def unchanged(self, run: "Run") -> "RunQuerySet":
        """Filter this run, if its state is unchanged since it was read."""
        version = {name: getattr(run, name) for name in states.VERSION}
        return self.filter(pk=run.pk, **version)

    def seconds_unclaimed(self) -> float:
        """Return the age in seconds of the oldest claimable run; 0 without one. A run is claimable
        since it is due, since its lease has lapsed, and since it is its turn in the thread: the
        latest of them."""
        before = Run.objects.filter(thread=OuterRef("thread"), position__lt=OuterRef("position"))
        turn = before.order_by("-position").values("finished_at")[:1]
        since = Greatest(
            F("due_at"),
            Coalesce(F("lease_expires_at"), F("due_at")),
            Coalesce(Subquery(turn), F("due_at")),
        )
        claimable = self.claimable().annotate(now=Now(), since=since).order_by("due_at")
        # Not of all: in a long queue the oldest is among these, or nearly as old.
        times = claimable.values_list("now", "since")[:SEARCHED_FOR_OLDEST]
        return max([0.0, *((now - since).total_seconds() for now, since in times)])

    def with_account_state(self) -> "RunQuerySet":
        """Add `is_of_deactivated_account`: its user's account was deactivated since. In the same
        statement, as each run is read before it starts."""
        return self.annotate(is_of_deactivated_account=IS_OF_DEACTIVATED_ACCOUNT)

    def with_database_time(self) -> list["Run"]:
        """Read the runs with the time of the database's clock, for `Run.clock()`."""
        started = time.monotonic()
        runs: list[Run] = [*self.annotate(database_time=Now())]
        for run in runs:
            run.read_at, run.read_at_monotonic = vars(run).pop("database_time"), started
        return runs

    def held_by(self, worker: str) -> "RunQuerySet":
        return self.filter(status=Run.Status.PROCESSING, worker=worker)

    def visible_to(self, user: User | AnonymousUser | None) -> "RunQuerySet":
        """Filter runs in the user's own threads, and in those of rooms the ones since the user
        joined."""
        return self.filter(visible(user, sent_at="message__created_at"))


class Run(models.Model):
    class Status(models.TextChoices):
        QUEUED = states.Status.QUEUED.value
        PROCESSING = states.Status.PROCESSING.value
        COMPLETED = states.Status.COMPLETED.value
        FAILED = states.Status.FAILED.value
        CANCELLED = states.Status.CANCELLED.value

    class Source(models.TextChoices):
        HTTP = "http"
        MATRIX = "matrix"
        STREAM = "stream"  # an agent.run.requested of another program

    UNFINISHED = tuple(map(Status, states.OPEN))

    id = models.CharField(primary_key=True, max_length=64, default=new_run_id, editable=False)
    thread = models.ForeignKey(Thread, models.CASCADE, related_name="runs", db_index=False)
    message = models.OneToOneField(Message, models.CASCADE, related_name="run")
    position = models.PositiveIntegerField(
        help_text="The position of its message, which orders the runs."
    )
    answer = models.OneToOneField(
        Message, models.CASCADE, null=True, blank=True, related_name="answered_run"
    )
    correlation_id = models.CharField(max_length=200, db_index=True)
    # The event of its request; each outcome names it. No foreign key: the event needs the run first.
    request_event_id = models.UUIDField(default=uuid.uuid4, editable=False)
    source = models.CharField(max_length=6, choices=Source.choices)
    place = models.CharField(
        max_length=255,
        blank=True,
        help_text="The Matrix id of its room. Empty for HTTP and the stream.",
    )
    requester = models.CharField(
        max_length=MAX_NAME_LENGTH,
        blank=True,
        default="",
        db_default="",  # for processes of the previous version during a rollout
        help_text="The user, as limits name them: a Matrix id, or a user name.",
    )
    request_id = models.CharField(
        max_length=MAX_REQUEST_ID_LENGTH,
        blank=True,
        help_text="The id of the HTTP request, the Matrix event or the stream's event.",
    )
    # The command that it executes (agents.runs.commands), and its input.
    command = models.CharField(max_length=2000, default=CHAT_REPLY)
    input = models.JSONField(default=dict, blank=True)
    model = models.CharField(max_length=100)
    status = models.CharField(max_length=10, choices=Status.choices, default=Status.QUEUED)
    # Grows with every claim: the fencing number.
    attempt = models.PositiveSmallIntegerField(default=0)
    # The number that the present budget of attempts counts from.
    attempt_base = models.PositiveSmallIntegerField(default=0)
    # How often it was retried after it had ended, and when last.
    retries = models.PositiveSmallIntegerField(default=0)
    retried_at = models.DateTimeField(null=True, blank=True)
    worker = models.CharField(
        max_length=200, blank=True, help_text="The last worker that claimed it."
    )
    claimed_at = models.DateTimeField(null=True, blank=True)
    lease_expires_at = models.DateTimeField(null=True, blank=True)
    due_at = models.DateTimeField(
        null=True,
        blank=True,
        default=timezone.now,
        help_text="Not started before this time. Empty once the run has ended.",
    )
    dispatched_at = models.DateTimeField(
        null=True, blank=True, default=timezone.now, help_text="Last dispatched to Celery."
    )
    deadline_at = models.DateTimeField(
        null=True,
        blank=True,
        help_text="The time at which it fails if it has not ended, however many attempts remain.",
    )
    merged_into = models.ForeignKey(
        "self",
        models.SET_NULL,
        null=True,
        blank=True,
        related_name="merged",
        db_index=False,
        help_text="The run that answers its message too; this one was cancelled for it.",
    )
    safe_error = models.TextField(blank=True, help_text="What went wrong, safe to show.")
    error_code = models.CharField(max_length=40, blank=True)
    finish_reason = finish_reason_field()
    prompt_tokens = models.PositiveIntegerField(default=0)
    completion_tokens = models.PositiveIntegerField(default=0)
    usage_is_estimated = usage_is_estimated_field()
    cost = cost_field()
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    started_at = models.DateTimeField(null=True, blank=True)
    finished_at = models.DateTimeField(null=True, blank=True)
    updated_at = models.DateTimeField(default=timezone.now, editable=False)

    objects = RunQuerySet.as_manager()

    class Meta:
        permissions = [
            ("cancel_run", "Can cancel runs"),
            ("retry_run", "Can retry runs"),
            ("requeue_run", "Can requeue runs"),
        ]
        indexes = [
            # dispatch_lost(): the queue, and no finished run. Not by status: SQLite cannot see that a
            # status given as a parameter matches the condition of an index.
            models.Index(
                fields=["due_at"], name="run_unfinished_due", condition=Q(due_at__isnull=False)
            ),
            # first_of_thread(): a claim in a long thread reads no finished run.
            models.Index(
                fields=["thread", "position"],
                name="run_unfinished_in_thread",
                condition=Q(due_at__isnull=False),
            ),
            # agents.usage.limits, and the share of the slots that one user may have. (The status
            # is none of the condition, for the reason above.)
            models.Index(
                fields=["requester", "status"],
                name="run_unfinished_of_requester",
                condition=Q(due_at__isnull=False),
            ),
            # overdue()
            models.Index(
                fields=["deadline_at"],
                name="run_unfinished_deadline",
                condition=Q(due_at__isnull=False, deadline_at__isnull=False),
            ),
            # The deletion of a run looks for those that point to it.
            models.Index(
                fields=["merged_into"],
                name="run_merged",
                condition=Q(merged_into__isnull=False),
            ),
            # The admin's list, newest first, whole and by status.
            models.Index(fields=["-created_at", "id"], name="run_newest"),
            models.Index(fields=["status", "-created_at"], name="run_by_status"),
            # Its other filters.
            models.Index(fields=["source", "-created_at"], name="run_by_source"),
            models.Index(fields=["model", "-created_at"], name="run_by_model"),
            models.Index(fields=["error_code", "-created_at"], name="run_by_error"),
            models.Index(fields=["place", "-created_at"], name="run_by_place"),
            # botrunner.outgoing.queue.follow_retries(): few of many.
            models.Index(
                fields=["retried_at"], name="run_retried", condition=Q(retried_at__isnull=False)
            ),
            # The search by the request id of a log line or a response.
            models.Index(fields=["request_id"], name="run_by_request_id"),
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
    def answers_others(self) -> bool:
        """Return whether a message of another user was merged into this run, so that the other has
        no answer without it."""
        run_ids = [self.pk]
        while run_ids:
            merged = Run.objects.filter(merged_into__in=run_ids)
            if merged.exclude(requester=self.requester).exists():
                return True
            run_ids = list(merged.values_list("pk", flat=True))
        return False

    @property
    def is_finished(self) -> bool:
        return self.status not in self.UNFINISHED

    @property
    def turn(self) -> int:
        return self.position // 2

    @property
    def answer_note(self) -> str:
        """Return a sentence to show with the answer; empty if it is whole."""
        return CUT_OFF if self.answer_id and self.finish_reason == "length" else ""

    def request_payload(self, prompt: str) -> dict[str, Any]:
        """Return the payload of its `agent.run.requested`."""
        return {
            "runId": self.pk,
            "threadId": self.thread_id,
            "prompt": prompt,
            "model": self.model,
        }

    def outcome_payload(self, **fields: Any) -> dict[str, Any]:
        """Return the payload of the event of its outcome."""
        return {
            "requestEventId": str(self.request_event_id),
            "runId": self.pk,
            "threadId": self.thread_id,
            **fields,
        }

    @property
    def may_be_retried(self) -> bool:
        return not self.why_not_retried

    @property
    def why_not_retried(self) -> str:
        """Return the reason, as a sentence; empty for a run that may be retried."""
        if states.Retried.guard.matches(self, self.clock()):
            return ""
        if not self.is_finished:
            return f"The run has not ended yet: it is {self.status}."
        if self.merged_into_id:
            return f"The run {self.merged_into_id} answers its message too: retry that one."
        return "The run has been answered."

    # The time of reading, by the database's clock and by `time.monotonic()`: `with_database_time()`.
    read_at: datetime | None = None
    read_at_monotonic = 0.0
    # By with_account_state()
    is_of_deactivated_account = False

    def clock(self) -> datetime:
        """Return the present time by the database's clock, as its columns are: this process's may
        be wrong."""
        if self.read_at is None:
            return timezone.now()
        return self.read_at + timedelta(seconds=time.monotonic() - self.read_at_monotonic)

    @property
    def state(self) -> states.State:
        return states.State(**{name: getattr(self, name) for name in STATE})

    @property
    def attempts_spent(self) -> int:
        return self.state.attempts_spent


class DeletedRun(models.Model):
    """A tombstone: programs choose ids of runs, and a used id is never used again."""

    id = models.CharField(primary_key=True, max_length=64, editable=False)
    deleted_at = models.DateTimeField(default=timezone.now, editable=False)

    def __str__(self) -> str:
        return self.id


class IdempotencyKey(models.Model):
    """An idempotency key with the ids of its request, kept for good: it outlives the run and the
    thread."""

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
