"""Records of runs, of what they cost and of their limits."""

from agents.models.limits import Limit, Pace, Spending
from agents.models.runs import (
    CHAT_REPLY,
    OVERDUE,
    WORKER_PATIENCE,
    Attempt,
    DeletedRun,
    Event,
    EventQuerySet,
    IdempotencyKey,
    Run,
    RunQuerySet,
    Step,
    Summary,
    Worker,
    new_run_id,
)
from agents.models.usage import Price, Rollup, RollupState, Usage, today

__all__ = [
    "CHAT_REPLY",
    "OVERDUE",
    "WORKER_PATIENCE",
    "Attempt",
    "DeletedRun",
    "Event",
    "EventQuerySet",
    "IdempotencyKey",
    "Limit",
    "Pace",
    "Price",
    "Rollup",
    "RollupState",
    "Run",
    "RunQuerySet",
    "Spending",
    "Step",
    "Summary",
    "Usage",
    "Worker",
    "new_run_id",
    "today",
]
