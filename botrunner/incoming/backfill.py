"""Build the batch of a sync: decrypted events, with gaps in timelines backfilled."""

import logging
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

from django.conf import settings
from django.utils import timezone

from botrunner.incoming.batch import Batch, RoomUpdate
from botrunner.incoming.invitations import parse_invitations
from botrunner.matrix.client import Homeserver, SyncUpdate, is_about_encryption
from botrunner.matrix.errors import MatrixError
from botrunner.matrix.events import ENCRYPTED, absent, is_own_join, since_own_join
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
        elif is_new and any(is_own_join(event, homeserver.user_id) for event in events):
            since_join = list(since_own_join(events, homeserver.user_id))
            earlier, events = events[: len(events) - len(since_join)], since_join
        elif timeline.get("limited"):
            logger.info("Backfilling room %s", room_id)
            start = str(timeline.get("prev_batch") or "")
            gap, is_complete = await _backfill(homeserver, room_id, start, "" if is_new else since)
            events = [*gap, *absent(room), *events]
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


async def _backfill(
    homeserver: Homeserver, room_id: str, start: str, end: str
) -> tuple[list[dict[str, Any]], bool]:
    """Return the events between two positions, and whether none is missing. Without `end`, begin at the
    bot's own join."""
    is_complete = False
    newest_first: list[dict[str, Any]] = []
    oldest = timezone.now() - timedelta(seconds=settings.BOT_RUNNER_MAX_EVENT_AGE)
    is_end = _joined_or_before(homeserver.user_id, oldest, stop_at_join=not end)
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
            if is_end(event):
                return newest_first[::-1], is_own_join(event, homeserver.user_id)
            newest_first.append(_decrypted(homeserver, room_id, event))
        if not events or not next_start or next_start == start:
            is_complete = bool(end)
            break
        start = next_start
    else:
        logger.warning("The gap in room %s is too long: only its latest events are read", room_id)
    return newest_first[::-1], is_complete


def _joined_or_before(
    me: str, oldest: datetime, *, stop_at_join: bool
) -> Callable[[dict[str, Any]], bool]:
    def is_end(event: dict[str, Any]) -> bool:
        milliseconds = event.get("origin_server_ts")
        if isinstance(milliseconds, int) and milliseconds / 1000 < oldest.timestamp():
            return True
        return stop_at_join and is_own_join(event, me)

    return is_end


def _decrypted(homeserver: Homeserver, room_id: str, event: dict[str, Any]) -> dict[str, Any]:
    if event.get("type") != ENCRYPTED:
        return event
    return homeserver.decrypt(room_id, event) or event
