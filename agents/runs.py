"""Carry out one run: claim it, carry out its command, record the outcome.

What may become of a run is told by agents/lifecycle.py. Every change here is one conditional UPDATE
that names the state it comes from, so whoever is late changes nothing.
"""

import logging
import random
import time
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from datetime import datetime, timedelta
from functools import partial
from typing import Any, cast

import structlog
from django.db import connection, transaction
from django.db.models.functions import Now
from django.utils import timezone

from agents import (
    audience,
    commands,
    leases,
    lifecycle,
    limits,
    live,
    llm,
    loop,
    memory,
    prices,
    shares,
    stream,
)
from agents.models import (
    CHAT_REPLY,
    OVERDUE,
    Attempt,
    Event,
    EventQuerySet,
    Run,
    Step,
)
from agents.statements import as_columns, as_q
from chat.models import Message
from realm.connections import AWAY
from realm.tracing import tagged

logger = logging.getLogger(__name__)
outcomes = structlog.get_logger(__name__)

OVERDUE_BATCH = 500
NOTHING = loop.Transcript()
# What an attempt's own worker writes of it, once.
RECORDED = (Attempt.Result.COMPLETED, Attempt.Result.FAILED, Attempt.Result.RETRIED)
# The answer is in memory and paid for: its transaction is tried again over this long.
RECORD_PATIENCE_SECONDS = 30.0


def execute(run_id: str) -> str | None:
    """Carry out a run if it may be claimed; otherwise it is somebody else's, or done, or not due,
    and nothing happens. The id of its thread when the thread's summary is due."""
    run = _unfinished(run_id)
    if run is None:
        return None
    with shares.seats.one(run.asker) as free:
        if not free:
            _leave(run)
            return None
        if not _claim(run):
            return None
        with (
            _tagged(run),
            leases.heartbeat().hold(run) as lease,
            live.desk().feed(run.pk, run.attempt, stop=lease.lose) as feed,
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
    run = next(iter(Run.objects.select_related("thread").filter(pk=run_id).clocked()), None)
    return None if run is None or run.is_finished else run


def _claim(run: Run) -> bool:
    change = _change(run, lifecycle.Claimed())
    worker, now = leases.worker_name(), timezone.now()
    with transaction.atomic():
        taken = Run.objects.claimable_as_read(run).update(
            worker=worker, claimed_at=now, updated_at=now, **as_columns(change)
        )
        if taken:
            _end_attempt(run, change.ended, code="worker_lost")
    if not taken:
        return False
    run.attempt = change.columns["attempt"]
    run.worker, run.claimed_at, run.started_at = worker, now, run.started_at or run.clock()
    return True


def _change(run: Run, event: lifecycle.Event) -> lifecycle.Change:
    return event.change(run.state, run.clock(), leases.rules())


def _leave(run: Run) -> None:
    """Have it wait for its turn: its asker has as many slots here as may be."""
    with transaction.atomic():
        Run.objects.as_read(run).update(handed_at=None)
    shares.left.set()


def _attempt(run: Run, lease: leases.Lease, feed: live.Feed) -> bool:
    purse = limits.Purse(run.asker, run.place)
    transcript = loop.Transcript(watcher=feed, purse=purse)
    try:
        if lifecycle.used_up(run.state, leases.rules()):
            raise llm.LLMError(
                "The server could not carry out this run: its worker was lost each time.",
                code="workers_lost",
                permanent=True,
            )
        control = llm.Control(
            deadline=_deadline(run),
            stopped=lease.lost,
            text=feed.text,
            cutting=lease.cutting,
            purse=purse,
        )
        answer = commands.carry_out(run, control=control, transcript=transcript)
        feed.finish()
        return _persist(partial(_complete, run, llm.storable(answer), transcript))
    except llm.Stopped:
        logger.info("Run given up: it is no longer held by this worker")
        _persist(partial(_keep_partial, run, transcript))
        return False
    except llm.LLMError as error:
        feed.finish()
        _persist(partial(_fail_or_retry, run, error, transcript))
        return False
    except AWAY:
        raise  # the lease lapses, and another attempt finds the database back
    except Exception as error:
        # A defect of ours: the run still gets an outcome, and the traceback goes to the log.
        logger.exception("Run failed unexpectedly")
        unexpected = llm.LLMError(
            "Something went wrong in the server.", code="internal", permanent=True
        )
        unexpected.__cause__ = error
        # Without the steps: they may be what the database refused.
        _persist(partial(_fail_or_retry, run, unexpected, loop.Transcript(purse=purse)))
        return False
    finally:
        # Where somebody else has the run, or has ended it.
        with suppress(*AWAY):
            purse.settle()


def hand_back() -> int:
    """Put the runs that this process carries out back into the queue: it has to stop, and another
    worker may take them at once. How many. Raises `realm.connections.AWAY`."""
    returned = 0
    for run in Run.objects.held_by(leases.worker_name()):
        with transaction.atomic():
            change = _change(run, lifecycle.GivenBack(run.attempt))
            if _fenced(run, change):
                _end_attempt(run, change.ended)
                returned += 1
    leases.heartbeat().lose_all()
    return returned


def _deadline(run: Run) -> float:
    """When the run has had its time, in `time.monotonic()`."""
    left = lifecycle.time_left(run.state, run.clock(), leases.rules())
    return time.monotonic() + left.total_seconds()


def _overdue() -> llm.LLMError:
    return llm.LLMError(
        "There was no answer in the time that was given for it.", code=OVERDUE, permanent=True
    )


def _persist(record: Callable[[], bool]) -> bool:
    """Carry out a transaction that must not be lost to a passing trouble of the database."""
    give_up = time.monotonic() + RECORD_PATIENCE_SECONDS
    pause = 0.1
    while True:
        try:
            return record()
        except AWAY as error:
            if time.monotonic() + pause > give_up or connection.in_atomic_block:
                raise
            logger.warning("The outcome was not recorded, trying again: %s", error)
            connection.close()
            time.sleep(pause)
            pause = min(pause * 2, 5)


def _complete(run: Run, answer: str, transcript: loop.Transcript) -> bool:
    message = Message(
        thread_id=run.thread_id,
        position=run.position + 1,
        role=Message.Role.ASSISTANT,
        content=answer,
        correlation_id=run.correlation_id,
    )
    with transaction.atomic():
        # First, as it locks the thread: whoever asks locks that before a run (agents.inbox).
        summary_due = memory.note_answer(run)
        won = _finish(
            run,
            _change(run, lifecycle.Answered(run.attempt)),
            transcript,
            payload={"output": answer},
            answer_id=message.pk,
        )
        if won:
            message.save(force_insert=True)
        else:
            transaction.set_rollback(True)
    if not won:
        _mark_fenced(run)  # which was rolled back with the rest
        return False
    _log_outcome(run, Run.Status.COMPLETED, transcript)
    return summary_due


def _fail_or_retry(run: Run, error: llm.LLMError, transcript: loop.Transcript) -> bool:
    if lifecycle.out_of_time(run.state, run.clock()):
        error = _overdue()
    failed = lifecycle.Failed(
        run.attempt,
        permanent=error.permanent,
        retry_after=timedelta(seconds=error.retry_after or 0),
        luck=random.random(),  # noqa: S311
    )
    change = _change(run, failed)
    if change.told is None:
        return _put_back(run, change, error, transcript)
    with transaction.atomic():
        won = _finish(
            run,
            change,
            transcript,
            payload={"error": str(error)},
            error=str(error),
            safe_error=str(error),
            error_code=error.code,
        )
    if not won:
        return _keep_partial(run, transcript)
    _log_outcome(run, Run.Status.FAILED, transcript, error_code=error.code)
    return False


def _put_back(
    run: Run, change: lifecycle.Change, error: llm.LLMError, transcript: loop.Transcript
) -> bool:
    """Put the run back; the sweep hands it over again when it is due."""
    with transaction.atomic():
        won = _fenced(run, change, **_spent(run, transcript))
        if won:
            _end_attempt(run, change.ended, transcript, str(error), error.code)
            transcript.settle()
    if won:
        pause = change.columns["due_at"].delay.total_seconds()
        logger.info("Run will be tried again in %.1f s: %s", pause, error)
    return False


def _finish(
    run: Run,
    change: lifecycle.Change,
    transcript: loop.Transcript,
    *,
    payload: dict[str, Any],
    error: str = "",
    **columns: Any,
) -> bool:
    """Write the outcome of an attempt, its event included. False when this worker lost the run."""
    columns |= {"finished_at": timezone.now(), **_spent(run, transcript)}
    if not _fenced(run, change, **columns):
        return False
    _end_attempt(run, change.ended, transcript, error, columns.get("error_code", ""))
    transcript.settle()
    announce(run, change.told, payload)
    return True


def _fenced(run: Run, change: lifecycle.Change, **columns: Any) -> bool:
    """Change the run if the claim still stands: the attempt's number is the fence."""
    claimed = Run.objects.filter(pk=run.pk).that(lifecycle.OfAttempt(run.attempt).guard)
    if claimed.update(updated_at=timezone.now(), **as_columns(change), **columns):
        return True
    if _mark_fenced(run):
        logger.warning("Outcome thrown away: this worker no longer holds the run (fenced)")
    return False


def _mark_fenced(run: Run) -> bool:
    attempt = Attempt.objects.filter(run=run.pk, number=run.attempt)
    # Its own outcome stands there where the database was lost just after it had been recorded.
    return bool(attempt.exclude(result__in=RECORDED).update(fenced_at=Now()))


def _spent(run: Run, transcript: loop.Transcript) -> dict[str, int | None]:
    """The tokens of all attempts: nobody else has changed them since this one was claimed."""
    usage = transcript.usage
    return {
        "prompt_tokens": run.prompt_tokens + usage.prompt_tokens,
        "completion_tokens": run.completion_tokens + usage.completion_tokens,
        "cost": prices.total([run.cost, *_costs(transcript)]),
    }


def _costs(transcript: loop.Transcript) -> list[int | None]:
    return [prices.cost(step.name, step.usage) for step in transcript.steps]


def _end_attempt(
    run: Run,
    result: lifecycle.Result | None,
    transcript: loop.Transcript = NOTHING,
    error: str = "",
    code: str = "",
) -> None:
    """Record the attempt that `run` stands in, with its steps; nothing where it stands in none."""
    if result is None:
        return
    Attempt.objects.create(
        run=run,
        number=run.attempt,
        worker=run.worker,
        result=Attempt.Result(result),
        error=error,
        error_code=code,
        started_at=cast("datetime", run.claimed_at),
        **_sums(transcript),
    )
    _keep_steps(run, transcript)


def _sums(transcript: loop.Transcript) -> dict[str, int | None]:
    """What the calls of an attempt come to, in the columns of `Attempt`."""
    return {
        "prompt_tokens": transcript.usage.prompt_tokens,
        "completion_tokens": transcript.usage.completion_tokens,
        "cost": prices.total(_costs(transcript)),
        "model_ms": sum(step.duration_ms for step in transcript.steps if step.kind == "model"),
    }


def _keep_steps(run: Run, transcript: loop.Transcript) -> None:
    Step.objects.bulk_create(
        Step(
            run=run,
            attempt=run.attempt,
            kind=step.kind,
            name=step.name,
            input=step.input,
            output=step.output,
            error=step.error,
            prompt_tokens=step.usage.prompt_tokens,
            cached_tokens=step.usage.cached_tokens,
            completion_tokens=step.usage.completion_tokens,
            cost=cost,
            duration_ms=step.duration_ms,
            started_at=step.started_at,
        )
        for step, cost in zip(transcript.steps, _costs(transcript), strict=True)
    )


def _keep_partial(run: Run, transcript: loop.Transcript) -> bool:
    """What an attempt had come to when somebody else ended its run: the text so far is its last
    step's output, and its tokens were paid for. Of a run that another worker has, nothing is kept."""
    with transaction.atomic():
        ended = Run.objects.filter(
            pk=run.pk,
            attempt=run.attempt,
            status__in=(Run.Status.CANCELLED, Run.Status.FAILED),
        )
        if not ended.update(updated_at=timezone.now()):
            return False
        if run.steps.filter(attempt=run.attempt).exists():
            return False  # it was recorded, and only the word of it was lost
        ended.update(**_spent(run, transcript))
        Attempt.objects.filter(run=run, number=run.attempt).update(**_sums(transcript))
        _keep_steps(run, transcript)
    return False


def announce(
    run: Run, told: lifecycle.Told | None, payload: dict[str, Any], *, to_count: bool | None = None
) -> None:
    """Write an event of a run, and add it to the stream after the commit. `to_count` for an outcome
    that no attempt is counted for."""
    if told is None:
        return
    event = Event.objects.create(
        run=run,
        type=Event.Type(told),
        correlation_id=run.correlation_id,
        to_count=to_count,
        to_deliver=audience.wanted(Event.Type(told)),
        payload={
            "requestEventId": str(run.request_event_id),
            "runId": run.pk,
            "threadId": run.thread_id,
            **payload,
        },
    )
    transaction.on_commit(partial(stream.publish, [event.as_entry()]), robust=True)


def cancel(run: Run) -> bool:
    """End a run that has not ended. Its worker, if it has one, finds the lease gone and gives up;
    what it brings back is refused. False when the run had ended before."""
    while True:
        run.refresh_from_db()
        if run.is_finished:
            return False
        if _end(run, lifecycle.Cancelled()):
            return True


def merge_waiting(run: Run) -> None:
    """Have a run that was just asked for answer what waits before it too: those that no worker has at
    present, and that were asked where it was. (The answer goes to one place; what another command
    does is not done by this one.) They end as cancelled, which names the run that answers; a claim
    that was first is left alone."""
    if run.command != CHAT_REPLY:
        return
    waiting = Run.objects.unfinished().filter(
        as_q(lifecycle.Merged.guard),
        thread_id=run.thread_id,
        position__lt=run.position,
        command=run.command,
        source=run.source,
        place=run.place,
    )
    for each in waiting.order_by("position"):
        _end(each, lifecycle.Merged(run.pk), payload={"mergedInto": run.pk})


def end_overdue() -> int:
    """End the runs whose deadline has passed, those included that no worker can be had for. How
    many."""
    overdue = Run.objects.overdue().order_by("deadline_at")
    return sum(_fail_overdue(run) for run in overdue[:OVERDUE_BATCH])


def _fail_overdue(run: Run) -> bool:
    error = _overdue()
    return _end(
        run,
        lifecycle.Expired(),
        payload={"error": str(error)},
        safe_error=str(error),
        error_code=error.code,
    )


def _end(
    run: Run,
    event: lifecycle.Event,
    *,
    payload: dict[str, Any] | None = None,
    **columns: Any,
) -> bool:
    """End a run over the head of its worker, if it is as it was read and the event may still come."""
    change = _change(run, event)
    status = Run.Status(change.columns["status"])
    with transaction.atomic():
        now = timezone.now()
        ended = Run.objects.as_read(run).that(event.guard)
        if not ended.update(finished_at=now, updated_at=now, **as_columns(change), **columns):
            return False
        error, code = columns.get("safe_error", ""), columns.get("error_code", "")
        _end_attempt(run, change.ended, error=error, code=code)
        announce(run, change.told, payload or {}, to_count=None if change.ended else True)
        transaction.on_commit(partial(live.stop, run.pk), robust=True)
    with _tagged(run):
        _log_outcome(run, status, error_code=code)
    return True


def retry(run: Run) -> bool:
    """Begin a run anew that failed or was cancelled: now, with a fresh budget of attempts and time.
    False when it is in no such state (any more), so of two who ask at once one is told True.

    It keeps its place in the thread. Later questions that were answered stay answered; those that
    wait go on waiting until it has ended again. It is told as a new `agent.run.requested`, which the
    next outcome names.
    """
    run.refresh_from_db()
    if not run.may_be_retried:
        return False
    with transaction.atomic():
        ended = Run.objects.as_read(run).that(lifecycle.AskedAgain.guard)
        if not ended.update(
            request_event_id=uuid.uuid4(),
            safe_error="",
            error_code="",
            finished_at=None,
            updated_at=timezone.now(),
            **as_columns(_change(run, lifecycle.AskedAgain())),
        ):
            return False
        _hold_back_later(run)
        run.refresh_from_db()
        _announce_request(run)
    logger.info("Run %s is asked for again", run.pk)
    return True


def requeue(run: Run) -> bool:
    """Have an unfinished run begun anew at once, whoever holds it: its worker, if it has one, loses
    the run, and what it brings back is refused. False when the run has ended, or changed hands just
    now."""
    run.refresh_from_db()
    if run.is_finished:
        return False
    change = _change(run, lifecycle.Requeued())
    with transaction.atomic():
        if (
            not Run.objects.as_read(run)
            .that(lifecycle.Requeued.guard)
            .update(updated_at=timezone.now(), **as_columns(change))
        ):
            return False
        _end_attempt(run, change.ended)
        tell_again(Event.objects.filter(pk=run.request_event_id))
    logger.info("Run %s is put into the queue again", run.pk)
    return True


def _hold_back_later(run: Run) -> None:
    """Let no later run of the thread begin beside this one. A claim that is under way has not seen
    this one unfinished; PostgreSQL makes it look at its own row again, finds that it is not due, and
    gives up. (One that was first has committed before this returns, and the claim of `run` sees it.)
    """
    event = lifecycle.HeldBack()
    later = Run.objects.filter(thread_id=run.thread_id, position__gt=run.position)
    later.that(event.guard).update(**as_columns(_change(run, event)))


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


def tell_again(events: EventQuerySet) -> int:
    """Add events to the stream once more; readers know them by their ids. How many."""
    entries = [event.as_entry() for event in events]
    # Until a worker has seen them there, the relay sees to it.
    events.update(published_at=None)
    transaction.on_commit(partial(stream.publish, entries), robust=True)
    return len(entries)


def _log_outcome(
    run: Run, status: Run.Status, transcript: loop.Transcript = NOTHING, error_code: str = ""
) -> None:
    """The one line about a run that has ended; what it is about is bound already."""
    calls = [step.duration_ms for step in transcript.steps if step.kind == Step.Kind.MODEL]
    begun = run.started_at or run.clock()
    outcomes.info(
        f"Run {status.value}",
        status=status.value,
        queue_ms=_milliseconds(begun - run.created_at),
        model_ms=sum(calls),
        total_ms=_milliseconds(run.clock() - run.created_at),
        **_spent(run, transcript),
        **({"error_code": error_code} if error_code else {}),
    )


def _milliseconds(time: timedelta) -> int:
    return round(time.total_seconds() * 1000)
