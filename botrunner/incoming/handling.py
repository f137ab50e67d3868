"""Handle recorded events: submit messages, apply edits, redactions and control commands. Each event in
a transaction of its own."""

import logging
from collections.abc import Iterable
from dataclasses import replace

from django.db import transaction

from agents import inbox
from agents.models import Run
from agents.runs import actions, corrections
from botrunner.incoming import quotations
from botrunner.incoming.classification import question_of
from botrunner.incoming.controls import (
    answers_others,
    cancel_runs,
    delete_conversation,
    resume,
)
from botrunner.incoming.matching import SENDER_DEACTIVATED, prompt_of
from botrunner.incoming.submission import submit
from botrunner.matrix.events import TimelineEvent, storable
from botrunner.models import Reply, Room, RoomEvent
from lib.tracing import tagged
from realm.filters import EventFilter, InvalidFilter
from realm.models import BotCommand, User

logger = logging.getLogger(__name__)


def pending() -> list[int]:
    """Return the primary keys of the next rows to handle, in order."""
    rows = RoomEvent.objects.filter(state=RoomEvent.State.PENDING)
    return list(
        rows.exclude(kind=RoomEvent.Kind.ENCRYPTED)
        .order_by("id")
        .values_list("pk", flat=True)[:500]
    )


NOTHING_FOUND: quotations.Found = {}


def handle(
    pk: int,
    me: str,
    *,
    moderates: bool | None = None,
    found: quotations.Found | None = NOTHING_FOUND,
) -> None:
    """Handle an event and mark it as handled, in one transaction. `moderates`: the sender may redact
    messages of others in the room. Raises `PowerNeeded` if this is unknown and required. `found`: the
    events that the message refers to. Raises `EventsNeeded` if this is None and they are required."""
    with transaction.atomic():
        claim = RoomEvent.objects.filter(pk=pk, state=RoomEvent.State.PENDING)
        # Another process that handles the event waits for this transaction and then finds it handled.
        if not claim.update(state=RoomEvent.State.HANDLED):
            return
        row = RoomEvent.objects.with_session().get(pk=pk)
        before = row.verdicts, row.note
        event = TimelineEvent.parse(row.source)
        with tagged(room=row.room.room_id, event_id=row.event_id, request_id=row.event_id):
            note = _handle(row, event, me, moderates, found) if event else "Not a timeline event."
        if note:
            row.note, row.state, row.source = note, RoomEvent.State.IGNORED, None
        if note or (row.verdicts, row.note) != before:
            row.save(update_fields=["state", "source", "note", "verdicts"])


def _handle(
    row: RoomEvent,
    event: TimelineEvent,
    me: str,
    moderates: bool | None,
    found: quotations.Found | None,
) -> str:
    """Return a note if the event has no effect."""
    if row.kind == RoomEvent.Kind.MESSAGE:
        return submit(row, event, me, found)
    # Redactions are exempt: the homeserver has allowed them.
    if row.kind != RoomEvent.Kind.REDACTION and User.objects.deactivated_among([event.sender]):
        return SENDER_DEACTIVATED
    if row.kind == RoomEvent.Kind.EDIT:
        return _edit(row, event, me, found)
    if row.kind == RoomEvent.Kind.CANCEL:
        return cancel_runs(row, event, me, moderates)
    if row.kind == RoomEvent.Kind.FORGET:
        return delete_conversation(row, event, me, moderates)
    if row.kind == RoomEvent.Kind.RESUME:
        return resume(row, event, me)
    return _redact(row, event)


def give_up(pk: int) -> None:
    """Mark an event as failed: it must not hold up the others."""
    RoomEvent.objects.filter(pk=pk, state=RoomEvent.State.PENDING).update(
        state=RoomEvent.State.FAILED, note="Handling failed: see the log."
    )


def _edit(row: RoomEvent, event: TimelineEvent, me: str, found: quotations.Found | None) -> str:
    # In the same room: texts of another room must not enter this one's context.
    known = RoomEvent.objects.filter(room=row.room, sender=event.sender)
    original_row = known.filter(event_id=event.edits).first()
    if original_row and original_row.kind == RoomEvent.Kind.OTHER:
        return _ask(original_row, _question_of(original_row, event, found), me, found)
    original = TimelineEvent.parse(original_row.source) if original_row else None
    edited = original.edited_by(event) if original else None
    if original_row is None or original is None or edited is None:
        return "It edits no message of the same sender."
    if _was_refused(original_row):
        return _ask(original_row, edited, me, found)
    changed = False
    replies = original_row.replies.exclude(run=None).select_related("bot_command")
    for reply in replies.order_by("run__thread", "run__position"):
        filter_ = _filter_of(reply.bot_command)
        prompt = prompt_of(filter_, edited, me, row.room.session.names) if filter_ else ""
        if reply.run_id and prompt:
            changed |= inbox.edit(reply.run_id, content=prompt)
    if not changed:
        return "It edits no message that is still there, or leaves nothing of it."
    logger.info("Message %s was edited", original.event_id)
    return ""


def _question_of(
    row: RoomEvent, edit: TimelineEvent, found: quotations.Found | None
) -> TimelineEvent | None:
    """Return an event that was not for the bot as it is after an edit, in its Matrix thread."""
    edited = question_of(row, edit)
    if edited is None:
        return None
    if found is None:
        # An edit does not repeat the relations.
        raise quotations.EventsNeeded(row.room.room_id, [row.event_id], related=True)
    original = found.get(row.event_id)
    if original is None or not original.event.relation:
        return edited
    content = {**edited.content, "m.relates_to": original.event.relation}
    return replace(edited, content=content, source={**edited.source, "content": content})


def _was_refused(row: RoomEvent) -> bool:
    """Return whether a message got only the notice that it is incomplete."""
    keys = row.replies.values_list("key", flat=True)
    return bool(keys) and all(key.startswith("refused.") for key in keys)


def _ask(
    row: RoomEvent, edited: TimelineEvent | None, me: str, found: quotations.Found | None
) -> str:
    """Submit an event that started no run as it is after an edit."""
    if edited is None:
        return "It edits no message of the same sender."
    asks = RoomEvent.objects.filter(pk=row.pk, kind=row.kind, state=row.state)
    source = storable(edited.source)
    row.kind, row.state, row.source = RoomEvent.Kind.MESSAGE, RoomEvent.State.HANDLED, source
    row.note = ""
    if not asks.update(kind=row.kind, state=row.state, source=source, note=""):
        return "It edits a message that is answered."
    note = submit(row, TimelineEvent.parse(source) or edited, me, found)
    if note:
        row.note, row.state, row.source = note, RoomEvent.State.IGNORED, None
    row.save(update_fields=["state", "source", "note", "verdicts"])
    return note


def _filter_of(command: BotCommand | None) -> EventFilter | None:
    """Return None if the command is gone or its filter is invalid."""
    try:
        return command.when if command else None
    except InvalidFilter:
        return None


def _redact(row: RoomEvent, event: TimelineEvent) -> str:
    """Remove a redacted message from its thread, cancel its runs, and drop its replies."""
    replies = Reply.objects.filter(message__event_id=event.redacts, message__room=row.room)
    # By the request id too: the record of the message may have been pruned.
    asked = Run.objects.filter(
        source=Run.Source.MATRIX, place=row.room.room_id, request_id=event.redacts or ""
    )
    runs = {
        *replies.exclude(run=None).values_list("run", flat=True),
        *asked.values_list("pk", flat=True),
    }
    corrections.redact(runs)
    _forget_content(row.room, event.redacts)
    open_replies = list(
        replies.filter(status__in=[Reply.Status.WAITING, Reply.Status.READY]).select_related(
            "run", "message"
        )
    )
    for reply in open_replies:
        if answers_others(reply):
            continue
        if reply.run:
            actions.cancel(reply.run)
        if reply.drafted_at:
            continue  # a draft in the room gets its final edit
        reply.status, reply.error = Reply.Status.DROPPED, "The message was redacted."
        reply.save(update_fields=["status", "error"])
    undecrypted = RoomEvent.objects.filter(room=row.room, kind=RoomEvent.Kind.ENCRYPTED)
    undecrypted.filter(event_id=event.redacts).update(
        state=RoomEvent.State.IGNORED, note="It was redacted.", source=None
    )
    is_known = _remove_copies(row.room, event.redacts or "", replies)
    return "" if runs or open_replies or is_known else "There was nothing to cancel."


def _remove_copies(room: Room, event_id: str, replies: Iterable[Reply]) -> bool:
    """Remove the answer that a redacted event is a part of, and what is quoted of the event and of the
    `replies` to it. Return False if there is nothing of it."""
    answer = Reply.objects.filter(room=room).by_event([event_id]).get(event_id)
    if answer and answer.run_id:
        corrections.redact_answers([answer.run_id])
    copied = {event_id}.union(
        *(reply.sent_event_ids for reply in [*replies, *filter(None, [answer])])
    )
    is_quoted = [quotations.remove(room, each) for each in sorted(copied)]
    return answer is not None or any(is_quoted)


def _forget_content(room: Room, event_id: str | None) -> None:
    """Keep of a redacted message what the homeserver keeps: no content."""
    of_room = RoomEvent.objects.filter(room=room, kind=RoomEvent.Kind.MESSAGE)
    for each in of_room.filter(event_id=event_id, source__isnull=False):
        if each.source:
            each.source = {**each.source, "content": {}}
            each.save(update_fields=["source"])
