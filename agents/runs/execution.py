"""Carry out one run: claim it, carry out its command, have its outcome recorded
(agents.runs.outcomes). And what others do to a run: cancel it, retry it, put it back.

What may become of a run is told by agents/lifecycle/states.py. Every change here is one conditional
UPDATE
that names the state it comes from, so whoever is late changes nothing; of a run that was deleted
meanwhile, too. The order in which rows are locked is in docs/explanation/reliability.md.
"""

import logging
import time
import uuid
from contextlib import AbstractContextManager, suppress
from functools import partial
from typing import Any

from django.db import transaction
from django.utils import timezone

from agents.events import publisher, stream
from agents.lifecycle import states
from agents.lifecycle.sql import as_columns, as_q
from agents.llm import completions, loop
from agents.models import (
    CHAT_REPLY,
    Event,
    EventQuerySet,
    Run,
)
from agents.runs import commands, fairness, leases, outcomes
from agents.usage import limits
from chat.models import Thread
from lib import db
from lib.db import TRANSIENT_ERRORS
from lib.tracing import tagged

logger = logging.getLogger(__name__)

OVERDUE_BATCH = 500


def execute(run_id: str) -> str | None:
    """Carry out a run if it may be claimed; otherwise it is somebody else's, or done, or not due,
    and nothing happens. The id of its thread when the thread's summary is due."""
    run = _unfinished(run_id)
    if run is None:
        return None
    if run.is_of_deactivated:
        logger.info("Run %s was not begun: the account of its asker is deactivated", run.pk)
        cancel(run)
        return None
    with fairness.seats.one(run.asker) as free:
        if not free:
            _leave(run)
            return None
        if not _claim(run):
            return None
        with (
            _tagged(run),
            leases.heartbeat().hold(run) as lease,
            publisher.current().feed(run.pk, run.attempt, stop=lease.lose) as feed,
        ):
            return run.thread_id if _attempt(run, lease, feed) else None


def _tagged(run: Run) -> AbstractContextManager[None]:
    return tagged(
        run=run.pk,
        thread=run.thread_id,
        request_id=run.request_id,
        correlation_id=run.correlation_id,
        attempt=run.attempt,
        model=run.model,
        source=run.source,
    )


def claim(run_id: str) -> Run | None:
    """Take a run for this worker, or None when it is not to be had."""
    run = _unfinished(run_id)
    return run if run and _claim(run) else None


def _unfinished(run_id: str) -> Run | None:
    found = Run.objects.select_related("thread").filter(pk=run_id).with_deactivation()
    run = next(iter(found.clocked()), None)
    return None if run is None or run.is_finished else run


@db.retry_on_conflict
def _claim(run: Run) -> bool:
    change = outcomes.change_of(run, states.Claimed())
    worker, now = leases.worker_name(), timezone.now()
    with transaction.atomic():
        taken = Run.objects.claimable_as_read(run).update(
            worker=worker, claimed_at=now, updated_at=now, **as_columns(change)
        )
        if taken:
            outcomes.end_attempt(run, change.ended, code="worker_lost")
    if not taken:
        return False
    run.attempt = change.columns["attempt"]
    run.worker, run.claimed_at, run.started_at = worker, now, run.started_at or run.clock()
    return True


def _leave(run: Run) -> None:
    """Have it wait for its turn: its asker has as many slots here as may be."""
    with transaction.atomic():
        Run.objects.as_read(run).update(handed_at=None)
    fairness.left.set()


def _attempt(run: Run, lease: leases.Lease, feed: publisher.RunFeed) -> bool:
    purse = limits.Purse(run.asker, run.place)
    transcript = loop.Transcript(watcher=feed, purse=purse)
    try:
        if states.used_up(run.state, leases.rules()):
            raise completions.LLMError(
                "The server could not carry out this run: its worker was lost each time.",
                code="workers_lost",
                permanent=True,
            )
        control = completions.Control(
            deadline=_deadline(run),
            stopped=lease.lost,
            text=feed.text,
            cutting=lease.cutting,
            purse=purse,
        )
        answer = commands.carry_out(run, control=control, transcript=transcript)
        feed.finish()
        return outcomes.persist(
            partial(outcomes.complete, run, completions.storable(answer), transcript)
        )
    except completions.Stopped:
        logger.info("Run given up: it is no longer held by this worker")
        outcomes.persist(partial(outcomes.keep_partial, run, transcript))
        return False
    except completions.LLMError as error:
        feed.finish()
        outcomes.persist(partial(outcomes.fail_or_retry, run, error, transcript))
        return False
    except TRANSIENT_ERRORS:
        raise  # the lease lapses, and another attempt finds the database back
    except Exception as error:
        # A defect of ours: the run still gets an outcome, and the traceback goes to the log.
        logger.exception("Run failed unexpectedly")
        unexpected = completions.LLMError(
            "Something went wrong in the server.", code="internal", permanent=True
        )
        unexpected.__cause__ = error
        # Without the steps: they may be what the database refused.
        outcomes.persist(
            partial(outcomes.fail_or_retry, run, unexpected, loop.Transcript(purse=purse))
        )
        return False
    finally:
        # Where somebody else has the run, or has ended it.
        with suppress(*TRANSIENT_ERRORS):
            purse.settle()


def hand_back() -> int:
    """Put the runs that this process carries out back into the queue: it has to stop, and another
    worker may take them at once. How many. Raises `lib.db.TRANSIENT_ERRORS`."""
    returned = 0
    for run in Run.objects.held_by(leases.worker_name()):
        with transaction.atomic():
            change = outcomes.change_of(run, states.GivenBack(run.attempt))
            if outcomes.fenced(run, change):
                outcomes.end_attempt(run, change.ended)
                returned += 1
    leases.heartbeat().lose_all()
    return returned


def _deadline(run: Run) -> float:
    """When the run has had its time, in `time.monotonic()`."""
    left = states.time_left(run.state, run.clock(), leases.rules())
    return time.monotonic() + left.total_seconds()


@db.retry_on_conflict
def cancel(run: Run) -> bool:
    """End a run that has not ended. Its worker, if it has one, finds the lease gone and gives up;
    what it brings back is refused. False when the run had ended before, or is gone."""
    while True:
        if not _reread(run) or run.is_finished:
            return False
        if _end(run, states.Cancelled()):
            return True


def _reread(run: Run) -> bool:
    """False when it was deleted meanwhile."""
    try:
        run.refresh_from_db()
    except Run.DoesNotExist:
        return False
    return True


def merge_waiting(run: Run) -> None:
    """Have a run that was just asked for answer what waits before it too: those that no worker has at
    present, and that were asked where it was. (The answer goes to one place; what another command
    does is not done by this one.) They end as cancelled, which names the run that answers; a claim
    that was first is left alone."""
    if run.command != CHAT_REPLY:
        return
    waiting = Run.objects.unfinished().filter(
        as_q(states.Merged.guard),
        thread_id=run.thread_id,
        position__lt=run.position,
        command=run.command,
        source=run.source,
        place=run.place,
    )
    for each in waiting.order_by("position"):
        _end(each, states.Merged(run.pk), payload={"mergedInto": run.pk})


def end_overdue() -> int:
    """End the runs whose deadline has passed, those included that no worker can be had for. How
    many."""
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
    event: states.Event,
    *,
    payload: dict[str, Any] | None = None,
    **columns: Any,
) -> bool:
    """End a run over the head of its worker, if it is as it was read and the event may still come."""
    change = outcomes.change_of(run, event)
    status = Run.Status(change.columns["status"])
    with transaction.atomic():
        now = timezone.now()
        ended = Run.objects.as_read(run).that(event.guard)
        if not ended.update(finished_at=now, updated_at=now, **as_columns(change), **columns):
            return False
        error, code = columns.get("safe_error", ""), columns.get("error_code", "")
        outcomes.end_attempt(run, change.ended, error=error, code=code)
        outcomes.announce(run, change.told, payload or {}, to_count=None if change.ended else True)
        transaction.on_commit(partial(publisher.stop, run.pk), robust=True)
    with _tagged(run):
        outcomes.tell(run, status, error_code=code)
    return True


@db.retry_on_conflict
def retry(run: Run) -> bool:
    """Begin a run anew that failed or was cancelled: now, with a fresh budget of attempts and time.
    False when it is in no such state (any more), so of two who ask at once one is told True, or when
    it is gone.

    It keeps its place in the thread. Later questions that were answered stay answered; those that
    wait go on waiting until it has ended again. It is told as a new `agent.run.requested`, which the
    next outcome names.
    """
    if not _reread(run) or not run.may_be_retried:
        return False
    with transaction.atomic():
        # It changes other runs of the thread as well, which are its neighbours' too.
        db.lock(Thread.objects.filter(pk=run.thread_id))
        ended = Run.objects.as_read(run).that(states.AskedAgain.guard)
        if not ended.update(
            request_event_id=uuid.uuid4(),
            safe_error="",
            error_code="",
            finished_at=None,
            updated_at=timezone.now(),
            **as_columns(outcomes.change_of(run, states.AskedAgain())),
        ):
            return False
        _hold_back_later(run)
        run.refresh_from_db()
        _announce_request(run)
    logger.info("Run %s is asked for again", run.pk)
    return True


@db.retry_on_conflict
def requeue(run: Run) -> bool:
    """Have an unfinished run begun anew at once, whoever holds it: its worker, if it has one, loses
    the run, and what it brings back is refused. False when the run has ended, changed hands just now,
    or is gone."""
    if not _reread(run) or run.is_finished:
        return False
    change = outcomes.change_of(run, states.Requeued())
    with transaction.atomic():
        if (
            not Run.objects.as_read(run)
            .that(states.Requeued.guard)
            .update(updated_at=timezone.now(), **as_columns(change))
        ):
            return False
        outcomes.end_attempt(run, change.ended)
        tell_again(Event.objects.filter(pk=run.request_event_id))
    logger.info("Run %s is put into the queue again", run.pk)
    return True


def _hold_back_later(run: Run) -> None:
    """Let no later run of the thread begin beside this one. A claim that is under way has not seen
    this one unfinished; PostgreSQL makes it look at its own row again, finds that it is not due, and
    gives up. (One that was first has committed before this returns, and the claim of `run` sees it.)
    """
    event = states.HeldBack()
    later = Run.objects.filter(thread_id=run.thread_id, position__gt=run.position)
    held_back = db.in_order(later.that(event.guard), "position")
    held_back.update(**as_columns(outcomes.change_of(run, event)))


def _announce_request(run: Run) -> None:
    """Write the event that asks for a run, and add it to the stream after the commit."""
    event = Event.objects.create(
        id=run.request_event_id,
        type=Event.Type.REQUESTED,
        run=run,
        correlation_id=run.correlation_id,
        payload=run.request_payload(run.message.content),
    )
    transaction.on_commit(partial(stream.publish, [event.as_entry()]), robust=True)


@db.retry_on_conflict
def tell_again(events: EventQuerySet) -> int:
    """Add events to the stream once more; readers know them by their ids. How many."""
    entries = [event.as_entry() for event in events]
    # Until a worker has seen them there, the relay sees to it.
    db.in_order(events).update(published_at=None)
    transaction.on_commit(partial(stream.publish, entries), robust=True)
    return len(entries)
