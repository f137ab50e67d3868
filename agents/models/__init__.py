"""Records of runs, of what they cost and of their limits."""

from agents.models.attempts import Attempt, Step
from agents.models.events import Event, EventQuerySet
from agents.models.limits import Limit, Pace, Spending
from agents.models.runs import (
    CHAT_REPLY,
    CHAT_SUMMARIZE,
    OVERDUE,
    DeletedRun,
    IdempotencyKey,
    Run,
    RunQuerySet,
    new_run_id,
)
from agents.models.summaries import Summary
from agents.models.usage import FencedCount, Price, Rollup, RollupState, Usage, today
from agents.models.workers import WORKER_TIMEOUT, Worker

__all__ = [
    "CHAT_REPLY",
    "CHAT_SUMMARIZE",
    "OVERDUE",
    "WORKER_TIMEOUT",
    "Attempt",
    "DeletedRun",
    "Event",
    "EventQuerySet",
    "FencedCount",
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
