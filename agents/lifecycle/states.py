"""The life of a run: its states, and the transitions between them.

    queued -> processing -> completed | failed | cancelled

and back to `queued` when an attempt failed in a way that another may fix, when its worker releases it,
when an operator requeues it, or when it is retried after it failed or was cancelled.

No database and no clock: a transition has a `guard`, the condition on the states that it may start
from, and a `change`, the columns that it writes. agents.runs writes each as one conditional UPDATE with
the guard as its WHERE, so a late writer changes nothing. tests/agents/test_lifecycle.py tries the
transitions in every order, and tests/agents/test_conformance.py compares the database with them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from agents.lifecycle.conditions import NEVER, NOW, Column, Compare, Condition


class Status(StrEnum):
    QUEUED = "queued"
    PROCESSING = "processing"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Result(StrEnum):
    """The result of an attempt."""

    COMPLETED = "completed"
    FAILED = "failed"
    RETRIED = "retried"  # failed in a way that another attempt may fix
    LOST = "lost"  # its worker let the lease lapse
    RETURNED = "returned"  # its worker was stopped; not counted
    CANCELLED = "cancelled"
    REQUEUED = "requeued"  # taken from its worker by an operator


class EventType(StrEnum):
    """The events on the stream."""

    REQUESTED = "agent.run.requested"
    COMPLETED = "agent.run.completed"
    FAILED = "agent.run.failed"
    CANCELLED = "agent.run.cancelled"


OPEN = (Status.QUEUED, Status.PROCESSING)
ENDED = (Status.COMPLETED, Status.FAILED, Status.CANCELLED)

BACKOFF = timedelta(seconds=1)
MAX_BACKOFF = timedelta(seconds=60)
# The time of an attempt that begins late, because no worker was free for a while.
LATE_ATTEMPT = timedelta(seconds=30)
# A process that waits by one clock for a time of another may wake a little early.
CLOCK_SLACK = timedelta(seconds=0.05)
# A worker ends its overdue run itself, at the next token; one that is stuck does not.
OVERDUE_GRACE = timedelta(seconds=1)
# A run that was dispatched and not claimed for this long is dispatched again.
DISPATCH_TIMEOUT = timedelta(seconds=15)
# The time by which the later runs of a thread are deferred when an earlier one is retried.
DEFERRAL = timedelta(seconds=1)


@dataclass(frozen=True)
class Rules:
    """The operator's settings."""

    max_attempts: int = 5
    lease: timedelta = timedelta(seconds=10)
    # From the start of the first attempt, for all attempts.
    time: timedelta = timedelta(seconds=600)


@dataclass(frozen=True)
class State:
    """The state of one run, in the columns of `agents.models.Run`."""

    created_at: datetime
    position: int = 0
    status: Status = Status.QUEUED
    # Grows with every claim. An outcome is written only with the number of the claim.
    attempt: int = 0
    # The number that the present budget of attempts counts from.
    attempt_base: int = 0
    retries: int = 0
    retried_at: datetime | None = None
    started_at: datetime | None = None
    lease_expires_at: datetime | None = None
    due_at: datetime | None = None
    dispatched_at: datetime | None = None
    deadline_at: datetime | None = None
    merged_into_id: str | None = None

    @property
    def attempts_spent(self) -> int:
        """Of the present budget."""
        return self.attempt - self.attempt_base


@dataclass(frozen=True)
class StateChange:
    """The effect of a transition: `columns` with their new values (times as `FromNow`), the `result` of
    the attempt that it ends, and the type of the `event` that is written with it."""

    columns: Mapping[str, Any] = field(default_factory=dict)
    result: Result | None = None
    event: EventType | None = None


# In the form of the partial indexes; a constraint ties it to the status.
UNFINISHED = Compare("due_at", "isnull", False)
QUEUED = Compare("status", "exact", Status.QUEUED)
PROCESSING = Compare("status", "exact", Status.PROCESSING)
LAPSED = Compare("lease_expires_at", "lt", NOW)
# A worker has it, as far as the database knows.
HELD = Compare("lease_expires_at", "gte", NOW)
# Queued runs that are due, and runs whose worker let the lease lapse.
CLAIMABLE = (
    (QUEUED | (PROCESSING & LAPSED))
    & (Compare("deadline_at", "isnull", True) | Compare("deadline_at", "gt", NOW))
    & Compare("due_at", "lte", NOW)
)
# Runs past their deadline that no worker will end.
OVERDUE = (
    UNFINISHED
    & (QUEUED | LAPSED | Compare("deadline_at", "lte", NOW - OVERDUE_GRACE))
    & Compare("deadline_at", "lte", NOW)
)
# Not dispatched, or not since its last worker was lost.
UNDISPATCHED = Compare("dispatched_at", "isnull", True) | Compare(
    "dispatched_at", "lt", Column("lease_expires_at")
)
# Of claimable runs: undispatched, or dispatched so long ago that the task must be lost.
DISPATCH_LOST = UNDISPATCHED | Compare("dispatched_at", "lt", NOW - DISPATCH_TIMEOUT)
# Never claimed, so its message may still be edited.
# A completed run is final; a merged one is answered by another.
RETRIABLE = Compare("status", "in", (Status.FAILED, Status.CANCELLED)) & Compare(
    "merged_into_id", "isnull", True
)
# These three together never return to earlier values.
VERSION = ("status", "attempt", "retries")


def attempts_exhausted(run: State, rules: Rules) -> bool:
    """Return whether this attempt is beyond the budget. Such an attempt calls no model: the worker was
    lost each time, perhaps because of the run itself."""
    return run.attempts_spent > rules.max_attempts


def time_to_deadline(run: State, now: datetime) -> timedelta:
    """Return the rest of the time that the caller allowed."""
    return run.deadline_at - now if run.deadline_at else timedelta.max


def time_left(run: State, now: datetime, rules: Rules) -> timedelta:
    """Return the rest of the time of the present attempt. One that begins late still gets a
    little, but never beyond the caller's deadline."""
    spent = now - (run.started_at or now)
    own = max(rules.time - spent, min(rules.time, LATE_ATTEMPT))
    return min(own, time_to_deadline(run, now))


def out_of_time(run: State, now: datetime) -> bool:
    return time_to_deadline(run, now) < CLOCK_SLACK


def backoff(attempt: int, jitter: float) -> timedelta:
    """Return the pause before another attempt. Full jitter (from 0 to 1) spreads the attempts of runs
    that failed together."""
    return jitter * min(MAX_BACKOFF, BACKOFF * 2 ** min(attempt, 16))


def _end(status: Status) -> dict[str, Any]:
    return {"status": status, "due_at": None, "lease_expires_at": None}


def _restart(run: State) -> dict[str, Any]:
    """Return the columns of a run that is due now, with a full budget of attempts and time."""
    return {
        "status": Status.QUEUED,
        "lease_expires_at": None,
        "due_at": NOW,
        "dispatched_at": None,
        "started_at": None,
        "attempt_base": run.attempt,
    }


class Transition:
    """A change of a run's state."""

    guard: Condition = NEVER

    def change(self, run: State, now: datetime, rules: Rules) -> StateChange:
        raise NotImplementedError


@dataclass(frozen=True)
class Claimed(Transition):
    """A worker takes the run. Its turn in the thread is checked by
    `RunQuerySet.claimable_unchanged()`."""

    guard = CLAIMABLE

    def change(self, run: State, now: datetime, rules: Rules) -> StateChange:
        columns = {
            "status": Status.PROCESSING,
            "attempt": run.attempt + 1,
            "lease_expires_at": NOW + rules.lease,
            "started_at": run.started_at or NOW,
        }
        return StateChange(columns, result=Result.LOST if run.status == Status.PROCESSING else None)


@dataclass(frozen=True)
class AttemptTransition(Transition):
    """A change by the worker that holds the run: counts while its claim stands."""

    attempt: int

    @property
    def guard(self) -> Condition:  # type: ignore[override]
        return PROCESSING & Compare("attempt", "exact", self.attempt)


@dataclass(frozen=True)
class Answered(AttemptTransition):
    def change(self, run: State, now: datetime, rules: Rules) -> StateChange:
        return StateChange(_end(Status.COMPLETED), Result.COMPLETED, EventType.COMPLETED)


@dataclass(frozen=True)
class Failed(AttemptTransition):
    """The attempt failed. `permanent`: another attempt cannot succeed. `retry_after`: the pause that
    the model endpoint requested. `jitter`: see `backoff()`."""

    permanent: bool
    retry_after: timedelta = timedelta()
    jitter: float = 1.0

    def change(self, run: State, now: datetime, rules: Rules) -> StateChange:
        pause = max(self.retry_after, backoff(run.attempts_spent, self.jitter))
        if (
            self.permanent
            or out_of_time(run, now)
            or run.attempts_spent >= rules.max_attempts
            or pause >= time_left(run, now, rules)
        ):
            return StateChange(_end(Status.FAILED), Result.FAILED, EventType.FAILED)
        columns = {
            "status": Status.QUEUED,
            "due_at": NOW + pause,
            "dispatched_at": None,
            "lease_expires_at": None,
        }
        return StateChange(columns, Result.RETRIED)


@dataclass(frozen=True)
class Released(AttemptTransition):
    """Its worker has to stop; the attempt is not counted."""

    def change(self, run: State, now: datetime, rules: Rules) -> StateChange:
        columns = {
            "status": Status.QUEUED,
            "dispatched_at": None,
            "lease_expires_at": None,
            "attempt_base": run.attempt_base + 1,
        }
        return StateChange(columns, Result.RETURNED)


@dataclass(frozen=True)
class Cancelled(Transition):
    """Cancelled by its user or an operator; its worker loses it."""

    guard = UNFINISHED

    def change(self, run: State, now: datetime, rules: Rules) -> StateChange:
        result = Result.CANCELLED if run.status == Status.PROCESSING else None
        return StateChange(_end(Status.CANCELLED), result, EventType.CANCELLED)


@dataclass(frozen=True)
class Merged(Transition):
    """Another run answers its message too."""

    guard = QUEUED
    into: str

    def change(self, run: State, now: datetime, rules: Rules) -> StateChange:
        columns = {**_end(Status.CANCELLED), "merged_into_id": self.into}
        return StateChange(columns, event=EventType.CANCELLED)


@dataclass(frozen=True)
class Expired(Transition):
    guard = OVERDUE

    def change(self, run: State, now: datetime, rules: Rules) -> StateChange:
        result = Result.FAILED if run.status == Status.PROCESSING else None
        return StateChange(_end(Status.FAILED), result, EventType.FAILED)


@dataclass(frozen=True)
class Retried(Transition):
    """Restarted after it has ended, with as much time to its deadline as before."""

    guard = RETRIABLE

    def change(self, run: State, now: datetime, rules: Rules) -> StateChange:
        columns = {**_restart(run), "retries": run.retries + 1, "retried_at": NOW}
        if run.deadline_at:
            allowed = run.deadline_at - (run.retried_at or run.created_at)
            columns["deadline_at"] = NOW + allowed
        return StateChange(columns, event=EventType.REQUESTED)


@dataclass(frozen=True)
class Deferred(Transition):
    """Made due later, as an earlier run of its thread is retried: a claim under way gives up."""

    guard = QUEUED

    def change(self, run: State, now: datetime, rules: Rules) -> StateChange:
        return StateChange({"due_at": NOW + DEFERRAL, "dispatched_at": None})


@dataclass(frozen=True)
class Requeued(Transition):
    """Restarted before it has ended, even if a worker holds it; its request is published again."""

    guard = UNFINISHED

    def change(self, run: State, now: datetime, rules: Rules) -> StateChange:
        return StateChange(
            _restart(run), Result.REQUEUED if run.status == Status.PROCESSING else None
        )
