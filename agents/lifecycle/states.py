"""The life of a run: which states it can be in, what may happen to it in each, and what becomes of it.

    queued -> processing -> completed | failed | cancelled

and back to `queued` when an attempt failed in a way that another may mend, when its worker gives it
back, when an operator takes it from its worker, or when somebody asks for it again after it failed or
was cancelled.

No database and no clock: an event has a `guard`, which tells of which states it may come, and a
`change`, which tells what it makes of one. agents.runs.execution writes each as one conditional
UPDATE with the
guard as its WHERE, so whoever is late changes nothing; tests/agents/test_lifecycle.py tries them in
every order, and tests/agents/test_conformance.py whether the database does as is said here.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from agents.lifecycle.conditions import NEVER, NOW, Column, Condition, Is, Moment


class Status(StrEnum):
    QUEUED = "queued"
    PROCESSING = "processing"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Result(StrEnum):
    """What became of an attempt."""

    COMPLETED = "completed"
    FAILED = "failed"
    RETRIED = "retried"  # failed in a way that another attempt may mend
    LOST = "lost"  # its worker let the lease lapse
    RETURNED = "returned"  # its worker was told to stop; counts for nothing
    CANCELLED = "cancelled"
    REQUEUED = "requeued"  # taken from its worker by an operator


class Told(StrEnum):
    """The events that others are told."""

    REQUESTED = "agent.run.requested"
    COMPLETED = "agent.run.completed"
    FAILED = "agent.run.failed"
    CANCELLED = "agent.run.cancelled"


OPEN = (Status.QUEUED, Status.PROCESSING)
ENDED = (Status.COMPLETED, Status.FAILED, Status.CANCELLED)

BACKOFF = timedelta(seconds=1)
MAX_BACKOFF = timedelta(seconds=60)
# What an attempt is given that begins late, because nobody could work for a while.
LATE_ATTEMPT = timedelta(seconds=30)
# What waits by one clock for a time of another may come a little early.
CLOCK_SLACK = timedelta(seconds=0.05)
# A worker ends its overdue run itself, at the next token; one that is stuck does not.
OVERDUE_PATIENCE = timedelta(seconds=1)
# A run that was handed over and not claimed for this long is handed over again.
HANDOVER_PATIENCE = timedelta(seconds=15)
# For how long those after a run that is asked for again are held back.
HOLD_BACK = timedelta(seconds=1)


@dataclass(frozen=True)
class Rules:
    """What an operator sets."""

    max_attempts: int = 5
    lease: timedelta = timedelta(seconds=10)
    # From the start of the first attempt, for all attempts.
    time: timedelta = timedelta(seconds=600)


@dataclass(frozen=True)
class State:
    """Of one run, in the columns of `agents.models.Run`."""

    created_at: datetime
    position: int = 0
    status: Status = Status.QUEUED
    # Grows with every claim. Whoever writes an outcome must name the number that it claimed with.
    attempt: int = 0
    # The number that the present budget of attempts counts from.
    attempt_base: int = 0
    retries: int = 0
    retried_at: datetime | None = None
    started_at: datetime | None = None
    lease_expires_at: datetime | None = None
    due_at: datetime | None = None
    handed_at: datetime | None = None
    deadline_at: datetime | None = None
    merged_into_id: str | None = None

    @property
    def attempts_spent(self) -> int:
        """Of the present budget."""
        return self.attempt - self.attempt_base

    def after(self, change: "Change", now: datetime) -> "State":
        """What a keeper of records whose clock says `now` makes of it."""
        columns: dict[str, Any] = {
            name: now + value.delay if isinstance(value, Moment) else value
            for name, value in change.columns.items()
        }
        return replace(self, **columns)


@dataclass(frozen=True)
class Change:
    """What an event makes of a run: columns with their new values, times as `Moment`. `ended`: what is
    recorded of the attempt that the run was in. `told`: the event that is written with it."""

    columns: Mapping[str, Any] = field(default_factory=dict)
    ended: Result | None = None
    told: Told | None = None


# As the partial indexes say it; a constraint ties it to the status.
UNFINISHED = Is("due_at", "isnull", False)
QUEUED = Is("status", "exact", Status.QUEUED)
PROCESSING = Is("status", "exact", Status.PROCESSING)
LAPSED = Is("lease_expires_at", "lt", NOW)
# A worker has it, as far as anybody knows.
HELD = Is("lease_expires_at", "gte", NOW)
# Due ones that wait, and ones whose worker let the lease lapse.
CLAIMABLE = (
    (QUEUED | (PROCESSING & LAPSED))
    & (Is("deadline_at", "isnull", True) | Is("deadline_at", "gt", NOW))
    & Is("due_at", "lte", NOW)
)
# Those that should have ended by now and that no worker will end.
OVERDUE = (
    UNFINISHED
    & (QUEUED | LAPSED | Is("deadline_at", "lte", NOW - OVERDUE_PATIENCE))
    & Is("deadline_at", "lte", NOW)
)
# No worker was told of it, or not since the last one was lost.
UNTOLD = Is("handed_at", "isnull", True) | Is("handed_at", "lt", Column("lease_expires_at"))
# Of what is claimable: untold, or told so long ago that the hand-over must be lost.
OVERLOOKED = UNTOLD | Is("handed_at", "lt", NOW - HANDOVER_PATIENCE)
# Nobody has begun it, so its question may still be put in other words.
UNBEGUN = QUEUED & Is("attempt", "exact", 0)
# A completed run is answered for good; a merged one is answered by another.
RETRIABLE = Is("status", "in", (Status.FAILED, Status.CANCELLED)) & Is(
    "merged_into_id", "isnull", True
)
# These three together never come back to what they were.
VERSION = ("status", "attempt", "retries")
# What stays as it is while those do.
FIXED = (*VERSION, "deadline_at")


def claim_guard(run: State) -> Condition:
    """What is left to ask of a run that was just read, if nobody has changed it since."""
    return CLAIMABLE.given(run, FIXED)


def in_turn(run: State, others: Iterable[State], now: datetime) -> bool:
    """Whether the other runs of its thread leave it the turn: none before it is unfinished. A later one
    is being worked on only where this one was asked for again."""
    return not any(
        UNFINISHED.holds(other, now) if other.position < run.position else HELD.holds(other, now)
        for other in others
        if other.position != run.position
    )


def used_up(run: State, rules: Rules) -> bool:
    """An attempt beyond the budget calls no model: its worker was lost each time, and may have been
    lost by what it carried out."""
    return run.attempts_spent > rules.max_attempts


def time_to_deadline(run: State, now: datetime) -> timedelta:
    """What is left of the time that whoever asked gave it."""
    return run.deadline_at - now if run.deadline_at else timedelta.max


def time_left(run: State, now: datetime, rules: Rules) -> timedelta:
    """For the present attempt. One that begins late gets a little all the same; but nothing goes on
    after the time that whoever asked gave it."""
    spent = now - (run.started_at or now)
    own = max(rules.time - spent, min(rules.time, LATE_ATTEMPT))
    return min(own, time_to_deadline(run, now))


def out_of_time(run: State, now: datetime) -> bool:
    return time_to_deadline(run, now) < CLOCK_SLACK


def backoff(attempt: int, luck: float) -> timedelta:
    """Full jitter, with a `luck` from 0 to 1: who failed together does not come back together."""
    return luck * min(MAX_BACKOFF, BACKOFF * 2 ** min(attempt, 16))


def _over(status: Status) -> dict[str, Any]:
    return {"status": status, "due_at": None, "lease_expires_at": None}


def _anew(run: State) -> dict[str, Any]:
    """Due now, with all attempts and all the time to go."""
    return {
        "status": Status.QUEUED,
        "lease_expires_at": None,
        "due_at": NOW,
        "handed_at": None,
        "started_at": None,
        "attempt_base": run.attempt,
    }


class Event:
    """Something that happens to a run."""

    guard: Condition = NEVER

    def change(self, run: State, now: datetime, rules: Rules) -> Change:
        raise NotImplementedError


@dataclass(frozen=True)
class Claimed(Event):
    """A worker takes it. `in_turn()` has a say too."""

    guard = CLAIMABLE

    def change(self, run: State, now: datetime, rules: Rules) -> Change:
        columns = {
            "status": Status.PROCESSING,
            "attempt": run.attempt + 1,
            "lease_expires_at": NOW + rules.lease,
            "started_at": run.started_at or NOW,
        }
        return Change(columns, ended=Result.LOST if run.status == Status.PROCESSING else None)


@dataclass(frozen=True)
class OfAttempt(Event):
    """What its worker says of it: counts while the claim stands."""

    attempt: int

    @property
    def guard(self) -> Condition:  # type: ignore[override]
        return PROCESSING & Is("attempt", "exact", self.attempt)


@dataclass(frozen=True)
class Beaten(OfAttempt):
    """Its worker still has it."""

    def change(self, run: State, now: datetime, rules: Rules) -> Change:
        return Change({"lease_expires_at": NOW + rules.lease})


@dataclass(frozen=True)
class Answered(OfAttempt):
    def change(self, run: State, now: datetime, rules: Rules) -> Change:
        return Change(_over(Status.COMPLETED), Result.COMPLETED, Told.COMPLETED)


@dataclass(frozen=True)
class Failed(OfAttempt):
    """`permanent`: another try cannot succeed. `retry_after`: what the model asked for. `luck`: see
    `backoff()`."""

    permanent: bool
    retry_after: timedelta = timedelta()
    luck: float = 1.0

    def change(self, run: State, now: datetime, rules: Rules) -> Change:
        pause = max(self.retry_after, backoff(run.attempts_spent, self.luck))
        if (
            self.permanent
            or out_of_time(run, now)
            or run.attempts_spent >= rules.max_attempts
            or pause >= time_left(run, now, rules)
        ):
            return Change(_over(Status.FAILED), Result.FAILED, Told.FAILED)
        columns = {
            "status": Status.QUEUED,
            "due_at": NOW + pause,
            "handed_at": None,
            "lease_expires_at": None,
        }
        return Change(columns, Result.RETRIED)


@dataclass(frozen=True)
class GivenBack(OfAttempt):
    """Its worker has to stop: it was no attempt that counts."""

    def change(self, run: State, now: datetime, rules: Rules) -> Change:
        columns = {
            "status": Status.QUEUED,
            "handed_at": None,
            "lease_expires_at": None,
            "attempt_base": run.attempt_base + 1,
        }
        return Change(columns, Result.RETURNED)


@dataclass(frozen=True)
class Cancelled(Event):
    """By whoever asked, or an operator, over the head of its worker."""

    guard = UNFINISHED

    def change(self, run: State, now: datetime, rules: Rules) -> Change:
        result = Result.CANCELLED if run.status == Status.PROCESSING else None
        return Change(_over(Status.CANCELLED), result, Told.CANCELLED)


@dataclass(frozen=True)
class Merged(Event):
    """Another run answers its question too."""

    guard = QUEUED
    into: str

    def change(self, run: State, now: datetime, rules: Rules) -> Change:
        columns = {**_over(Status.CANCELLED), "merged_into_id": self.into}
        return Change(columns, told=Told.CANCELLED)


@dataclass(frozen=True)
class Expired(Event):
    guard = OVERDUE

    def change(self, run: State, now: datetime, rules: Rules) -> Change:
        result = Result.FAILED if run.status == Status.PROCESSING else None
        return Change(_over(Status.FAILED), result, Told.FAILED)


@dataclass(frozen=True)
class AskedAgain(Event):
    """Begun anew after it has ended, with as much time as it was given before."""

    guard = RETRIABLE

    def change(self, run: State, now: datetime, rules: Rules) -> Change:
        columns = {**_anew(run), "retries": run.retries + 1, "retried_at": NOW}
        if run.deadline_at:
            given = run.deadline_at - (run.retried_at or run.created_at)
            columns["deadline_at"] = NOW + given
        return Change(columns, told=Told.REQUESTED)


@dataclass(frozen=True)
class HeldBack(Event):
    """One before it is asked for again: a claim that is under way finds that this is not due."""

    guard = QUEUED

    def change(self, run: State, now: datetime, rules: Rules) -> Change:
        return Change({"due_at": NOW + HOLD_BACK, "handed_at": None})


@dataclass(frozen=True)
class Requeued(Event):
    """Begun anew before it has ended, whoever holds it. Its first request is told again."""

    guard = UNFINISHED

    def change(self, run: State, now: datetime, rules: Rules) -> Change:
        return Change(_anew(run), Result.REQUEUED if run.status == Status.PROCESSING else None)


class Refused(Exception):
    """Nothing of the kind may happen to a run in that state."""


def decide(
    run: State,
    event: Event,
    now: datetime,
    rules: Rules = Rules(),
    others: Iterable[State] = (),
) -> Change:
    """What becomes of a run, beside the `others` of its thread. Raises `Refused`."""
    if not event.guard.holds(run, now):
        raise Refused
    if isinstance(event, Claimed) and not in_turn(run, others, now):
        raise Refused
    return event.change(run, now, rules)
