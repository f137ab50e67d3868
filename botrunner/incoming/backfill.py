"""From an answer of /sync to what is to be written down, gaps in timelines filled."""

import logging
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

from django.conf import settings
from django.utils import timezone

from botrunner.incoming import invitations
from botrunner.incoming.recording import Batch, RoomNews
from botrunner.matrix.client import Homeserver, News, is_about_encryption
from botrunner.matrix.errors import MatrixError
from botrunner.matrix.events import ENCRYPTED, absent, is_own_join, since_own_join
from realm.filters import ROOM_MESSAGE

logger = logging.getLogger(__name__)

MAX_PAGES = 100


async def batch_of(news: News, since: str, homeserver: Homeserver, known: set[str]) -> Batch:
    """`known` are the rooms that the bot was in at `since`. Raises `MatrixError`."""
    batch = Batch(news.next_batch)
    for room_id, room in news.rooms("join").items():
        if room_id in known and _is_own(room, homeserver.user_id):
            continue
        timeline = room.get("timeline", {})
        events = [_opened(event, news) for event in timeline.get("events", [])]
        earlier: list[Any] = []
        is_new, is_whole = room_id not in known, True
        if is_new or timeline.get("limited"):
            homeserver.forget_members(room_id)
        if not since:
            # The first start of all: what was said before is not for the bot.
            events = []
        elif is_new and any(is_own_join(event, homeserver.user_id) for event in events):
            since_join = list(since_own_join(events, homeserver.user_id))
            earlier, events = events[: len(events) - len(since_join)], since_join
        elif timeline.get("limited"):
            logger.info("Filling a gap in room %s", room_id)
            start = str(timeline.get("prev_batch") or "")
            gap, is_whole = await _gap(homeserver, room_id, start, "" if is_new else since)
            events = [*gap, *absent(room), *events]
        else:
            events = [*absent(room), *events]
        if is_new or not is_whole:
            batch.members_lost.add(room_id)
        encrypted = homeserver.is_encrypted(room_id)
        batch.joined.append(RoomNews(room_id, events, encrypted, earlier, is_whole))
    batch.invites = invitations.invites(news.rooms("invite"), homeserver.user_id)
    batch.left = list(news.rooms("leave"))
    return batch


def _is_own(room: dict[str, Any], me: str) -> bool:
    """Whether all that is new in a room are messages of the bot: half of what comes in."""
    timeline = room.get("timeline", {})
    if timeline.get("limited") or is_about_encryption(room) or absent(room):
        return False
    return all(
        event.get("sender") == me and event.get("type") == ROOM_MESSAGE
        for event in timeline.get("events", [])
    )


def _opened(event: dict[str, Any], news: News) -> dict[str, Any]:
    if event.get("type") == ENCRYPTED:
        return news.decrypted.get(str(event.get("event_id")), event)
    return event


async def _gap(
    homeserver: Homeserver, room_id: str, start: str, end: str
) -> tuple[list[dict[str, Any]], bool]:
    """The events between two positions, and whether these are all; from the bot's own join on where
    there is no `end`."""
    is_whole = False
    found: list[dict[str, Any]] = []
    oldest = timezone.now() - timedelta(seconds=settings.BOT_RUNNER_MAX_EVENT_AGE)
    is_end = _joined_or_before(homeserver.user_id, oldest, stop_at_join=not end)
    for _ in range(MAX_PAGES):
        try:
            events, next_start = await homeserver.messages(room_id, start, end or None)
        except MatrixError as error:
            if not error.permanent:
                raise
            logger.warning("A gap in room %s cannot be filled: %s", room_id, error)
            break
        for event in events:
            if is_end(event):
                return found[::-1], is_own_join(event, homeserver.user_id)
            found.append(_decrypted(homeserver, room_id, event))
        if not events or not next_start or next_start == start:
            is_whole = bool(end)
            break
        start = next_start
    else:
        logger.warning("A gap in room %s is too long: only its end is read", room_id)
    return found[::-1], is_whole


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
