"""Record how an attempt ended: answered, failed, retried or fenced.

Every change is one conditional UPDATE that names the attempt, so a worker that has lost the run changes
nothing.
"""

import logging
import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import datetime, timedelta
from typing import Any, cast

import structlog
from django.db import connection, transaction
from django.db.models.functions import Now
from django.utils import timezone

from agents.events.log import emit_event
from agents.lifecycle import states
from agents.lifecycle.sql import as_columns
from agents.llm import completions, loop
from agents.models import OVERDUE, Attempt, FencedCount, Run, Step
from agents.runs import leases, memory, retries
from agents.usage import prices
from chat.models import Message, Thread
from lib.db import TRANSIENT_ERRORS
from lib.tracing import tagged

logger = logging.getLogger(__name__)
lines = structlog.get_logger(__name__)

EMPTY = loop.Transcript()
# The results that an attempt's own worker writes, once.
RECORDED = (Attempt.Result.COMPLETED, Attempt.Result.FAILED, Attempt.Result.RETRIED)
# The answer is in memory and paid for: its transaction is retried for this long.
RECORD_PATIENCE_SECONDS = 30.0


def transition(run: Run, transition: states.Transition) -> states.StateChange:
    """Return the effect of a transition on the run as it was read."""
    return transition.change(run.state, run.clock(), leases.rules())


def overdue() -> completions.LLMError:
    """Return the error of a run that is past its deadline."""
    return completions.LLMError(
        "There was no answer before the deadline.", code=OVERDUE, permanent=True
    )


def with_database_retry(record: Callable[[], bool]) -> bool:
    """Execute a transaction that must not be lost; retry for a while if the database is unavailable."""
    give_up = time.monotonic() + RECORD_PATIENCE_SECONDS
    pause = 0.1
    while True:
        try:
            return record()
        except TRANSIENT_ERRORS as error:
            if time.monotonic() + pause > give_up or connection.in_atomic_block:
                raise
            logger.warning("The outcome was not recorded, retrying: %s", error)
            connection.close()
            time.sleep(pause)
            pause = min(pause * 2, 5)


def complete(run: Run, answer: str, transcript: loop.Transcript) -> bool:
    """Record an answer. Return True when a summary of its thread is due."""
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
            transition(run, states.Answered(run.attempt)),
            transcript,
            payload={"output": answer, **_finish_reason(transcript)},
            in_thread=True,
            answer_id=message.pk,
        )
        if won:
            message.save(force_insert=True)
        else:
            transaction.set_rollback(True)
    if not won:
        _mark_fenced(run)  # the rollback undid the first mark
        return False
    log_outcome(run, Run.Status.COMPLETED, transcript)
    return summary_due


def fail_or_retry(
    run: Run,
    error: completions.LLMError,
    transcript: loop.Transcript,
    publish: Callable[[str, dict[str, Any]], None] | None = None,
) -> bool:
    """Record a failure, or schedule another attempt and `publish` it to the subscribers. Always return
    False."""
    if states.out_of_time(run.state, run.clock()):
        error = overdue()
    failed = states.Failed(
        run.attempt,
        permanent=error.permanent,
        retry_after=timedelta(seconds=error.retry_after or 0),
        jitter=random.random(),  # noqa: S311
    )
    change = transition(run, failed)
    if change.event is None:
        pending = _reschedule(run, change, error, transcript)
        if pending and publish:
            publish(retries.EVENT, pending.as_event())
        return False
    with transaction.atomic():
        won = _finish(
            run,
            change,
            transcript,
            payload={"error": str(error), **_finish_reason(transcript)},
            error=str(error),
            safe_error=str(error),
            error_code=error.code,
        )
    if not won:
        return record_partial(run, transcript)
    log_outcome(run, Run.Status.FAILED, transcript, error_code=error.code)
    return False


def _reschedule(
    run: Run, change: states.StateChange, error: completions.LLMError, transcript: loop.Transcript
) -> retries.PendingRetry | None:
    """Queue the run for another attempt; the sweep dispatches it when it is due. Return None if this
    worker lost the run."""
    with transaction.atomic():
        won = update_if_held(run, change, **_spent(run, transcript))
        if won:
            end_attempt(run, change.result, transcript, str(error), error.code)
            transcript.settle()
    if not won:
        return None
    pause = change.columns["due_at"].delay
    logger.info("Another attempt in %.1f s: %s", pause.total_seconds(), error)
    return retries.PendingRetry.of(run, run.clock() + pause, str(error), error.code)


def _finish(
    run: Run,
    change: states.StateChange,
    transcript: loop.Transcript,
    *,
    payload: dict[str, Any],
    error: str = "",
    in_thread: bool = False,
    **columns: Any,
) -> bool:
    """Write the outcome of an attempt with its event. Return False when this worker lost the run."""
    columns |= {
        "finished_at": timezone.now(),
        "finish_reason": transcript.finish_reason,
        **_spent(run, transcript),
    }
    if not update_if_held(run, change, in_thread=in_thread, **columns):
        return False
    end_attempt(run, change.result, transcript, error, columns.get("error_code", ""))
    transcript.settle()
    emit_event(run, change.event, run.outcome_payload(**payload))
    return True


def _finish_reason(transcript: loop.Transcript) -> dict[str, str]:
    return {"finishReason": transcript.finish_reason} if transcript.finish_reason else {}


def update_if_held(
    run: Run, change: states.StateChange, *, in_thread: bool = False, **columns: Any
) -> bool:
    """Change the run if this worker still holds it: the attempt's number is the fence. `in_thread`:
    lock its thread first, as a message of the thread is written with it."""
    claimed = Run.objects.filter(pk=run.pk).matching(states.AttemptTransition(run.attempt).guard)
    if in_thread and connection.features.has_select_for_update:
        # In the same statement: the condition is checked before the row is locked.
        thread = Thread.objects.filter(pk=run.thread_id).select_for_update(no_key=True)
        claimed = claimed.filter(thread__in=thread.values("pk"))
    if claimed.update(updated_at=timezone.now(), **as_columns(change), **columns):
        return True
    if _mark_fenced(run):
        logger.warning("Outcome discarded: this worker no longer holds the run (fenced)")
    return False


def _mark_fenced(run: Run) -> bool:
    attempt = Attempt.objects.filter(run=run.pk, number=run.attempt, fenced_at=None)
    # Its own outcome is there if the connection was lost just after it had been committed.
    is_marked = bool(attempt.exclude(result__in=RECORDED).update(fenced_at=Now()))
    if is_marked:
        FencedCount.objects.add()
    return is_marked


def _spent(run: Run, transcript: loop.Transcript) -> dict[str, Any]:
    """Return the tokens and the cost of all attempts; only the holder of the claim changes them."""
    usage = transcript.usage
    return {
        "prompt_tokens": run.prompt_tokens + usage.prompt_tokens,
        "completion_tokens": run.completion_tokens + usage.completion_tokens,
        "usage_is_estimated": run.usage_is_estimated or usage.is_estimated,
        "cost": prices.total([run.cost, *_costs(transcript)]),
    }


def _costs(transcript: loop.Transcript) -> list[int | None]:
    return [prices.cost(step.name, step.usage) for step in transcript.steps]


def end_attempt(
    run: Run,
    result: states.Result | None,
    transcript: loop.Transcript = EMPTY,
    error: str = "",
    code: str = "",
) -> None:
    """Record the present attempt of `run` with its steps; nothing without a `result`."""
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
    _record_steps(run, transcript)


def _sums(transcript: loop.Transcript) -> dict[str, int | None]:
    """Add up the calls of an attempt, in the columns of `Attempt`."""
    return {
        "prompt_tokens": transcript.usage.prompt_tokens,
        "completion_tokens": transcript.usage.completion_tokens,
        "cost": prices.total(_costs(transcript)),
        "model_ms": sum(step.duration_ms for step in transcript.steps if step.kind == "model"),
    }


def _record_steps(run: Run, transcript: loop.Transcript) -> None:
    Step.objects.bulk_create(
        Step(
            run=run,
            attempt=run.attempt,
            kind=step.kind,
            name=step.name,
            input=step.input,
            output=step.output,
            error=step.error,
            reasoning=step.reasoning,
            finish_reason=step.finish_reason,
            prompt_tokens=step.usage.prompt_tokens,
            cached_tokens=step.usage.cached_tokens,
            completion_tokens=step.usage.completion_tokens,
            usage_is_estimated=step.usage.is_estimated,
            cost=cost,
            duration_ms=step.duration_ms,
            started_at=step.started_at,
        )
        for step, cost in zip(transcript.steps, _costs(transcript), strict=True)
    )


def record_partial(run: Run, transcript: loop.Transcript) -> bool:
    """Record the steps of an attempt whose run was ended from outside: the text so far is the output of
    the last step, and its tokens were paid for. Nothing is recorded if another worker has the run."""
    with transaction.atomic():
        ended = Run.objects.filter(
            pk=run.pk,
            attempt=run.attempt,
            status__in=(Run.Status.CANCELLED, Run.Status.FAILED),
        )
        if not ended.update(updated_at=timezone.now()):
            return False
        if run.steps.filter(attempt=run.attempt).exists():
            return False  # it was recorded, and only the database's reply was lost
        ended.update(**_spent(run, transcript))
        Attempt.objects.filter(run=run, number=run.attempt).update(**_sums(transcript))
        _record_steps(run, transcript)
    return False


def log_context(run: Run) -> AbstractContextManager[None]:
    """Bind a run to the log lines of a block."""
    return tagged(
        run=run.pk,
        thread=run.thread_id,
        request_id=run.request_id,
        correlation_id=run.correlation_id,
        attempt=run.attempt,
        model=run.model,
        source=run.source,
    )


def log_outcome(
    run: Run, status: Run.Status, transcript: loop.Transcript = EMPTY, error_code: str = ""
) -> None:
    """Log the one line of a run that has ended, within its `log_context()`."""
    calls = [step.duration_ms for step in transcript.steps if step.kind == Step.Kind.MODEL]
    started = run.started_at or run.clock()
    lines.info(
        f"Run {status.value}",
        status=status.value,
        queue_ms=_milliseconds(started - run.created_at),
        model_ms=sum(calls),
        total_ms=_milliseconds(run.clock() - run.created_at),
        **_spent(run, transcript),
        **({"error_code": error_code} if error_code else {}),
    )


def _milliseconds(time: timedelta) -> int:
    return round(time.total_seconds() * 1000)
