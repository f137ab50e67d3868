"""The wait between an attempt that failed and the next one, for streams, the API and the chat page."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from agents.lifecycle import states
from agents.models import Attempt, Run
from agents.runs import leases

EVENT = "run.retrying"


@dataclass(frozen=True)
class PendingRetry:
    """The last attempt of a run failed, and another one follows."""

    attempt: int  # that failed, as in the ids of its events
    attempts: int  # of the budget that are spent
    max_attempts: int
    next_at: datetime
    error: str  # safe to show
    code: str

    @classmethod
    def of(cls, run: Run, at: datetime, error: str, code: str) -> "PendingRetry":
        limit = leases.rules().max_attempts
        return cls(run.attempt, run.attempts_spent, limit, at, error, code)

    def as_event(self) -> dict[str, Any]:
        """Return the data of `run.retrying`."""
        return {
            "status": Run.Status.QUEUED.value,
            "attempt": self.attempt,
            "attempts": self.attempts,
            "maxAttempts": self.max_attempts,
            "nextAttemptAt": self.next_at.astimezone(UTC).isoformat().replace("+00:00", "Z"),
            "error": self.error,
            "errorCode": self.code,
        }


def pending_retry(run: Run) -> PendingRetry | None:
    """Return the retry that a run waits for. A query, for a run that is queued after an attempt."""
    if run.status != states.Status.QUEUED or not run.attempts_spent or run.due_at is None:
        return None
    last = Attempt.objects.filter(run=run, number=run.attempt).first()
    if last is None or last.result != Attempt.Result.RETRIED:
        return None
    return PendingRetry.of(run, run.due_at, last.error, last.error_code)
