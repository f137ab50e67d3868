"""Build the batch of a sync: decrypted events, with gaps in timelines backfilled."""

import logging
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from django.conf import settings
from django.utils import timezone

from botrunner.incoming.batch import Batch, RoomUpdate
from botrunner.incoming.invitations import parse_invitations
from botrunner.matrix.client import Homeserver, SyncUpdate, is_about_encryption
from botrunner.matrix.errors import MatrixError
from botrunner.matrix.events import ENCRYPTED, Entrance, absent, is_own_join, since_own_join
from realm.filters import ROOM_MESSAGE

logger = logging.getLogger(__name__)

MAX_PAGES = 100


async def batch_of(
    update: SyncUpdate, since: str, homeserver: Homeserver, known: set[str]
) -> Batch:
    """Build a batch. `known`: the rooms that the bot was in at `since`. Raises `MatrixError`."""
    batch = Batch(update.next_batch)
    for room_id, room in update.rooms("join").items():
        if room_id in known and _has_only_own_messages(room, homeserver.user_id):
            continue
        timeline = room.get("timeline", {})
        events = [_decrypted_by_sync(event, update) for event in timeline.get("events", [])]
        earlier: list[Any] = []
        is_new, is_complete = room_id not in known, True
        if is_new or timeline.get("limited"):
            homeserver.forget_members(room_id)
        if not since:
            # The bot's first sync: earlier messages are not for it.
            events = []
        elif is_new:
            earlier, events, is_complete = await _since_invite(
                homeserver, room_id, timeline, events
            )
        elif timeline.get("limited"):
            logger.info("Backfilling room %s", room_id)
            gap = await _backfill(homeserver, room_id, _start(timeline), since)
            events, is_complete = [*gap.events, *absent(room), *events], gap.is_complete
        else:
            events = [*absent(room), *events]
        if is_new or not is_complete:
            batch.members_lost.add(room_id)
        encrypted = homeserver.is_encrypted(room_id)
        batch.joined.append(RoomUpdate(room_id, events, encrypted, earlier, is_complete))
    batch.invitations = parse_invitations(update.rooms("invite"), homeserver.user_id)
    batch.left = list(update.rooms("leave"))
    return batch


def _has_only_own_messages(room: dict[str, Any], me: str) -> bool:
    """Return whether a room's new events are all messages of the bot, as in half of all updates."""
    timeline = room.get("timeline", {})
    if timeline.get("limited") or is_about_encryption(room) or absent(room):
        return False
    return all(
        event.get("sender") == me and event.get("type") == ROOM_MESSAGE
        for event in timeline.get("events", [])
    )


def _decrypted_by_sync(event: dict[str, Any], update: SyncUpdate) -> dict[str, Any]:
    if event.get("type") == ENCRYPTED:
        return update.decrypted.get(str(event.get("event_id")), event)
    return event


def _start(timeline: dict[str, Any]) -> str:
    return str(timeline.get("prev_batch") or "")


async def _since_invite(
    homeserver: Homeserver, room_id: str, timeline: dict[str, Any], events: list[Any]
) -> tuple[list[Any], list[Any], bool]:
    """Split the events of a room that is new to the bot into those from before its invite and those
    since, and return whether none of these is missing. What people write between inviting the bot
    and its join is for the bot too."""
    me = homeserver.user_id
    entrance = Entrance(me)
    for index in reversed(range(len(events))):
        if entrance.is_at(events[index]):
            return events[:index], events[index + 1 :], True
    is_complete = not timeline.get("limited")
    if not is_complete:
        logger.info("Backfilling room %s", room_id)
        gap = await _backfill(homeserver, room_id, _start(timeline), entrance=entrance)
        events, is_complete = [*gap.events, *events], gap.is_complete
        if not gap.is_exhausted:
            return [], events, is_complete
    if not any(is_own_join(event, me) for event in events):
        return [], events, is_complete
    # The room does not show the invite: it may show what was written before that.
    since_join = list(since_own_join(events, me))
    return events[: len(events) - len(since_join)], since_join, True


@dataclass(frozen=True)
class MissedEvents:
    """Events that a sync left out, in timeline order."""

    events: list[dict[str, Any]]
    # None is missing.
    is_complete: bool
    # The homeserver has no earlier events to show.
    is_exhausted: bool = False


async def _backfill(
    homeserver: Homeserver,
    room_id: str,
    start: str,
    end: str = "",
    *,
    entrance: Entrance | None = None,
) -> MissedEvents:
    """Read the events before the position `start` and after `end` or, without it, after the bot's
    entrance."""
    is_complete = is_exhausted = False
    newest_first: list[dict[str, Any]] = []
    oldest = timezone.now() - timedelta(seconds=settings.BOT_RUNNER_MAX_EVENT_AGE)
    for _ in range(MAX_PAGES):
        try:
            events, next_start = await homeserver.messages(room_id, start, end or None)
        except MatrixError as error:
            if not error.permanent:
                raise
            logger.warning(
                "Backfill of room %s failed, some events are missing: %s", room_id, error
            )
            break
        for event in events:
            if entrance and entrance.is_at(event):
                return MissedEvents(newest_first[::-1], is_complete=True)
            if _is_before(event, oldest):
                return MissedEvents(newest_first[::-1], is_complete=False)
            newest_first.append(_decrypted(homeserver, room_id, event))
        if not events or not next_start or next_start == start:
            is_complete, is_exhausted = bool(end), not end
            break
        start = next_start
    else:
        logger.warning("The gap in room %s is too long: only its latest events are read", room_id)
    return MissedEvents(newest_first[::-1], is_complete, is_exhausted)


def _is_before(event: dict[str, Any], oldest: datetime) -> bool:
    milliseconds = event.get("origin_server_ts")
    return isinstance(milliseconds, int) and milliseconds / 1000 < oldest.timestamp()


def _decrypted(homeserver: Homeserver, room_id: str, event: dict[str, Any]) -> dict[str, Any]:
    if event.get("type") != ENCRYPTED:
        return event
    return homeserver.decrypt(room_id, event) or event
