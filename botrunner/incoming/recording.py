"""Record a sync: events, rooms, members and the position, in one transaction."""

import logging
from collections.abc import Callable
from datetime import datetime, timedelta

from django.db import transaction
from django.db.models.functions import Now
from django.utils import timezone

from botrunner.incoming import leaving, members
from botrunner.incoming.batch import Batch, RoomUpdate
from botrunner.incoming.classification import (
    Classified,
    classify,
    events_of_people,
    ignored,
    is_too_old,
)
from botrunner.incoming.invitations import record_invitations
from botrunner.matrix.events import display_name
from botrunner.models import LeaseLost, Room, RoomEvent, Session
from lib.db import TRANSIENT_ERRORS

logger = logging.getLogger(__name__)

# More messages are submitted in a transaction each: other writers wait for the database.
MAX_SUBMITTED = 8
EARLIER = "Sent before the bot joined the room."

Submit = Callable[[Classified], None]


def record_sync(session: Session, holder: str, batch: Batch, submit: Submit | None = None) -> int:
    """Record a batch in one transaction; return the number of events that remain to be handled.
    With `submit`, a few messages are submitted at once, which starts their runs earlier. Raises
    `LeaseLost`."""
    with transaction.atomic():
        lease = Session.objects.held_by(holder).filter(pk=session.pk, since=session.since)
        if not lease.update(
            since=batch.next_batch, last_sync_at=Now(), key_writes=batch.key_writes
        ):
            raise LeaseLost
        _remember_names(session, batch)
        rooms = _record_rooms(session, batch.joined)
        updates = list(zip(rooms, batch.joined, strict=True))
        begun = timezone.now()
        moments = _moments(batch.joined, begun)
        _record_members(session, batch, updates, moments, begun)
        remaining = _record_events(updates, session.user_id, moments, submit)
        if batch.invitations:
            record_invitations(session, batch.invitations)
        _record_left(session, batch)
    return remaining


def _record_left(session: Session, batch: Batch) -> None:
    # A room that the bot has left and is invited to again may be among both.
    room_ids = set(batch.left) - {invitation.room_id for invitation in batch.invitations}
    if not room_ids:
        return
    left = Room.objects.filter(session=session, room_id__in=room_ids)
    # A refused invitation that was declined or taken back keeps its reason.
    left.filter(membership=Room.Membership.REFUSED).update(leave_due_at=None)
    left.exclude(membership=Room.Membership.REFUSED).update(
        membership=Room.Membership.LEFT,
        join_due_at=None,
        leave_due_at=None,
        updated_at=Now(),
    )


def _remember_names(session: Session, batch: Batch) -> None:
    """Remember the names that the bot has in rooms: messages of the same batch may use them."""
    for update in batch.joined:
        for event in update.events:
            if name := display_name(event, session.user_id):
                session.remember_name(name)


def _moments(joined: list[RoomUpdate], begun: datetime) -> dict[str, datetime]:
    """Return the moment at which the bot saw each event, one microsecond apart: their order decides
    which came before a join. The times in events are made by other homeservers."""
    events = (event for update in joined for event in update.events if isinstance(event, dict))
    ids = (event.get("event_id") for event in events)
    known = dict.fromkeys(event_id for event_id in ids if isinstance(event_id, str))
    return {event_id: begun + timedelta(microseconds=n) for n, event_id in enumerate(known, 1)}


def _record_members(
    session: Session,
    batch: Batch,
    updates: list[tuple[Room, RoomUpdate]],
    moments: dict[str, datetime],
    begun: datetime,
) -> None:
    ended = begun + timedelta(microseconds=len(moments) + 1)
    for room, update in updates:
        # During a gap the members are unknown.
        otherwise = begun if update.is_complete else ended
        current = batch.members.get(room.room_id)
        changes = members.changes(update.events, moments)
        members.record(room, changes, current, otherwise=otherwise)
    updated = {update.room_id for update in batch.joined}
    others = Room.objects.filter(session=session, room_id__in=batch.members.keys() - updated)
    for room in others if batch.members else ():
        members.record(room, [], batch.members[room.room_id], otherwise=ended)
    # Those that someone has left, or whose members were fetched.
    changed = {*batch.members, *(u.room_id for _, u in updates if members.has_leaves(u.events))}
    for room_ids, known in ((batch.members_lost, False), (batch.members.keys(), True)):
        if room_ids:
            rows = Room.objects.filter(session=session, room_id__in=list(room_ids))
            rows.update(members_known=known)
    if changed:
        leaving.mark_empty(session, list(changed))


def _record_rooms(session: Session, joined: list[RoomUpdate]) -> list[Room]:
    """Return the rows of the rooms, in the order given."""
    known = Room.objects.filter(session=session, room_id__in=[update.room_id for update in joined])
    rooms = {room.room_id: room for room in known}
    for room in rooms.values():
        room.session = session
    return [_record_room(session, update, rooms.get(update.room_id)) for update in joined]


def _record_room(session: Session, update: RoomUpdate, room: Room | None) -> Room:
    if room is None:
        logger.info("Is in room %s", update.room_id)
        return Room.objects.create(
            session=session,
            room_id=update.room_id,
            membership=Room.Membership.JOINED,
            is_encrypted=update.is_encrypted,
        )
    encrypted = room.is_encrypted or update.is_encrypted  # encryption is never switched off
    if room.membership != Room.Membership.JOINED or room.is_encrypted != encrypted:
        room.membership, room.is_encrypted = Room.Membership.JOINED, encrypted
        room.join_due_at = room.leave_due_at = None
        room.error, room.updated_at = "", timezone.now()
        room.save(
            update_fields=[
                *("membership", "is_encrypted", "join_due_at", "leave_due_at"),
                *("error", "updated_at"),
            ]
        )
        logger.info("Joined room %s", room.room_id)
    return room


def _record_events(
    updates: list[tuple[Room, RoomUpdate]],
    me: str,
    moments: dict[str, datetime],
    submit: Submit | None = None,
) -> int:
    events = [
        ignored(room, event, EARLIER)
        for room, update in updates
        for event in events_of_people(update.earlier, me)
        if not is_too_old(event)
    ]
    events += classify(
        [
            (room, event)
            for room, update in updates
            for event in events_of_people(update.events, me)
        ],
        me,
    )
    for each in events:
        each.row.created_at = moments.get(each.row.event_id, each.row.created_at)
    pending = [each for each in events if each.row.state == RoomEvent.State.PENDING]
    if submit and _are_few_messages(pending) and _record_and_submit(events, pending, submit):
        return 0
    if events:
        # An event that is recorded already keeps its row.
        RoomEvent.objects.bulk_create([each.row for each in events], ignore_conflicts=True)
    return len(pending)


def _are_few_messages(pending: list[Classified]) -> bool:
    return 0 < len(pending) <= MAX_SUBMITTED and all(
        each.row.kind == RoomEvent.Kind.MESSAGE for each in pending
    )


def _record_and_submit(events: list[Classified], pending: list[Classified], submit: Submit) -> bool:
    """Return False if nothing was done: an event is recorded already, or a message cannot be submitted,
    which must not hold up the others."""
    try:
        with transaction.atomic():
            for each in pending:
                each.row.state = RoomEvent.State.HANDLED
            RoomEvent.objects.bulk_create([each.row for each in events])
            for each in pending:
                submit(each)
    except TRANSIENT_ERRORS:
        raise  # the database is unavailable: the batch is retried
    except Exception as error:
        logger.debug("Submitting at once failed, handling one by one: %s", error)
        for each in events:
            each.row.pk = None
        for each in pending:
            each.row.state = RoomEvent.State.PENDING
        return False
    return True
