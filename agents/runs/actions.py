"""Actions on a run from outside its worker: cancel, retry, requeue, merge and expire it.

Each is one conditional UPDATE with the guard of its transition (agents/lifecycle/states.py), so late
calls, and calls for deleted runs, have no effect. docs/explanation/reliability.md
has the order in which rows are locked.
"""

import logging
import uuid
from functools import partial
from typing import Any

from django.db import transaction
from django.utils import timezone

from agents.events import publisher
from agents.events.log import emit_event, republish
from agents.lifecycle import states
from agents.lifecycle.sql import as_columns, as_q
from agents.models import CHAT_REPLY, Event, Run
from agents.runs import outcomes
from chat.models import Message, Thread
from lib import db

logger = logging.getLogger(__name__)

OVERDUE_BATCH = 500


@db.retry_on_conflict
def cancel(run: Run) -> bool:
    """End an unfinished run. Its worker, if any, finds the lease revoked and stops; its outcome is
    discarded. Return False when the run had ended before, or was deleted."""
    while True:
        if not _reread(run) or run.is_finished:
            return False
        if _end(run, states.Cancelled()):
            return True


def _reread(run: Run) -> bool:
    """Return False when it was deleted meanwhile."""
    try:
        run.refresh_from_db()
    except Run.DoesNotExist:
        return False
    return True


def merge_queued(run: Run) -> None:
    """Have a new run answer the queued runs before it in its thread too, if they are of the same place,
    to which the answer goes, and of the same command. They end as cancelled and name the run that
    answers; a run that a worker has claimed goes on."""
    if run.command != CHAT_REPLY:
        return
    queued = Run.objects.unfinished().filter(
        as_q(states.Merged.guard),
        thread_id=run.thread_id,
        position__lt=run.position,
        command=run.command,
        source=run.source,
        place=run.place,
    )
    for earlier in queued.order_by("position"):
        _end(earlier, states.Merged(run.pk), payload={"mergedInto": run.pk})


def expire_overdue() -> int:
    """Fail the runs that are past their deadline, those without a worker too. Return their number."""
    overdue = Run.objects.overdue().order_by("deadline_at")
    return sum(_fail_overdue(run) for run in overdue[:OVERDUE_BATCH])


@db.retry_on_conflict
def _fail_overdue(run: Run) -> bool:
    error = outcomes.overdue()
    return _end(
        run,
        states.Expired(),
        payload={"error": str(error)},
        safe_error=str(error),
        error_code=error.code,
    )


def _end(
    run: Run,
    transition: states.Transition,
    *,
    payload: dict[str, Any] | None = None,
    **columns: Any,
) -> bool:
    """End a run, without its worker, if it is unchanged since it was read and the guard matches."""
    change = outcomes.transition(run, transition)
    status = Run.Status(change.columns["status"])
    with transaction.atomic():
        now = timezone.now()
        ended = Run.objects.unchanged(run).matching(transition.guard)
        if not ended.update(finished_at=now, updated_at=now, **as_columns(change), **columns):
            return False
        error, code = columns.get("safe_error", ""), columns.get("error_code", "")
        outcomes.end_attempt(run, change.result, error=error, code=code)
        emit_event(
            run,
            change.event,
            run.outcome_payload(**payload or {}),
            to_count=None if change.result else True,
        )
        transaction.on_commit(partial(publisher.stop, run.pk), robust=True)
    with outcomes.log_context(run):
        outcomes.log_outcome(run, status, error_code=code)
    return True


@db.retry_on_conflict
def retry(run: Run) -> bool:
    """Restart a run that failed or was cancelled: now, with a full budget of attempts and time. Return
    False when it is in no such state (so one of two concurrent calls returns True), or when it or its
    message was deleted.

    It keeps its place in the thread. Later runs that were answered stay answered; queued ones wait for
    it to end again. A new `agent.run.requested` is emitted, and the next outcome names it.
    """
    if not _reread(run) or not run.may_be_retried:
        return False
    with transaction.atomic():
        # It changes other runs of the thread as well.
        db.lock(Thread.objects.filter(pk=run.thread_id))
        if Message.objects.filter(run=run.pk).exclude(redacted_at=None).exists():
            return False
        ended = Run.objects.unchanged(run).matching(states.Retried.guard)
        if not ended.update(
            request_event_id=uuid.uuid4(),
            safe_error="",
            error_code="",
            finish_reason="",
            finished_at=None,
            updated_at=timezone.now(),
            **as_columns(outcomes.transition(run, states.Retried())),
        ):
            return False
        _defer_later(run)
        run.refresh_from_db()
        emit_event(run, states.EventType.REQUESTED, run.request_payload(run.message.content))
    logger.info("Run %s is retried", run.pk)
    return True


@db.retry_on_conflict
def requeue(run: Run) -> bool:
    """Restart an unfinished run at once. Its worker, if any, loses it, and its outcome is discarded.
    Return False when the run has ended, was changed just now, or was deleted."""
    if not _reread(run) or run.is_finished:
        return False
    change = outcomes.transition(run, states.Requeued())
    with transaction.atomic():
        unfinished = Run.objects.unchanged(run).matching(states.Requeued.guard)
        if not unfinished.update(updated_at=timezone.now(), **as_columns(change)):
            return False
        outcomes.end_attempt(run, change.result)
        republish(Event.objects.filter(pk=run.request_event_id))
    logger.info("Run %s is requeued", run.pk)
    return True


def _defer_later(run: Run) -> None:
    """Prevent later runs of the thread from starting concurrently. A claim in progress may not see
    this one unfinished; PostgreSQL makes it check its own row again, which is not due any more.
    (A claim that was first has committed before this returns, and the claim of `run` sees it.)
    """
    deferred = states.Deferred()
    later = Run.objects.filter(thread_id=run.thread_id, position__gt=run.position)
    queued = db.in_order(later.matching(deferred.guard), "position")
    queued.update(**as_columns(outcomes.transition(run, deferred)))
