"""Carry out one run: claim it, carry out its command, record the outcome.

The life of a run: `queued -> processing -> completed | failed | cancelled`, and back to `queued`
when an attempt failed in a way that another may mend. Every change is one conditional UPDATE that
names the state it comes from, so whoever is late changes nothing.
"""

import logging
import random
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from functools import partial
from typing import Any, cast

import structlog
from django.conf import settings
from django.db import InterfaceError, OperationalError, connection, transaction
from django.db.models.functions import Now
from django.utils import timezone

from agents import commands, leases, llm, loop, memory, stream
from agents.models import Attempt, Event, Run, Step
from chat.models import Message

logger = logging.getLogger(__name__)

BACKOFF_SECONDS = 1.0
MAX_BACKOFF_SECONDS = 60.0
LATE_ATTEMPT_SECONDS = 30.0
NOTHING = loop.Transcript()
# The answer is in memory and paid for: its transaction is tried again over this long.
RECORD_PATIENCE_SECONDS = 30.0


def execute(run_id: str) -> str | None:
    """Carry out a run if it may be claimed; otherwise it is somebody else's, or done, or not due,
    and nothing happens. The id of its thread when the thread's summary is due."""
    run = claim(run_id)
    if run is None:
        return None
    with (
        structlog.contextvars.bound_contextvars(
            run=run.pk, thread=run.thread_id, correlation_id=run.correlation_id, attempt=run.attempt
        ),
        leases.heartbeat().hold(run) as lease,
    ):
        return run.thread_id if _attempt(run, lease) else None


def claim(run_id: str) -> Run | None:
    """Take a run for this worker, or None when it is not to be had."""
    run = Run.objects.select_related("thread").filter(pk=run_id).first()
    if run is None or run.is_finished:
        return None
    worker, now = leases.worker_name(), timezone.now()
    with transaction.atomic():
        taken = (
            Run.objects.claimable()
            .filter(pk=run_id, attempt=run.attempt)
            .update(
                status=Run.Status.PROCESSING,
                attempt=run.attempt + 1,
                worker=worker,
                claimed_at=now,
                lease_expires_at=Now() + leases.duration(),
                started_at=run.started_at or now,
                updated_at=now,
            )
        )
        if taken and run.status == Run.Status.PROCESSING:
            _end_attempt(run, Attempt.Result.LOST)
    if not taken:
        return None
    run.attempt += 1
    run.worker, run.claimed_at, run.started_at = worker, now, run.started_at or now
    return run


def _attempt(run: Run, lease: leases.Lease) -> bool:
    transcript = loop.Transcript()
    try:
        if run.attempt > settings.AGENT_MAX_ATTEMPTS:
            raise llm.LLMError(
                "The server could not carry out this run: its worker was lost each time.",
                code="workers_lost",
                permanent=True,
            )
        control = llm.Control(deadline=_deadline(run), stopped=lease.lost)
        answer = commands.carry_out(run, control=control, transcript=transcript)
        return _persist(partial(_complete, run, llm.storable(answer), transcript))
    except llm.Stopped:
        logger.info("Run given up: it is no longer held by this worker")
        return False
    except llm.LLMError as error:
        _persist(partial(_fail_or_retry, run, error, transcript))
        return False
    except (OperationalError, InterfaceError):
        raise  # the lease lapses, and another attempt finds the database back
    except Exception as error:
        # A defect of ours: the run still gets an outcome, and the traceback goes to the log.
        logger.exception("Run failed unexpectedly")
        unexpected = llm.LLMError(
            "Something went wrong in the server.", code="internal", permanent=True
        )
        unexpected.__cause__ = error
        # Without the steps: they may be what the database refused.
        _persist(partial(_fail_or_retry, run, unexpected, NOTHING))
        return False


def _deadline(run: Run) -> float:
    """When the run has had its time, in `time.monotonic()`. An attempt that begins late, because
    nobody could work for a while, gets a little all the same."""
    spent = (timezone.now() - (run.started_at or timezone.now())).total_seconds()
    whole = settings.AGENT_DEADLINE_SECONDS
    return time.monotonic() + max(whole - spent, min(whole, LATE_ATTEMPT_SECONDS))


def _persist(record: Callable[[], bool]) -> bool:
    """Carry out a transaction that must not be lost to a passing trouble of the database."""
    give_up = time.monotonic() + RECORD_PATIENCE_SECONDS
    pause = 0.1
    while True:
        try:
            return record()
        except (OperationalError, InterfaceError) as error:
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
        won = _finish(
            run,
            Run.Status.COMPLETED,
            transcript,
            payload={"output": answer},
            answer_id=message.pk,
        )
        if not won:
            return False
        message.save(force_insert=True)
        summary_due = memory.note_answer(run)
    _log_outcome(run, "completed")
    return summary_due


def _fail_or_retry(run: Run, error: llm.LLMError, transcript: loop.Transcript) -> bool:
    pause = max(error.retry_after or 0, _backoff(run.attempt))
    in_time = time.monotonic() + pause < _deadline(run)
    if not error.permanent and run.attempt < settings.AGENT_MAX_ATTEMPTS and in_time:
        return _retry(run, error, transcript, pause)
    with transaction.atomic():
        won = _finish(
            run,
            Run.Status.FAILED,
            transcript,
            payload={"error": str(error)},
            error=str(error),
            safe_error=str(error),
            error_code=error.code,
        )
    if won:
        _log_outcome(run, "failed", error.code)
    return False


def _retry(run: Run, error: llm.LLMError, transcript: loop.Transcript, pause: float) -> bool:
    """Put the run back; the sweep hands it over again when it is due."""
    with transaction.atomic():
        won = _fenced(
            run,
            status=Run.Status.QUEUED,
            due_at=Now() + timedelta(seconds=pause),
            handed_at=None,
            **_spent(run, transcript),
        )
        if won:
            _end_attempt(run, Attempt.Result.RETRIED, transcript, str(error))
    if won:
        logger.info("Run will be tried again in %.1f s: %s", pause, error)
    return False


def _backoff(attempt: int) -> float:
    """Full jitter: workers that failed together do not come back together."""
    return random.uniform(0, min(MAX_BACKOFF_SECONDS, BACKOFF_SECONDS * 2**attempt))  # noqa: S311


def _finish(
    run: Run,
    status: Run.Status,
    transcript: loop.Transcript,
    *,
    payload: dict[str, Any],
    error: str = "",
    **columns: Any,
) -> bool:
    """Write the outcome of an attempt, its event included. False when this worker lost the run."""
    columns |= {
        "status": status,
        "due_at": None,
        "finished_at": timezone.now(),
        **_spent(run, transcript),
    }
    if not _fenced(run, **columns):
        return False
    _end_attempt(run, Attempt.Result(status.value), transcript, error)
    announce(run, Event.Type(f"agent.run.{status.value}"), payload)
    return True


def _fenced(run: Run, **columns: Any) -> bool:
    """Change the run if the claim still stands: the attempt's number is the fence."""
    claimed = Run.objects.filter(pk=run.pk, attempt=run.attempt, status=Run.Status.PROCESSING)
    if claimed.update(lease_expires_at=None, updated_at=timezone.now(), **columns):
        return True
    logger.warning("Outcome thrown away: this worker no longer holds the run (fenced)")
    return False


def _spent(run: Run, transcript: loop.Transcript) -> dict[str, int]:
    """The tokens of all attempts: nobody else has changed them since this one was claimed."""
    usage = transcript.usage
    return {
        "prompt_tokens": run.prompt_tokens + usage.prompt_tokens,
        "completion_tokens": run.completion_tokens + usage.completion_tokens,
    }


def _end_attempt(
    run: Run,
    result: Attempt.Result,
    transcript: loop.Transcript = NOTHING,
    error: str = "",
) -> None:
    """Record the attempt that `run` stands in, with its steps."""
    usage = transcript.usage
    Attempt.objects.create(
        run=run,
        number=run.attempt,
        worker=run.worker,
        result=result,
        error=error,
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        started_at=cast("datetime", run.claimed_at),
    )
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
            completion_tokens=step.usage.completion_tokens,
            duration_ms=step.duration_ms,
        )
        for step in transcript.steps
    )


def announce(run: Run, type: Event.Type, payload: dict[str, Any]) -> None:
    """Write an event of a run, and add it to the stream after the commit."""
    event = Event.objects.create(
        run=run,
        type=type,
        correlation_id=run.correlation_id,
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
        with transaction.atomic():
            as_read = Run.objects.filter(pk=run.pk, status=run.status, attempt=run.attempt)
            now = timezone.now()
            if as_read.update(
                status=Run.Status.CANCELLED,
                due_at=None,
                lease_expires_at=None,
                finished_at=now,
                updated_at=now,
            ):
                if run.status == Run.Status.PROCESSING:
                    _end_attempt(run, Attempt.Result.CANCELLED)
                announce(run, Event.Type.CANCELLED, {})
                return True


def _log_outcome(run: Run, outcome: str, code: str = "") -> None:
    logger.info(
        "Run %s%s after %d ms, attempt %d",
        outcome,
        f" ({code})" if code else "",
        (timezone.now() - run.created_at).total_seconds() * 1000,
        run.attempt,
    )
