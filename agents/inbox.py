"""Submit messages: the one entrance, for HTTP, for rooms and for the stream."""

import hashlib
import json
import re
import uuid
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum
from functools import partial
from typing import Any

import structlog
from django.conf import settings
from django.db import IntegrityError, transaction
from django.db.models import Exists, F
from django.db.models.functions import Now
from django.utils import timezone

from agents.events.log import emit_event
from agents.lifecycle import states
from agents.models import CHAT_REPLY, DeletedRun, IdempotencyKey, Run, new_run_id
from agents.runs import actions, corrections
from agents.usage import limits, refusals
from chat.models import (
    CHOSEN_ID,
    DeletedThread,
    Message,
    Quotation,
    Thread,
    ThreadQuerySet,
    new_thread_id,
)
from lib import db, tracing
from lib.ratelimitedlog import RateLimitedLog
from realm.models import User

MAX_MODEL_LENGTH = 100
MAX_CORRELATION_LENGTH = 200
MAX_KEY_LENGTH = 255
MAX_DEADLINE_SECONDS = 86400
log_info = RateLimitedLog(structlog.get_logger(__name__).info)
# Characters that databases and JSON parsers do not carry reliably.
UNSTORABLE = re.compile("[\x00\ud800-\udfff]")


class Refused(Exception):
    """The message was not accepted; the error gives the reason and is safe to show."""


class Invalid(Refused):
    """A value is invalid; the error begins with its name."""

    @property
    def name(self) -> str:
        return str(self).partition(" ")[0]


class TooLong(Invalid):
    """A message has more characters than CHAT_MAX_MESSAGE_CHARACTERS."""

    code = "message_too_long"


class UnknownThread(Refused):
    """The thread is another user's: to this one it does not exist."""


class Deleted(Refused):
    """The id is of a deleted thread or run that the caller may know of."""

    code = "id_deleted"


class UnknownUser(Refused):
    """The account of the user was deleted meanwhile."""


class KeyReused(Refused):
    """The idempotency key belongs to another request."""


class Busy(Refused):
    """The thread has an unfinished run, and the concurrency policy is to reject."""


class Limited(Refused):
    """A limit of the user or of the room is reached (agents.usage.limits)."""

    def __init__(self, reached: limits.LimitExceeded) -> None:
        super().__init__(str(reached))
        self.code = reached.code
        self.retry_after = reached.retry_after


class WhenBusy(StrEnum):
    """The concurrency policy of a message whose thread has unfinished runs."""

    ENQUEUE = "enqueue"  # it waits for its turn
    MERGE = "merge"  # it is answered together with the queued ones
    REJECT = "reject"
    INTERRUPT = "interrupt"  # they are cancelled


@dataclass(frozen=True)
class Idempotency:
    """An idempotency key: unique per caller, and it never expires."""

    # An account, or the network of anonymous callers (chat.permissions.caller_key).
    caller: str
    key: str

    def __post_init__(self) -> None:
        if not 1 <= len(self.key) <= MAX_KEY_LENGTH or not self.key.isprintable():
            raise Invalid(
                f"Idempotency-Key must be 1 to {MAX_KEY_LENGTH} printable characters long."
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Submission:
    """A message with its parameters, as it was submitted."""

    content: str
    source: Run.Source
    # The threads that the user may write to.
    threads: ThreadQuerySet
    owner: User | None = None
    # The user whose limits apply, if not the owner.
    requester: str | None = None
    # An id that was never used creates a thread: of `owner`, or of the room `room_id`.
    thread_id: str | None = None
    room_id: str = ""
    # The room that usage is counted for.
    place: str = ""
    model: str | None = None
    # The command that the run executes, and its input.
    command: str = CHAT_REPLY
    input: dict[str, Any] | None = None
    # The time at which the message was received in the room.
    received_at: datetime | None = None
    # Messages that this one refers to; of bounded length.
    quotations: tuple[Quotation, ...] = ()
    correlation_id: str | None = None
    idempotency: Idempotency | None = None
    run_id: str | None = None
    # The id of an event that was read from the stream.
    event_id: uuid.UUID | None = None
    # The run fails if it has not ended within this many seconds.
    deadline_seconds: int | None = None
    when_busy: WhenBusy | None = None

    def fingerprint(self) -> str:
        """Return a hash of the request, for idempotency: of the values before any setting applies, so
        that a repeat always gets the same answer."""
        parts: list[Any] = [
            self.content,
            self.model,
            self.thread_id,
            self.correlation_id,
            self.command,
            self.input,
        ]
        # Left out when not given, so that a new parameter does not change the hash of older requests.
        optional = {"deadline_seconds": self.deadline_seconds, "when_busy": self.when_busy}
        if given := {name: value for name, value in optional.items() if value is not None}:
            parts.append(given)
        # Unlike orjson, it takes big numbers.
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def with_quotations(self) -> str:
        """Return the texts that a model is sent for the message."""
        if not self.quotations:
            return self.content
        return "\n".join([self.content, *(each["text"] for each in self.quotations)])

    def policy(self) -> WhenBusy:
        """Return the concurrency policy, by default that of the setting. A room or the stream has no
        caller to reject: there, messages are queued instead."""
        if self.when_busy:
            return WhenBusy(self.when_busy)
        default = WhenBusy(settings.CHAT_WHEN_BUSY)
        if default is WhenBusy.REJECT and self.source != Run.Source.HTTP:
            return WhenBusy.ENQUEUE
        return default


@dataclass(frozen=True)
class Accepted:
    """The ids of an accepted message; a repeat with its idempotency key gets the same."""

    run_id: str
    thread_id: str
    message_id: uuid.UUID
    model: str
    correlation_id: str
    repeated: bool = False
    began_thread: bool = False


@db.retry_on_conflict
def submit(submission: Submission) -> Accepted:
    """Record a message and the run that will answer it: thread, message, run and event in one
    transaction. The event is published after the commit. Raises `Refused`."""
    submission = replace(submission, content=clean_content(submission.content))
    fingerprint = submission.fingerprint()
    key, owner = submission.idempotency, submission.owner
    if key and (earlier := _repeat(key, fingerprint)):
        return earlier
    _check_length(submission.content)
    model = choose_model(submission.model)
    correlation_id = _clean_correlation_id(submission.correlation_id)
    deadline = _clean_deadline(submission.deadline_seconds)
    for name, value in (("threadId", submission.thread_id), ("runId", submission.run_id)):
        if value is not None and not CHOSEN_ID.match(value):
            raise Invalid(f"{name} must be 1 to 64 letters, digits, '_' or '-'.")
    accepted = Accepted(
        run_id=submission.run_id or new_run_id(),
        thread_id=submission.thread_id or new_thread_id(),
        message_id=uuid.uuid4(),
        model=model,
        correlation_id=correlation_id or str(uuid.uuid4()),
    )
    requester = submission.requester or limits.requester_of(owner)
    try:
        with transaction.atomic():
            _check_limits(
                requester,
                submission.place,
                submission.command,
                model,
                submission.with_quotations(),
                submission.input,
            )
            if key:
                _store_key(key, fingerprint, accepted)
            began_thread = _write(submission, accepted, requester, deadline)
    except IntegrityError as error:
        # A concurrent request with the same key was first; perhaps it began the thread, too.
        if key and db.may_be_a_race(error) and (earlier := _repeat(key, fingerprint)):
            return earlier
        is_deleted = owner and not User.objects.filter(pk=owner.pk).exists()
        if is_deleted and db.is_missing_row(error):
            raise UnknownUser("Your account does not exist any more.") from None
        raise
    except limits.LimitExceeded as reached:
        _count(submission.source, reached)
        raise Limited(reached) from None
    return replace(accepted, began_thread=began_thread)


@db.retry_on_conflict
def retry(run: Run) -> bool:
    """Retry a failed or cancelled run for its user: it counts as a message. Return False when it is in
    no such state, or was deleted. Raises `Limited`."""
    if not run.may_be_retried:
        return False
    messages = Message.objects.filter(run=run, redacted_at=None)
    content = messages.values_list("content", flat=True).first()
    if content is None:
        return False
    try:
        with transaction.atomic():
            _check_limits(run.requester, run.place, run.command, run.model, content, run.input)
            if not actions.retry(run):
                transaction.set_rollback(True)
                return False
    except limits.LimitExceeded as reached:
        _count(run.source, reached)
        raise Limited(reached) from None
    return True


def edit(run_id: str, *, content: str) -> bool:
    """Replace the content of a message. A run that has started answers the content that it started
    with; later ones get the new content. Return False if the message is gone. Raises `Invalid`."""
    content = clean_content(content)
    _check_length(content)
    return corrections.edit(run_id, content)


def _count(source: str, reached: limits.LimitExceeded) -> None:
    # For operators; the sender is not concerned with settings.
    log_info(
        "Message refused by a limit",
        f"{source} {reached.code} {reached.setting}",
        source=source,
        code=reached.code,
        setting=reached.setting,
    )
    # After the commit, so that a repeated transaction counts one refusal.
    transaction.on_commit(partial(refusals.count, str(source), reached.code), robust=True)


def _check_limits(
    requester: str,
    place: str,
    command: str,
    model: str,
    content: str,
    input: dict[str, Any] | None,
) -> None:
    """Count a message, and check the budget. Raises `limits.LimitExceeded`."""
    size = len(content.encode()) + (len(json.dumps(input)) if input else 0)
    limits.admit(requester, place, size)
    if command == CHAT_REPLY:
        limits.check_budget(requester, place, model, content)


def clean_content(content: str) -> str:
    content = content.strip()
    if not content:
        raise Invalid("content must be at least 1 character long, blanks at its ends not counted.")
    if UNSTORABLE.search(content):
        raise Invalid("content must not contain NUL characters or unpaired surrogates.")
    return content


def _check_length(content: str) -> None:
    limit = settings.CHAT_MAX_MESSAGE_CHARACTERS
    if limit and len(content) > limit:
        raise TooLong(
            f"content must be at most {limit:,} characters long, and has {len(content):,}. "
            "Send it in parts."
        )


def choose_model(model: str | None) -> str:
    """Return the model to use, by default that of the setting. Raises `Invalid`."""
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


def _write(
    submission: Submission, accepted: Accepted, requester: str, deadline: timedelta | None
) -> bool:
    """Write the rows of a message, and return whether it begins its thread."""
    thread_id, policy = accepted.thread_id, submission.policy()
    turn = _next_turn(thread_id, submission.threads) if submission.thread_id else 0
    if turn == 0:
        turn = _begin_thread(submission, thread_id)
        if turn == 0 and submission.thread_id:
            _check_thread_is_new(thread_id, submission.source, submission.owner)
    if turn:
        # The thread is locked since its turn was taken: no other message can come in between.
        _apply_policy(thread_id, policy, submission.command)
    position = 2 * turn
    message = Message.objects.create(
        id=accepted.message_id,
        thread_id=thread_id,
        position=position,
        role=Message.Role.USER,
        content=submission.content,
        quotations=list(submission.quotations),
        correlation_id=accepted.correlation_id,
        created_at=submission.received_at or timezone.now(),
    )
    # By the database's clock, as the sweep, the claim and a retry are.
    now = Now()
    run = Run.objects.create(
        id=accepted.run_id,
        thread_id=thread_id,
        message=message,
        position=position,
        correlation_id=accepted.correlation_id,
        source=submission.source,
        place=submission.place,
        requester=requester,
        request_id=tracing.request_id(),
        command=submission.command,
        input=submission.input or {},
        model=accepted.model,
        request_event_id=submission.event_id or uuid.uuid4(),
        created_at=now,
        due_at=now,
        dispatched_at=now,
        deadline_at=now + deadline if deadline else None,
    )
    if submission.run_id:
        _check_run_is_new(accepted.run_id)
    emit_event(
        run,
        states.EventType.REQUESTED,
        run.request_payload(submission.content),
        is_published=submission.event_id is not None,
    )
    if turn and policy is WhenBusy.MERGE:
        actions.merge_queued(run)
    return not turn


def _apply_policy(thread_id: str, policy: WhenBusy, command: str) -> None:
    unfinished = Run.objects.unfinished().filter(thread=thread_id).order_by("position")
    if policy is WhenBusy.REJECT and (active := unfinished.first()):
        raise Busy(f"The thread is busy: its run {active.pk} has not ended.")
    if policy is WhenBusy.INTERRUPT and command == CHAT_REPLY:
        for run in unfinished.filter(command=CHAT_REPLY):
            actions.cancel(run)


def _next_turn(thread_id: str, threads: ThreadQuerySet) -> int:
    """Take the next turn of an existing thread; 0 if there is none that the user may write to. The
    UPDATE locks the row, so concurrent messages get turns of their own, in the order of commit."""
    thread = threads.filter(pk=thread_id)
    if not thread.update(turns=F("turns") + 1, updated_at=timezone.now(), archived_at=None):
        return 0
    return thread.values_list("turns", flat=True).get() - 1


def _begin_thread(submission: Submission, thread_id: str) -> int:
    """Insert the thread and return 0, or its next turn if a concurrent request inserted it."""
    room_id = submission.room_id
    thread = Thread(id=thread_id, owner=None if room_id else submission.owner, room_id=room_id)
    thread.turns = 1
    try:
        with transaction.atomic():
            thread.save(force_insert=True)
    except IntegrityError as error:
        if not db.is_duplicate(error, Thread, "id"):
            raise
        turn = _next_turn(thread_id, submission.threads)
        if turn == 0:
            raise UnknownThread(f"There is no thread {thread_id}.") from None
        return turn
    return 0


def _check_thread_is_new(thread_id: str, source: Run.Source, owner: User | None) -> None:
    """Refuse the id of a deleted thread. Call it after the insertion of the thread, which waits for a
    deletion to commit: a statement that begins then sees its tombstone."""
    deleted = DeletedThread.objects.filter(pk=thread_id)
    # Programs on the stream and rooms may write to all threads.
    known = deleted.open_to(owner) if source == Run.Source.HTTP else deleted
    # One query where the id is new, which is nearly always.
    is_known = deleted.annotate(known=Exists(known)).values_list("known", flat=True).first()
    if is_known:
        raise Deleted(
            f"The thread {thread_id} was deleted, and its id is not used again. Choose another "
            "threadId, or leave it out."
        )
    if is_known is not None:
        raise UnknownThread(f"There is no thread {thread_id}.")


def _check_run_is_new(run_id: str) -> None:
    """Refuse the id of a deleted run. Call it after the insertion of the run, as for threads."""
    if DeletedRun.objects.filter(pk=run_id).exists():
        raise Deleted(
            f"The run {run_id} was deleted, and its id is not used again. Choose another runId."
        )


def _repeat(idempotency: Idempotency, fingerprint: str) -> Accepted | None:
    row = IdempotencyKey.objects.filter(caller=idempotency.caller, key=idempotency.key).first()
    if row is None:
        return None
    if row.fingerprint != fingerprint:
        raise KeyReused("This Idempotency-Key was used for another request. Use a new one.")
    return Accepted(
        run_id=row.run_id,
        thread_id=row.thread_id,
        message_id=row.message_id,
        model=row.model,
        correlation_id=row.correlation_id,
        repeated=True,
    )


def _store_key(idempotency: Idempotency, fingerprint: str, accepted: Accepted) -> None:
    IdempotencyKey.objects.create(
        caller=idempotency.caller,
        key=idempotency.key,
        fingerprint=fingerprint,
        run_id=accepted.run_id,
        thread_id=accepted.thread_id,
        message_id=accepted.message_id,
        model=accepted.model,
        correlation_id=accepted.correlation_id,
    )
