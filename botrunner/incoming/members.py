"""Members of rooms, recorded with each sync: over HTTP a room's threads are open to its members."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from botrunner.matrix.events import MEMBER, is_id, is_joined, is_own_join
from botrunner.models import Room, RoomMember
from lib import revocations
from realm.models import User

# Rows in one statement.
BATCH = 1000


@dataclass(frozen=True)
class MembershipChange:
    """A membership event of a timeline, and the moment at which the bot saw it."""

    user_id: str
    event_id: str
    joins: bool
    # False for a new name or picture of a member.
    is_new: bool
    at: datetime


def changes(events: Iterable[Any], moments: Mapping[str, datetime]) -> list[MembershipChange]:
    """Return the joins and leaves among events, in order."""
    changes = []
    for event in events:
        if not isinstance(event, dict) or event.get("type") != MEMBER:
            continue
        user_id, event_id = event.get("state_key"), event.get("event_id")
        if not is_id(user_id) or not is_id(event_id):
            continue
        joins, is_new = is_joined(event), is_own_join(event, user_id)
        changes.append(MembershipChange(user_id, event_id, joins, is_new, moments[event_id]))
    return changes


def has_leaves(events: Iterable[Any]) -> bool:
    return any(
        isinstance(event, dict) and event.get("type") == MEMBER and not is_joined(event)
        for event in events
    )


def record(
    room: Room,
    changes: list[MembershipChange],
    current: Mapping[str, str] | None,
    *,
    otherwise: datetime,
) -> None:
    """Record the members of a room after some `changes`. `current`: the members and their membership
    events, if the homeserver was asked. `otherwise`: the join time of members whose join was missed."""
    if not changes and current is None:
        return
    rows = RoomMember.objects.filter(room=room)
    if current is None:
        rows = rows.filter(user_id__in={change.user_id for change in changes})
    before = {row.user_id: (row.event_id, row.joined_at) for row in rows}
    after = _apply(before, changes, otherwise)
    if current is not None:
        # Members with the same membership event have not left in between.
        after = {
            user_id: after[user_id]
            if after.get(user_id, ("",))[0] == event_id
            else (event_id, otherwise)
            for user_id, event_id in current.items()
        }
    changed = [user_id for user_id in before if before[user_id] != after.get(user_id)]
    for first in range(0, len(changed), BATCH):
        batch = changed[first : first + BATCH]
        RoomMember.objects.filter(room=room, user_id__in=batch).delete()
        # They may have open streams of the room's threads.
        for user in User.objects.filter(matrix_user_id__in=batch).values_list("pk", flat=True):
            revocations.publish_on_commit(user=user)
    RoomMember.objects.bulk_create(
        [
            RoomMember(room=room, user_id=user_id, event_id=event_id, joined_at=joined_at)
            for user_id, (event_id, joined_at) in after.items()
            if before.get(user_id) != (event_id, joined_at)
        ],
        batch_size=BATCH,
    )


def _apply(
    before: dict[str, tuple[str, datetime]], changes: list[MembershipChange], otherwise: datetime
) -> dict[str, tuple[str, datetime]]:
    after = dict(before)
    for change in changes:
        if not change.joins:
            after.pop(change.user_id, None)
        elif change.is_new:
            after[change.user_id] = change.event_id, change.at
        else:
            _, joined_at = after.get(change.user_id, ("", otherwise))
            after[change.user_id] = change.event_id, joined_at
    return after
