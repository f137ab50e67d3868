"""Execute one run: claim it, carry out its command, and record its outcome (agents.runs.outcomes).

The claim and every later change is one conditional UPDATE with the guard of its transition
(agents/lifecycle/states.py), so a late writer changes nothing; nor does a writer of a run that was
deleted meanwhile. The order in which rows are locked is in docs/explanation/reliability.md.
"""

import logging
import time
from contextlib import suppress
from functools import partial

from django.db import transaction
from django.utils import timezone

from agents.events import publisher
from agents.lifecycle import states
from agents.lifecycle.sql import as_columns
from agents.llm import completions, loop
from agents.models import (
    Run,
)
from agents.runs import actions, commands, fairness, leases, outcomes
from agents.usage import limits
from lib import db
from lib.db import TRANSIENT_ERRORS

logger = logging.getLogger(__name__)


def execute(run_id: str) -> str | None:
    """Execute a run if this worker can claim it. Return the id of its thread when a summary is due.

    It cannot if another worker has it, it has ended or is not due, an earlier run of its thread is
    unfinished, or its user has no free slot. The run of a deactivated account is cancelled.
    """
    run = _unfinished(run_id)
    if run is None:
        return None
    if run.is_of_deactivated_account:
        logger.info("Run %s was not started: the account of its user is deactivated", run.pk)
        actions.cancel(run)
        return None
    with fairness.slot_limiter.acquire(run.requester) as free:
        if not free:
            _leave_to_dispatch(run)
            return None
        if not _claim(run):
            return None
        with (
            outcomes.log_context(run),
            leases.heartbeat().hold(run) as lease,
            publisher.current().feed(run.pk, run.attempt, stop=lease.revoke) as feed,
        ):
            return run.thread_id if _attempt(run, lease, feed) else None


def claim(run_id: str) -> Run | None:
    """Claim a run for this worker; None when it cannot be claimed."""
    run = _unfinished(run_id)
    return run if run and _claim(run) else None


def _unfinished(run_id: str) -> Run | None:
    rows = Run.objects.select_related("thread").filter(pk=run_id).with_account_state()
    run = next(iter(rows.with_database_time()), None)
    return None if run is None or run.is_finished else run


@db.retry_on_conflict
def _claim(run: Run) -> bool:
    change = outcomes.transition(run, states.Claimed())
    worker, now = leases.worker_name(), timezone.now()
    with transaction.atomic():
        claimed = Run.objects.claimable_unchanged(run).update(
            worker=worker, claimed_at=now, updated_at=now, **as_columns(change)
        )
        if claimed:
            outcomes.end_attempt(run, change.result, code="worker_lost")
    if not claimed:
        return False
    run.attempt = change.columns["attempt"]
    run.worker, run.claimed_at, run.started_at = worker, now, run.started_at or run.clock()
    return True


def _leave_to_dispatch(run: Run) -> None:
    """Put a run back to be dispatched in turn: its user has all the slots that one user may have."""
    with transaction.atomic():
        Run.objects.unchanged(run).update(dispatched_at=None)
    fairness.backlog.set()


def _attempt(run: Run, lease: leases.Lease, feed: publisher.RunFeed) -> bool:
    budget = limits.BudgetReservation(run.requester, run.place)
    transcript = loop.Transcript(watcher=feed, budget=budget)
    try:
        if states.attempts_exhausted(run.state, leases.rules()):
            raise completions.LLMError(
                "The server could not carry out this run: its worker was lost each time.",
                code="workers_lost",
                permanent=True,
            )
        options = completions.CallOptions(
            deadline=_deadline(run),
            stopped=lease.is_revoked,
            still_held=partial(_check_held, run),
            text=feed.text,
            on_cancel=lease.on_cancel,
            budget=budget,
        )
        answer = commands.execute(run, options=options, transcript=transcript)
        feed.finish()
        return outcomes.with_database_retry(
            partial(outcomes.complete, run, completions.storable(answer), transcript)
        )
    except completions.Stopped:
        logger.info("Run stopped: this worker no longer holds it")
        outcomes.with_database_retry(partial(outcomes.record_partial, run, transcript))
        return False
    except completions.LLMError as error:
        feed.finish()
        outcomes.with_database_retry(
            partial(outcomes.fail_or_retry, run, error, transcript, feed.publish)
        )
        return False
    except TRANSIENT_ERRORS:
        raise  # the lease lapses, and another attempt follows when the database is back
    except Exception as error:
        # A defect of ours: the run still gets an outcome, and the traceback goes to the log.
        logger.exception("Run failed unexpectedly")
        unexpected = completions.LLMError(
            "Something went wrong in the server.", code="internal", permanent=True
        )
        unexpected.__cause__ = error
        # Without the steps: they may be what the database refused.
        outcomes.with_database_retry(
            partial(outcomes.fail_or_retry, run, unexpected, loop.Transcript(budget=budget))
        )
        return False
    finally:
        # In case another worker has the run, or another process has ended it.
        with suppress(*TRANSIENT_ERRORS):
            budget.settle()


def release_runs() -> int:
    """Release the runs of this process, which has to stop: another worker may claim them at once.
    Return their number. Raises `lib.db.TRANSIENT_ERRORS`."""
    released = 0
    for run in Run.objects.held_by(leases.worker_name()):
        with transaction.atomic():
            change = outcomes.transition(run, states.Released(run.attempt))
            if outcomes.update_if_held(run, change):
                outcomes.end_attempt(run, change.result)
                released += 1
    leases.heartbeat().revoke_all()
    return released


def _check_held(run: Run) -> None:
    """Raise `Stopped` if the run was ended or taken from this worker; the lease reports it later."""
    try:
        held = Run.objects.filter(pk=run.pk).matching(states.AttemptTransition(run.attempt).guard)
        if not held.exists():
            raise completions.Stopped
    except TRANSIENT_ERRORS:
        logger.warning("Whether the run is still held is not known: the database is unavailable")
    finally:
        db.release_connection()


def _deadline(run: Run) -> float:
    """Return the end of the run's time, in `time.monotonic()`."""
    remaining = states.time_left(run.state, run.clock(), leases.rules())
    return time.monotonic() + remaining.total_seconds()
