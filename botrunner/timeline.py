"""What is said in the rooms, written down with the sync position in one transaction."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from django.conf import settings
from django.db import transaction
from django.db.models.functions import Now
from django.utils import timezone

from botrunner.matching import Listeners, at, cancels, matches_any
from botrunner.models import MAX_TYPE_LENGTH, Room, RoomEvent, Session
from botrunner.said import ENCRYPTED, MARK, REDACTION, Said, storable
from botrunner.verdicts import stored
from realm.filters import EVENT_TYPES

logger = logging.getLogger(__name__)

# What people say. A sync asks for no more, but anything may come out of an encrypted event.
SPOKEN = {*EVENT_TYPES, ENCRYPTED, REDACTION}


class LeaseLost(Exception):
    """Another process works with the account now: whatever this one holds is stale."""


@dataclass(frozen=True)
class RoomNews:
    room_id: str
    # In the order said, decrypted where that was possible.
    events: list[dict[str, Any]]
    is_encrypted: bool
    # What was said before the bot came: never acted upon, but an admin may ask why.
    earlier: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Invite:
    room_id: str
    inviter: str


@dataclass
class Batch:
    """What one sync brought, ready to be written down."""

    next_batch: str
    joined: list[RoomNews] = field(default_factory=list)
    invites: list[Invite] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    # That the key store had seen when this was in it.
    key_writes: int = 0

    @property
    def is_empty(self) -> bool:
        return not (self.joined or self.invites or self.left)


def write_down(session: Session, holder: str, batch: Batch) -> int:
    """Keep what was said, what became of the bot's rooms, and the position, in one transaction. How
    many events are to be acted upon. Raises `LeaseLost`."""
    with transaction.atomic():
        kept = Session.objects.held_by(holder).filter(pk=session.pk, since=session.since)
        if not kept.update(since=batch.next_batch, last_sync_at=Now(), key_writes=batch.key_writes):
            raise LeaseLost
        rooms = _joined(session, batch.joined)
        new = _keep(list(zip(rooms, batch.joined, strict=True)), session.user_id)
        for invite in batch.invites:
            _invited(session, invite)
        if batch.left:
            Room.objects.filter(session=session, room_id__in=batch.left).update(
                membership=Room.Membership.LEFT, join_due_at=None, updated_at=Now()
            )
    return new


def _joined(session: Session, joined: list[RoomNews]) -> list[Room]:
    """The rows of the rooms, in that order."""
    known = Room.objects.filter(session=session, room_id__in=[news.room_id for news in joined])
    rooms = {room.room_id: room for room in known}
    return [_joined_one(session, news, rooms.get(news.room_id)) for news in joined]


def _joined_one(session: Session, news: RoomNews, room: Room | None) -> Room:
    if room is None:
        logger.info("Is in room %s", news.room_id)
        return Room.objects.create(
            session=session,
            room_id=news.room_id,
            membership=Room.Membership.JOINED,
            is_encrypted=news.is_encrypted,
        )
    encrypted = room.is_encrypted or news.is_encrypted  # never off again
    if room.membership != Room.Membership.JOINED or room.is_encrypted != encrypted:
        room.membership, room.is_encrypted = Room.Membership.JOINED, encrypted
        room.join_due_at, room.error, room.updated_at = None, "", timezone.now()
        room.save(
            update_fields=["membership", "is_encrypted", "join_due_at", "error", "updated_at"]
        )
        logger.info("Joined room %s", room.room_id)
    return room


def _invited(session: Session, invite: Invite) -> None:
    allowed = matches_any(invite.inviter, settings.BOT_RUNNER_ALLOWED_INVITERS)
    Room.objects.update_or_create(
        session=session,
        room_id=invite.room_id,
        defaults={
            "membership": Room.Membership.INVITED if allowed else Room.Membership.REFUSED,
            "inviter": invite.inviter,
            "join_attempts": 0,
            "join_due_at": timezone.now() if allowed else None,
            "error": "" if allowed else "BOT_RUNNER_ALLOWED_INVITERS does not name the inviter.",
            "updated_at": timezone.now(),
        },
    )
    logger.info(
        "Invited to room %s by %s%s", invite.room_id, invite.inviter, "" if allowed else ": refused"
    )


def _keep(news: list[tuple[Room, RoomNews]], me: str) -> int:
    rows = [
        _ignored(room, said, "It was said before the bot came into the room.")
        for room, each in news
        for said in _spoken(each.earlier, me)
        if not _is_too_old(said)
    ]
    rows += rows_of([(room, said) for room, each in news for said in _spoken(each.events, me)], me)
    if rows:
        # Of the same event, the row that is there stays.
        RoomEvent.objects.bulk_create(rows, ignore_conflicts=True)
    return sum(row.state == RoomEvent.State.PENDING for row in rows)


def _spoken(events: Iterable[Any], me: str) -> list[Said]:
    """What people say, among the events of a timeline: bots leave no trace."""
    found = filter(None, map(Said.parse, events))
    return [said for said in found if said.type in SPOKEN and not is_own_or_other_bots(said, me)]


def rows_of(spoken: list[tuple[Room, Said]], me: str) -> list[RoomEvent]:
    """As what the events are kept. What is for the bot waits to be acted upon; of anything else there
    stays that it was said, not what, and why it is not for the bot."""
    if not spoken:
        return []
    listeners = Listeners({said.sender for _, said in spoken}, me)
    targets = [target for _, said in spoken if (target := said.redacts or said.edits)]
    questions = RoomEvent.objects.questions_among(targets)
    rows = []
    for room, said in spoken:
        row = _row_of(room, said, listeners, questions)
        if row.kind in RoomEvent.QUESTIONS:
            questions.add(row.event_id)
        rows.append(row)
    return rows


def _row_of(room: Room, said: Said, listeners: Listeners, questions: set[str]) -> RoomEvent:
    if _is_too_old(said):
        age = settings.BOT_RUNNER_MAX_EVENT_AGE
        return _ignored(
            room,
            said,
            f"Too old: said at {at(said.said_at)}, BOT_RUNNER_MAX_EVENT_AGE is {age:g} s.",
        )
    kind = _kind(said)
    if kind == RoomEvent.Kind.SEALED:
        logger.warning("Event %s in room %s cannot be decrypted yet", said.event_id, room.room_id)
        return _pending(room, said, kind, note="It cannot be read until its key comes.")
    if kind in (RoomEvent.Kind.EDIT, RoomEvent.Kind.REDACTION):
        if (said.redacts or said.edits) in questions:
            return _pending(room, said, kind)
        verb = "edits" if kind == RoomEvent.Kind.EDIT else "takes back"
        return _ignored(room, said, f"It {verb} nothing that is known as a question here.")
    if cancels(said, listeners.me):
        return _pending(room, said, RoomEvent.Kind.CANCEL)
    heard = listeners.hear(said)
    verdicts = stored(heard.verdicts)
    if heard.fired:
        return _pending(room, said, RoomEvent.Kind.QUESTION, verdicts=verdicts)
    return _ignored(room, said, heard.why_nothing, verdicts=verdicts)


def _pending(room: Room, said: Said, kind: RoomEvent.Kind, **reasons: Any) -> RoomEvent:
    return _row(room, said, kind=kind, source=storable(said.source), **reasons)


def _ignored(room: Room, said: Said, note: str, **reasons: Any) -> RoomEvent:
    return _row(room, said, kind=_kind(said), state=RoomEvent.State.IGNORED, note=note, **reasons)


def _row(room: Room, said: Said, **values: Any) -> RoomEvent:
    return RoomEvent(
        room=room,
        event_id=said.event_id,
        sender=said.sender,
        type=said.type,
        content_type=storable(said.content_type[:MAX_TYPE_LENGTH]),
        said_at=said.said_at,
        **values,
    )


def _kind(said: Said) -> RoomEvent.Kind:
    """As which it concerns the bot, as far as it tells itself."""
    if said.type == ENCRYPTED:
        return RoomEvent.Kind.SEALED
    if said.type == REDACTION:
        return RoomEvent.Kind.REDACTION
    return RoomEvent.Kind.EDIT if said.edits else RoomEvent.Kind.REMARK


def is_own_or_other_bots(said: Said, me: str) -> bool:
    return (
        said.sender == me
        or MARK in said.content
        or said.content.get("msgtype") == "m.notice"
        or matches_any(said.sender, settings.BOT_RUNNER_IGNORED_SENDERS)
    )


def _is_too_old(said: Said) -> bool:
    return timezone.now() - said.said_at > timedelta(seconds=settings.BOT_RUNNER_MAX_EVENT_AGE)
