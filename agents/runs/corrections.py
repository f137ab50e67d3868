"""Corrections of messages that were submitted: edits and redactions. No later call of a model gets the
words that were replaced or removed.

A redaction takes along what may repeat the message: its answer, its partial answers, and answers of
`chat.summarize`. A run that is being executed with the message starts again without it.
"""

import logging
import uuid
from collections.abc import Collection
from functools import partial
from typing import Any

from django.db import transaction
from django.utils import timezone

from agents.events import publisher
from agents.models import CHAT_REPLY, CHAT_SUMMARIZE, Event, Run, Step
from agents.runs import actions, memory
from chat.models import Message, Thread
from lib import db

logger = logging.getLogger(__name__)

# The fields of events that hold messages.
WORDS = ("prompt", "output")


@db.retry_on_conflict
def edit(run_id: str, content: str) -> bool:
    """Replace the message of a run. An attempt that has begun answers the content that it started with.
    Return False if the message is gone."""
    run = Run.objects.filter(pk=run_id).first()
    if run is None:
        return False
    with transaction.atomic():
        db.lock(Thread.objects.filter(pk=run.thread_id))
        # A claim of the run waits for this transaction, and its worker reads the new content.
        db.lock(Run.objects.filter(pk=run_id))
        message = Message.objects.filter(run=run_id, redacted_at=None)
        if message.exclude(content=content).update(content=content):
            memory.withdraw(run.thread_id, run.position)
            return True
        return message.exists()


def redact(run_ids: Collection[str]) -> None:
    """Remove the messages of runs, with everything that may repeat them."""
    for thread_id, runs in _by_thread(run_ids).items():
        _redact(thread_id, messages=runs)


def redact_answers(run_ids: Collection[str]) -> None:
    """Remove the answers of runs; their messages stay."""
    for thread_id, runs in _by_thread(run_ids).items():
        _redact(thread_id, answers=runs)


def redact_quotations(message_ids: Collection[uuid.UUID], source: str) -> None:
    """Remove what messages quote of the message `source`, with their answers."""
    runs = dict(Run.objects.filter(message__in=message_ids).values_list("pk", "message"))
    for thread_id, of_thread in _by_thread(runs).items():
        _redact(thread_id, quoting=of_thread, source=source)


def _by_thread(run_ids: Collection[str]) -> dict[str, set[str]]:
    """Return the runs by their threads, in the order in which threads are locked."""
    rows = Run.objects.filter(pk__in=run_ids).order_by("thread").values_list("thread", "pk")
    threads: dict[str, set[str]] = {}
    for thread_id, run_id in rows:
        threads.setdefault(thread_id, set()).add(run_id)
    return threads


@db.retry_on_conflict
def _redact(
    thread_id: str,
    *,
    messages: Collection[str] = (),
    answers: Collection[str] = (),
    quoting: Collection[str] = (),
    source: str = "",
) -> None:
    """Remove the messages of runs of a thread, the answers of others, and what others quote of
    `source`."""
    runs = Run.objects.filter(thread=thread_id)
    with transaction.atomic():
        db.lock(Thread.objects.filter(pk=thread_id))
        # A claim waits for this transaction, or has committed and is seen.
        db.lock(runs.unfinished(), "position")
        first = runs.filter(pk__in=[*messages, *answers, *quoting]).order_by("position").first()
        if first is None:
            return
        answering = _answering(thread_id, {*messages, *quoting})
        for message in Message.objects.filter(run__in=quoting):
            quotations = [each for each in message.quotations if each["source"] != source]
            Message.objects.filter(pk=message.pk).update(quotations=quotations)
        summaries = runs.filter(command=CHAT_SUMMARIZE, position__gt=first.position)
        repeating = {*answers, *answering, *summaries.values_list("pk", flat=True)}
        _erase(Message.objects.filter(run__in=messages))
        _erase(Message.objects.filter(answered_run__in=repeating))
        _erase_traces({*messages, *repeating}, messages)
        memory.withdraw(thread_id, first.position)
        unfinished = runs.unfinished().filter(position__gte=first.position).order_by("position")
        for run in unfinished:
            if run.pk in answering and _is_erased(answering[run.pk]):
                actions.cancel(run)
            elif run.status == Run.Status.PROCESSING and run.command in (
                CHAT_REPLY,
                CHAT_SUMMARIZE,
            ):
                _start_again(run)
    logger.info("Messages of thread %s were redacted", thread_id)


def _answering(thread_id: str, messages: Collection[str]) -> dict[str, set[str]]:
    """Return the runs that answer the messages of runs, each with all the runs whose messages it
    answers: its own and those merged into it."""
    if not messages:
        return {}
    merged = dict(
        Run.objects.filter(thread=thread_id, merged_into__isnull=False).values_list(
            "pk", "merged_into"
        )
    )

    def final(run_id: str) -> str:
        while into := merged.get(run_id):
            run_id = into
        return run_id

    answering: dict[str, set[str]] = {final(pk): set() for pk in messages}
    for pk in {*merged, *messages, *answering}:
        if (into := final(pk)) in answering:
            answering[into].add(pk)
    return answering


def _is_erased(run_ids: set[str]) -> bool:
    return not Message.objects.filter(run__in=run_ids, redacted_at=None).exists()


def _erase(messages: Any) -> None:
    messages.filter(redacted_at=None).update(content="", quotations=[], redacted_at=timezone.now())


def _erase_traces(run_ids: Collection[str], asked: Collection[str]) -> None:
    """Erase the texts of messages and answers in steps, events and inputs of runs."""
    steps = Step.objects.filter(run__in=run_ids)
    steps.update(output="", reasoning="")
    steps.filter(kind=Step.Kind.TOOL).update(input={})
    for run in Run.objects.filter(pk__in=asked).exclude(input={}):
        Run.objects.filter(pk=run.pk).update(input={**run.input, "content": {}})
    keys = db.lock(Event.objects.filter(run__in=run_ids))
    for event in Event.objects.filter(pk__in=keys):
        if any(event.payload.get(name) for name in WORDS):
            words = {name: "" for name in WORDS if name in event.payload}
            Event.objects.filter(pk=event.pk).update(payload={**event.payload, **words})


def _start_again(run: Run) -> None:
    """Take a run from its worker, which has read what is gone now."""
    transaction.on_commit(partial(publisher.stop, run.pk), robust=True)
    actions.requeue(run)
