"""The one door in: whatever is asked, over HTTP, in a room or on the stream, comes through `ask()`."""

import hashlib
import json
import re
import uuid
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum
from functools import partial
from typing import Any

from django.conf import settings
from django.db import IntegrityError, transaction
from django.db.models import Exists, F
from django.db.models.functions import Now
from django.utils import timezone

from agents.events import stream
from agents.lifecycle import states
from agents.models import CHAT_REPLY, DeletedRun, Event, IdempotencyKey, Run, new_run_id
from agents.runs import actions
from agents.usage import limits, refusals
from chat.models import CHOSEN_ID, DeletedThread, Message, Thread, ThreadQuerySet, new_thread_id
from lib import db, tracing
from realm.models import User

MAX_MODEL_LENGTH = 100
MAX_CORRELATION_LENGTH = 200
MAX_KEY_LENGTH = 255
MAX_DEADLINE_SECONDS = 86400
# What no database or JSON reader can be relied on to carry.
UNSTORABLE = re.compile("[\x00\ud800-\udfff]")


class Refused(Exception):
    """What was asked cannot be done; the message says why and is safe to show."""


class Invalid(Refused):
    """A value is wrong; the message begins with its name."""

    @property
    def name(self) -> str:
        return str(self).partition(" ")[0]


class TooLong(Invalid):
    """A message has more characters than CHAT_MAX_MESSAGE_CHARACTERS."""

    code = "message_too_long"


class UnknownThread(Refused):
    """The thread is somebody else's: to the asker it does not exist."""


class Deleted(Refused):
    """The id is that of a thread or a run that was deleted, which the asker may know of."""

    code = "id_deleted"


class UnknownAsker(Refused):
    """The account of the asker was deleted while the question was being taken."""


class KeyReused(Refused):
    """The idempotency key stands for another request."""


class Busy(Refused):
    """A run of the thread has not ended, and whoever asked wanted no other beside it."""


class Limited(Refused):
    """A limit of the asker's or of the room's is reached (agents.usage.limits)."""

    def __init__(self, reached: limits.Reached) -> None:
        super().__init__(str(reached))
        self.code = reached.code
        self.retry_after = reached.retry_after


class WhenBusy(StrEnum):
    """What becomes of a question whose thread has runs that have not ended."""

    ENQUEUE = "enqueue"  # it waits for its turn
    MERGE = "merge"  # those that nobody has begun are answered together with it
    REJECT = "reject"
    INTERRUPT = "interrupt"  # they are cancelled


@dataclass(frozen=True)
class Accepted:
    """What was made of a question; the same again for a repeat with its idempotency key."""

    run_id: str
    thread_id: str
    message_id: uuid.UUID
    model: str
    correlation_id: str
    repeated: bool = False
    began_thread: bool = False


@dataclass(frozen=True)
class Idempotency:
    """A caller's key: unique for the caller, for good."""

    # An account, or for anonymous callers the network that they ask from (chat.permissions.caller_key).
    caller: str
    key: str

    def __post_init__(self) -> None:
        if not 1 <= len(self.key) <= MAX_KEY_LENGTH or not self.key.isprintable():
            raise Invalid(
                f"Idempotency-Key must be 1 to {MAX_KEY_LENGTH} printable characters long."
            )


@db.retry_on_conflict
def ask(
    *,
    content: str,
    source: Run.Source,
    threads: ThreadQuerySet,
    owner: User | None = None,
    asker: str | None = None,
    thread_id: str | None = None,
    model: str | None = None,
    place: str = "",
    room_id: str = "",
    asked_at: datetime | None = None,
    command: str = CHAT_REPLY,
    input: dict[str, Any] | None = None,
    correlation_id: str | None = None,
    idempotency: Idempotency | None = None,
    run_id: str | None = None,
    event_id: uuid.UUID | None = None,
    deadline_seconds: int | None = None,
    when_busy: WhenBusy | None = None,
) -> Accepted:
    """Record a question and the run that will answer it: thread, message, run and event in one
    transaction; the event goes to the stream after the commit.

    `threads` are those that the asker may write to. A `thread_id` that was never used makes a new
    thread of that name, owned by `owner`. `asker` is whose limits hold, where that is not the owner.
    `event_id` is given by whoever has read the event from the
    stream already. `command`, with its `input`, is what the run carries out. `place` is where it was
    asked, for whoever adds up what a place costs. A thread that is begun with a `room_id` belongs to
    that room, and to no owner; `asked_at` is when the room was seen to ask. What has not ended
    `deadline_seconds` from now fails.
    `when_busy` says what becomes of it where the thread has runs that have not ended. Raises `Refused`.
    """
    content = clean_content(content)
    # What was sent, before any rule that a setting may change: a repeat gets its answer for good.
    fingerprint = _fingerprint(
        content,
        model,
        thread_id,
        correlation_id,
        command,
        input,
        deadline_seconds=deadline_seconds,
        when_busy=when_busy,
    )
    if idempotency and (earlier := _repeat(idempotency, fingerprint)):
        return earlier
    _check_length(content)
    model = choose_model(model)
    correlation_id = _clean_correlation_id(correlation_id)
    deadline = _clean_deadline(deadline_seconds)
    for name, value in (("threadId", thread_id), ("runId", run_id)):
        if value is not None and not CHOSEN_ID.match(value):
            raise Invalid(f"{name} must be 1 to 64 letters, digits, '_' or '-'.")
    asked = Accepted(
        run_id=run_id or new_run_id(),
        thread_id=thread_id or new_thread_id(),
        message_id=uuid.uuid4(),
        model=model,
        correlation_id=correlation_id or str(uuid.uuid4()),
    )
    asker = asker or limits.asker_of(owner)
    try:
        with transaction.atomic():
            _admit(asker, place, command, model, content, input)
            if idempotency:
                _keep(idempotency, fingerprint, asked)
            began_thread = _write(
                asked,
                content,
                source,
                threads,
                Thread(id=asked.thread_id, owner=None if room_id else owner, room_id=room_id),
                event_id,
                asked_at=asked_at,
                columns={
                    "command": command,
                    "input": input or {},
                    "place": place,
                    "asker": asker,
                    # By the database's clock, which the sweep goes by.
                    "deadline_at": Now() + deadline if deadline else None,
                },
                is_new_thread=thread_id is None,
                is_chosen_run=run_id is not None,
                when_busy=WhenBusy(when_busy or _usual(source)),
            )
    except IntegrityError:
        # Another request with the same key was first by a hair.
        if idempotency and (earlier := _repeat(idempotency, fingerprint)):
            return earlier
        if owner and not User.objects.filter(pk=owner.pk).exists():
            raise UnknownAsker("Your account does not exist any more.") from None
        raise
    except limits.Reached as reached:
        _count(source, reached)
        raise Limited(reached) from None
    return replace(asked, began_thread=began_thread)


@db.retry_on_conflict
def ask_again(run: Run) -> bool:
    """Have a run begun anew that failed or was cancelled, as whoever asked it wants: it counts as a
    question. False when it is in no such state, or gone. Raises `Limited`."""
    if not run.may_be_retried:
        return False
    question = Message.objects.filter(run=run).values_list("content", flat=True).first()
    if question is None:
        return False
    try:
        with transaction.atomic():
            _admit(run.asker, run.place, run.command, run.model, question, run.input)
            if not actions.retry(run):
                transaction.set_rollback(True)
                return False
    except limits.Reached as reached:
        _count(run.source, reached)
        raise Limited(reached) from None
    return True


@db.retry_on_conflict
def amend(run_id: str, *, content: str) -> bool:
    """Put other words to a question whose run has not begun. False when it has: then it answers the
    words that it began with. Raises `Invalid`."""
    content = clean_content(content)
    _check_length(content)
    with transaction.atomic():
        # Whoever would claim the run now waits for this transaction, and reads the new words.
        waiting = Run.objects.filter(pk=run_id).matching(states.UNCLAIMED)
        if not waiting.update(updated_at=timezone.now()):
            return False
        Message.objects.filter(run=run_id).update(content=content)
    return True


def _count(source: str, reached: limits.Reached) -> None:
    # Where it is part of a transaction that is repeated, it is a refusal once.
    transaction.on_commit(partial(refusals.count, str(source), reached.code), robust=True)


def _admit(
    asker: str,
    place: str,
    command: str,
    model: str,
    content: str,
    input: dict[str, Any] | None,
) -> None:
    """Raises `limits.Reached`."""
    size = len(content.encode()) + (len(json.dumps(input)) if input else 0)
    limits.admit(asker, place, size)
    if command == CHAT_REPLY:
        limits.check_budget(asker, place, model, content)


def clean_content(content: str) -> str:
    content = content.strip()
    if not content:
        raise Invalid("content must be at least 1 character long, blanks at its ends not counted.")
    if UNSTORABLE.search(content):
        raise Invalid("content must not contain NUL characters or unpaired surrogates.")
    return content


def _check_length(content: str) -> None:
    most = settings.CHAT_MAX_MESSAGE_CHARACTERS
    if most and len(content) > most:
        raise TooLong(
            f"content must be at most {most:,} characters long, and has {len(content):,}. "
            "Send it in parts; an operator can raise CHAT_MAX_MESSAGE_CHARACTERS."
        )


def choose_model(model: str | None) -> str:
    """The model asked for, or the default one. Raises `Invalid` when it is not allowed."""
    if model is None:
        return settings.CHAT_DEFAULT_MODEL
    model = model.strip()
    if not 1 <= len(model) <= MAX_MODEL_LENGTH or UNSTORABLE.search(model):
        raise Invalid(f"model must be 1 to {MAX_MODEL_LENGTH} characters long.")
    allowed = settings.CHAT_ALLOWED_MODELS
    if allowed and model not in allowed:
        raise Invalid(f"model {model!r} is not allowed. Allowed models: {', '.join(allowed)}.")
    return model


def _clean_correlation_id(value: str | None) -> str | None:
    if value is None:
        return None
    value = value.strip()
    if not 1 <= len(value) <= MAX_CORRELATION_LENGTH or UNSTORABLE.search(value):
        raise Invalid(f"correlationId must be 1 to {MAX_CORRELATION_LENGTH} characters long.")
    return value


def _clean_deadline(seconds: int | None) -> timedelta | None:
    if seconds is None:
        seconds = settings.CHAT_RUN_DEADLINE_SECONDS
        return timedelta(seconds=seconds) if seconds else None
    if not 1 <= seconds <= MAX_DEADLINE_SECONDS:
        raise Invalid(f"deadlineSeconds must be from 1 to {MAX_DEADLINE_SECONDS}.")
    return timedelta(seconds=seconds)


def _usual(source: Run.Source) -> WhenBusy:
    """What the setting says. In rooms and on the stream there is nobody to be turned away with an
    answer that a program could act upon: there, questions wait instead."""
    usual = WhenBusy(settings.CHAT_WHEN_BUSY)
    if usual is WhenBusy.REJECT and source != Run.Source.HTTP:
        return WhenBusy.ENQUEUE
    return usual


def _write(
    asked: Accepted,
    content: str,
    source: Run.Source,
    threads: ThreadQuerySet,
    new_thread: Thread,
    event_id: uuid.UUID | None,
    *,
    asked_at: datetime | None,
    columns: dict[str, Any],
    is_new_thread: bool,
    is_chosen_run: bool,
    when_busy: WhenBusy,
) -> bool:
    """Whether it begins its thread."""
    turn = 0 if is_new_thread else _next_turn(asked.thread_id, threads)
    if turn == 0:
        turn = _begin_thread(asked.thread_id, threads, new_thread)
        if turn == 0 and not is_new_thread:
            _check_thread_is_new(asked.thread_id, source, new_thread.owner)
    if turn:
        # The thread is locked since its turn was taken: no question can come in between.
        _make_way(asked.thread_id, when_busy, columns["command"])
    position = 2 * turn
    message = Message.objects.create(
        id=asked.message_id,
        thread_id=asked.thread_id,
        position=position,
        role=Message.Role.USER,
        content=content,
        correlation_id=asked.correlation_id,
        created_at=asked_at or timezone.now(),
    )
    run = Run.objects.create(
        id=asked.run_id,
        thread_id=asked.thread_id,
        message=message,
        position=position,
        correlation_id=asked.correlation_id,
        source=source,
        request_id=tracing.request_id(),
        model=asked.model,
        request_event_id=event_id or uuid.uuid4(),
        # By the database's clock, which the claim goes by, and a retry's time.
        created_at=Now(),
        due_at=Now(),
        dispatched_at=Now(),
        **columns,
    )
    if is_chosen_run:
        _check_run_is_new(asked.run_id)
    event = Event.objects.create(
        id=run.request_event_id,
        type=Event.Type.REQUESTED,
        run=run,
        correlation_id=asked.correlation_id,
        payload=run.request_payload(content),
        published_at=timezone.now() if event_id else None,
    )
    if not event_id:
        transaction.on_commit(partial(stream.publish, [event.as_entry()]), robust=True)
    if turn and when_busy is WhenBusy.MERGE:
        actions.merge_queued(run)
    return not turn


def _make_way(thread_id: str, when_busy: WhenBusy, command: str) -> None:
    unfinished = Run.objects.unfinished().filter(thread=thread_id).order_by("position")
    if when_busy is WhenBusy.REJECT and (going := unfinished.first()):
        raise Busy(f"The thread is busy: its run {going.pk} has not ended.")
    if when_busy is WhenBusy.INTERRUPT and command == CHAT_REPLY:
        for run in unfinished.filter(command=CHAT_REPLY):
            actions.cancel(run)


def _next_turn(thread_id: str, threads: ThreadQuerySet) -> int:
    """Take the next turn of an existing thread; 0 if there is none that the asker may write to. The
    UPDATE locks the row, so two questions at once get turns of their own, in the order of commit."""
    mine = threads.filter(pk=thread_id)
    if not mine.update(turns=F("turns") + 1, updated_at=timezone.now(), archived_at=None):
        return 0
    return mine.values_list("turns", flat=True).get() - 1


def _begin_thread(thread_id: str, threads: ThreadQuerySet, new: Thread) -> int:
    new.turns = 1
    try:
        with transaction.atomic():
            new.save(force_insert=True)
    except IntegrityError:
        turn = _next_turn(thread_id, threads)  # begun by another request just now
        if turn == 0:
            raise UnknownThread(f"There is no thread {thread_id}.") from None
        return turn
    return 0


def _check_thread_is_new(thread_id: str, source: Run.Source, owner: User | None) -> None:
    """Refuse the id of a deleted thread. To be called after the thread was inserted: a deletion that
    had not been committed held that up, and its tombstone is seen by a statement that begins now."""
    deleted = DeletedThread.objects.filter(pk=thread_id)
    # Programs on the stream and rooms may write to all threads.
    known = deleted.open_to(owner) if source == Run.Source.HTTP else deleted
    # One query where the id is new, which is nearly always.
    if found := deleted.annotate(known=Exists(known)).values_list("known", flat=True).first():
        raise Deleted(
            f"The thread {thread_id} was deleted, and its id is not used again. Choose another "
            "threadId, or leave it out."
        )
    if found is not None:
        raise UnknownThread(f"There is no thread {thread_id}.")


def _check_run_is_new(run_id: str) -> None:
    """Refuse the id of a deleted run. To be called after the run was inserted, as for threads."""
    if DeletedRun.objects.filter(pk=run_id).exists():
        raise Deleted(
            f"The run {run_id} was deleted, and its id is not used again. Choose another runId."
        )


def _repeat(idempotency: Idempotency, fingerprint: str) -> Accepted | None:
    kept = IdempotencyKey.objects.filter(caller=idempotency.caller, key=idempotency.key).first()
    if kept is None:
        return None
    if kept.fingerprint != fingerprint:
        raise KeyReused("This Idempotency-Key was used for another request. Use a new one.")
    return Accepted(
        run_id=kept.run_id,
        thread_id=kept.thread_id,
        message_id=kept.message_id,
        model=kept.model,
        correlation_id=kept.correlation_id,
        repeated=True,
    )


def _keep(idempotency: Idempotency, fingerprint: str, asked: Accepted) -> None:
    IdempotencyKey.objects.create(
        caller=idempotency.caller,
        key=idempotency.key,
        fingerprint=fingerprint,
        run_id=asked.run_id,
        thread_id=asked.thread_id,
        message_id=asked.message_id,
        model=asked.model,
        correlation_id=asked.correlation_id,
    )


def _fingerprint(*parts: Any, **more: Any) -> str:
    # What was added later changes nothing where it is not given: keys are kept for good.
    given = {name: value for name, value in more.items() if value is not None}
    # Takes what orjson would not, such as big numbers
    raw = json.dumps([*parts, given] if given else parts, sort_keys=True)
    return hashlib.sha256(raw.encode()).hexdigest()
