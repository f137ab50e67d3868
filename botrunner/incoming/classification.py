"""Classify events of rooms: those for the bot are handled, all others are recorded as ignored."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

from django.conf import settings
from django.utils import timezone

from agents.models import Run
from botrunner.incoming import unreadable
from botrunner.incoming.matching import (
    FORGET,
    RESUME,
    Rule,
    RuleSet,
    control_of,
    format_time,
    matches_any,
)
from botrunner.incoming.unreadable import is_addressed, is_unreadable
from botrunner.matrix.events import ENCRYPTED, REDACTION, REPLY_FIELD, TimelineEvent, storable
from botrunner.models import MAX_TYPE_LENGTH, QuotedEvent, Reply, Room, RoomEvent
from botrunner.verdicts import stored
from realm.filters import EVENT_TYPES, EventFilter

logger = logging.getLogger(__name__)

# The sync filter asks for these alone, but an encrypted event may contain any type.
HANDLED_TYPES = {*EVENT_TYPES, *unreadable.EVENT_TYPES, ENCRYPTED, REDACTION}


@dataclass(frozen=True)
class Classified:
    """An event, its row, and the rules that fire on it."""

    row: RoomEvent
    event: TimelineEvent
    fired: list[tuple[Rule, EventFilter]] = field(default_factory=list)


def events_of_people(sources: Iterable[Any], me: str) -> list[TimelineEvent]:
    """Parse the events of a timeline, without those of bots, which are not recorded."""
    events = filter(None, map(TimelineEvent.parse, sources))
    return [event for event in events if is_from_person(event, me)]


def is_from_person(event: TimelineEvent, me: str) -> bool:
    return event.type in HANDLED_TYPES and not (
        event.sender == me
        or REPLY_FIELD in event.content
        or event.content.get("msgtype") == "m.notice"
        or matches_any(event.sender, settings.BOT_RUNNER_IGNORED_SENDERS)
    )


def is_too_old(event: TimelineEvent) -> bool:
    return timezone.now() - event.sent_at > timedelta(seconds=settings.BOT_RUNNER_MAX_EVENT_AGE)


def classify(events: list[tuple[Room, TimelineEvent]], me: str) -> list[Classified]:
    """Classify events of one session, in order. Those for the bot are pending; of all others the row
    has the reason why they are ignored and no content."""
    if not events:
        return []
    rules = RuleSet({event.sender for _, event in events}, me, events[0][0].session.names)
    targets = [target for _, event in events if (target := event.redacts or event.edits)]
    messages = RoomEvent.objects.messages_among(targets) if targets else set()
    redacted = [event.redacts for _, event in events if event.redacts]
    known = _known(events, redacted) if redacted else set()
    unanswered = _unanswered(targets)
    classified = []
    for room, event in events:
        each = _classify(room, event, rules, messages, known)
        if original := unanswered.get(event.edits or ""):
            each = _as_question(original, each, rules)
        elif each.row.kind == RoomEvent.Kind.OTHER:
            unanswered[event.event_id] = each.row
        if each.row.kind in RoomEvent.MESSAGES:
            messages.add(event.event_id)
        classified.append(each)
    return classified


def _unanswered(event_ids: list[str]) -> dict[str, RoomEvent]:
    """Return recorded events that were not for the bot, by their ids."""
    if not event_ids:
        return {}
    rows = RoomEvent.objects.filter(event_id__in=event_ids, kind=RoomEvent.Kind.OTHER)
    return {row.event_id: row for row in rows}


def _as_question(original: RoomEvent, edit: Classified, rules: RuleSet) -> Classified:
    """Return the edit as one to handle if it makes a message for the bot of an event that was none."""
    if original.room_id != edit.row.room_id or original.sender != edit.row.sender:
        return edit
    if is_too_old(edit.event) or (asked := question_of(original, edit.event)) is None:
        return edit
    if not rules.match(asked).fired:
        return edit
    return _pending(edit.row.room, edit.event, RoomEvent.Kind.EDIT)


def question_of(original: RoomEvent, edit: TimelineEvent) -> TimelineEvent | None:
    """Return an event that was not for the bot as it is after an edit; None if it is too old. Of such
    an event no content is recorded."""
    event = TimelineEvent(
        original.event_id, original.sender, original.sent_at, edit.type, {}, dict(edit.source)
    )
    if is_too_old(event):
        return None
    edited = event.edited_by(edit)
    return edited and replace(edited, source={**edited.source, "event_id": original.event_id})


def _known(events: list[tuple[Room, TimelineEvent]], redacted: list[str]) -> set[str]:
    """Return which redacted events are quoted, are answers of the bot, or began a run."""
    rooms = {room.pk for room, event in events if event.redacts}
    answers = Reply.objects.filter(room__in=rooms).by_event(redacted)
    # The record of a message may have been pruned before its thread.
    asked = Run.objects.filter(source=Run.Source.MATRIX, request_id__in=redacted)
    messages = set(asked.values_list("request_id", flat=True))
    return QuotedEvent.objects.ids_among(redacted) | answers.keys() | messages


def _classify(
    room: Room, event: TimelineEvent, rules: RuleSet, messages: set[str], known: set[str]
) -> Classified:
    # A redaction counts whenever it arrives.
    if is_too_old(event) and event.type != REDACTION:
        age = settings.BOT_RUNNER_MAX_EVENT_AGE
        sent = format_time(event.sent_at)
        return ignored(
            room, event, f"Too old: sent at {sent}, BOT_RUNNER_MAX_EVENT_AGE is {age:g} s."
        )
    kind = _kind(event)
    if kind == RoomEvent.Kind.ENCRYPTED:
        logger.warning("Event %s in room %s cannot be decrypted yet", event.event_id, room.room_id)
        return _pending(room, event, kind, note="Waiting for its key.")
    if kind in (RoomEvent.Kind.EDIT, RoomEvent.Kind.REDACTION):
        if (event.redacts or event.edits) in messages or event.redacts in known:
            return _pending(room, event, kind)
        verb = "edits" if kind == RoomEvent.Kind.EDIT else "redacts"
        return ignored(room, event, f"It {verb} no message that fired a command.")
    if control := control_of(event, rules.me, rules.names):
        kinds = {FORGET: RoomEvent.Kind.FORGET, RESUME: RoomEvent.Kind.RESUME}
        return _pending(room, event, kinds.get(control, RoomEvent.Kind.CANCEL))
    if is_unreadable(event) and is_addressed(room, event, rules):
        return _pending(room, event, RoomEvent.Kind.MESSAGE)
    match = rules.match(event)
    verdicts = stored(match.verdicts)
    if match.fired:
        return _pending(room, event, RoomEvent.Kind.MESSAGE, match.fired, verdicts=verdicts)
    return ignored(room, event, match.reason, verdicts=verdicts)


def _pending(
    room: Room,
    event: TimelineEvent,
    kind: RoomEvent.Kind,
    fired: Iterable[tuple[Rule, EventFilter]] = (),
    **reasons: Any,
) -> Classified:
    source = storable(event.source)
    row = _row(room, event, kind=kind, source=source, **reasons)
    # The event as stored: its text goes into the database with the run too.
    return Classified(row, TimelineEvent.parse(source) or event, list(fired))


def ignored(room: Room, event: TimelineEvent, note: str, **reasons: Any) -> Classified:
    state = RoomEvent.State.IGNORED
    return Classified(
        _row(room, event, kind=_kind(event), state=state, note=note, **reasons), event
    )


def _row(room: Room, event: TimelineEvent, **values: Any) -> RoomEvent:
    return RoomEvent(
        room=room,
        event_id=event.event_id,
        sender=event.sender,
        type=event.type,
        content_type=storable(event.content_type[:MAX_TYPE_LENGTH]),
        sent_at=event.sent_at,
        **values,
    )


def _kind(event: TimelineEvent) -> RoomEvent.Kind:
    """Return the kind as far as the event alone determines it."""
    if event.type == ENCRYPTED:
        return RoomEvent.Kind.ENCRYPTED
    if event.type == REDACTION:
        return RoomEvent.Kind.REDACTION
    return RoomEvent.Kind.EDIT if event.edits else RoomEvent.Kind.OTHER
