"""What comes of an attempt, written down: an answer, a failure, another try, or that it was too late.

Every change is one conditional UPDATE that names the attempt it comes from: who has lost the run
changes nothing.
"""

import logging
import random
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from functools import partial
from typing import Any, cast

import structlog
from django.db import connection, transaction
from django.db.models.functions import Now
from django.utils import timezone

from agents.events import hooks, stream
from agents.lifecycle import states
from agents.lifecycle.sql import as_columns
from agents.llm import completions, loop
from agents.models import OVERDUE, Attempt, Event, Run, Step
from agents.runs import leases, memory
from agents.usage import prices
from chat.models import Message, Thread
from lib.db import TRANSIENT_ERRORS

logger = logging.getLogger(__name__)
lines = structlog.get_logger(__name__)

NOTHING = loop.Transcript()
# What an attempt's own worker writes of it, once.
RECORDED = (Attempt.Result.COMPLETED, Attempt.Result.FAILED, Attempt.Result.RETRIED)
# The answer is in memory and paid for: its transaction is tried again over this long.
RECORD_PATIENCE_SECONDS = 30.0


def change_of(run: Run, event: states.Event) -> states.Change:
    """What becomes of the run by the rules, as it was read."""
    return event.change(run.state, run.clock(), leases.rules())


def overdue() -> completions.LLMError:
    """The failure of a run that was given up for its deadline."""
    return completions.LLMError(
        "There was no answer in the time that was given for it.", code=OVERDUE, permanent=True
    )


def persist(record: Callable[[], bool]) -> bool:
    """Carry out a transaction that must not be lost to a passing trouble of the database."""
    give_up = time.monotonic() + RECORD_PATIENCE_SECONDS
    pause = 0.1
    while True:
        try:
            return record()
        except TRANSIENT_ERRORS as error:
            if time.monotonic() + pause > give_up or connection.in_atomic_block:
                raise
            logger.warning("The outcome was not recorded, trying again: %s", error)
            connection.close()
            time.sleep(pause)
            pause = min(pause * 2, 5)


def complete(run: Run, answer: str, transcript: loop.Transcript) -> bool:
    """Record an answer. True when a summary of its thread is due."""
    message = Message(
        thread_id=run.thread_id,
        position=run.position + 1,
        role=Message.Role.ASSISTANT,
        content=answer,
        correlation_id=run.correlation_id,
    )
    with transaction.atomic():
        # First, as it locks the thread: the order of locks is in docs/explanation/reliability.md.
        summary_due = memory.note_answer(run)
        won = _finish(
            run,
            change_of(run, states.Answered(run.attempt)),
            transcript,
            payload={"output": answer},
            in_thread=True,
            answer_id=message.pk,
        )
        if won:
            message.save(force_insert=True)
        else:
            transaction.set_rollback(True)
    if not won:
        _mark_fenced(run)  # which was rolled back with the rest
        return False
    tell(run, Run.Status.COMPLETED, transcript)
    return summary_due


def fail_or_retry(run: Run, error: completions.LLMError, transcript: loop.Transcript) -> bool:
    """Record a failure, or put the run back for another attempt. Always False."""
    if states.out_of_time(run.state, run.clock()):
        error = overdue()
    failed = states.Failed(
        run.attempt,
        permanent=error.permanent,
        retry_after=timedelta(seconds=error.retry_after or 0),
        luck=random.random(),  # noqa: S311
    )
    change = change_of(run, failed)
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
        return keep_partial(run, transcript)
    tell(run, Run.Status.FAILED, transcript, error_code=error.code)
    return False


def _put_back(
    run: Run, change: states.Change, error: completions.LLMError, transcript: loop.Transcript
) -> bool:
    """Put the run back; the sweep hands it over again when it is due."""
    with transaction.atomic():
        won = fenced(run, change, **_spent(run, transcript))
        if won:
            end_attempt(run, change.ended, transcript, str(error), error.code)
            transcript.settle()
    if won:
        pause = change.columns["due_at"].delay.total_seconds()
        logger.info("Run will be tried again in %.1f s: %s", pause, error)
    return False


def _finish(
    run: Run,
    change: states.Change,
    transcript: loop.Transcript,
    *,
    payload: dict[str, Any],
    error: str = "",
    in_thread: bool = False,
    **columns: Any,
) -> bool:
    """Write the outcome of an attempt, its event included. False when this worker lost the run."""
    columns |= {"finished_at": timezone.now(), **_spent(run, transcript)}
    if not fenced(run, change, in_thread=in_thread, **columns):
        return False
    end_attempt(run, change.ended, transcript, error, columns.get("error_code", ""))
    transcript.settle()
    announce(run, change.told, payload)
    return True


def fenced(run: Run, change: states.Change, *, in_thread: bool = False, **columns: Any) -> bool:
    """Change the run if the claim still stands: the attempt's number is the fence. `in_thread`: lock
    its thread before it, as a message of the thread is written with it."""
    claimed = Run.objects.filter(pk=run.pk).that(states.OfAttempt(run.attempt).guard)
    if in_thread and connection.features.has_select_for_update:
        # In the same statement: the condition is looked at before the row is locked.
        thread = Thread.objects.filter(pk=run.thread_id).select_for_update(no_key=True)
        claimed = claimed.filter(thread__in=thread.values("pk"))
    if claimed.update(updated_at=timezone.now(), **as_columns(change), **columns):
        return True
    if _mark_fenced(run):
        logger.warning("Outcome thrown away: this worker no longer holds the run (fenced)")
    return False


def _mark_fenced(run: Run) -> bool:
    attempt = Attempt.objects.filter(run=run.pk, number=run.attempt)
    # Its own outcome stands there where the database was lost just after it had been recorded.
    return bool(attempt.exclude(result__in=RECORDED).update(fenced_at=Now()))


def _spent(run: Run, transcript: loop.Transcript) -> dict[str, Any]:
    """The tokens of all attempts: nobody else has changed them since this one was claimed."""
    usage = transcript.usage
    return {
        "prompt_tokens": run.prompt_tokens + usage.prompt_tokens,
        "completion_tokens": run.completion_tokens + usage.completion_tokens,
        "cost": prices.total([run.cost, *_costs(transcript)]),
    }


def _costs(transcript: loop.Transcript) -> list[int | None]:
    return [prices.cost(step.name, step.usage) for step in transcript.steps]


def end_attempt(
    run: Run,
    result: states.Result | None,
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


def keep_partial(run: Run, transcript: loop.Transcript) -> bool:
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
    run: Run, told: states.Told | None, payload: dict[str, Any], *, to_count: bool | None = None
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
        to_deliver=hooks.needs_delivery(Event.Type(told)),
        payload={
            "requestEventId": str(run.request_event_id),
            "runId": run.pk,
            "threadId": run.thread_id,
            **payload,
        },
    )
    transaction.on_commit(partial(stream.publish, [event.as_entry()]), robust=True)


def tell(
    run: Run, status: Run.Status, transcript: loop.Transcript = NOTHING, error_code: str = ""
) -> None:
    """The one line about a run that has ended; what it is about is bound already."""
    calls = [step.duration_ms for step in transcript.steps if step.kind == Step.Kind.MODEL]
    begun = run.started_at or run.clock()
    lines.info(
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
