"""Look-ups of single events, for which a sync waits: bounded, and left out where one fails."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from botrunner.matrix.client import LOOKUP_SECONDS, Homeserver
from botrunner.matrix.errors import MatrixError, MatrixTimeout, TokenRefused
from botrunner.matrix.events import ENCRYPTED, TimelineEvent, text_of

logger = logging.getLogger(__name__)

# Without look-ups after one that had no answer: the next sync must not wait for each message.
PAUSE_SECONDS = 30.0
MAX_EVENTS = 4
# Of one room in a minute.
MAX_OF_ROOM = 30


@dataclass(frozen=True)
class FoundEvent:
    """An event as it is now, decrypted, with its latest edit."""

    event: TimelineEvent
    # The room's history visibility at the event.
    visibility: str


class EventLookup:
    def __init__(self, homeserver: Homeserver) -> None:
        self.homeserver = homeserver
        self._paused_until = 0.0
        self._minute = 0
        self._of_rooms: Counter[str] = Counter()

    async def fetch(
        self, room_id: str, event_ids: Iterable[str], *, related: bool = False
    ) -> dict[str, FoundEvent]:
        """Return the events that the homeserver shows to the bot and that can be decrypted; with
        `related` also those that they relate to. Raises `TokenRefused`."""
        found = await self._fetch_all(room_id, event_ids)
        if related:
            events = [each.event for each in found.values()]
            targets = {
                each for event in events for each in (event.thread_root, event.replies_to) if each
            }
            found |= await self._fetch_all(room_id, sorted(targets - found.keys()))
        return found

    async def _fetch_all(self, room_id: str, event_ids: Iterable[str]) -> dict[str, FoundEvent]:
        if time.monotonic() < self._paused_until:
            return {}
        minute = int(time.monotonic() // 60)
        if minute != self._minute:
            self._minute, self._of_rooms = minute, Counter()
        ids = list(event_ids)[: min(MAX_EVENTS, MAX_OF_ROOM - self._of_rooms[room_id])]
        self._of_rooms[room_id] += len(ids)
        answers = await asyncio.gather(*(self._fetch(room_id, event_id) for event_id in ids))
        return {
            event_id: answer
            for event_id, answer in zip(ids, answers, strict=True)
            if answer is not None
        }

    async def _fetch(self, room_id: str, event_id: str) -> FoundEvent | None:
        try:
            body = await self.homeserver.event(room_id, event_id, seconds=LOOKUP_SECONDS)
        except TokenRefused:
            raise
        except MatrixError as error:
            if isinstance(error, MatrixTimeout) or not error.permanent:
                self._paused_until = time.monotonic() + PAUSE_SECONDS
            logger.info("Event %s of room %s is not quoted: %s", event_id, room_id, error)
            return None
        source = body.get("event")
        if not isinstance(source, dict) or source.get("event_id") != event_id:
            return None
        if source.get("room_id", room_id) != room_id:
            return None
        event = self._current(room_id, source)
        return FoundEvent(event, _visibility(body.get("state"))) if event else None

    def _current(self, room_id: str, source: dict[str, Any]) -> TimelineEvent | None:
        event = self._decrypted(room_id, source)
        edit = self._decrypted(
            room_id, _dict(_dict(source, "unsigned", "m.relations"), "m.replace")
        )
        if event is None or edit is None:
            return event
        new_content = edit.content.get("m.new_content")
        if edit.sender != event.sender or edit.edits != event.event_id:
            return event
        if not isinstance(new_content, dict):
            return event
        return replace(event, content={**event.content, **new_content})

    def _decrypted(self, room_id: str, source: dict[str, Any]) -> TimelineEvent | None:
        """Return None if the event has no content, is malformed or cannot be decrypted."""
        decrypted: dict[str, Any] | None = source
        if source.get("type") == ENCRYPTED:
            decrypted = self.homeserver.decrypt(room_id, source)
        event = TimelineEvent.parse(decrypted)
        return event if event and event.content else None


def _dict(data: dict[str, Any], *path: str) -> dict[str, Any]:
    for name in path:
        found = data.get(name)
        data = found if isinstance(found, dict) else {}
    return data


def _visibility(state: Any) -> str:
    """Return the history visibility in a room's state. Without an event it is `shared`."""
    for event in state if isinstance(state, list) else []:
        if isinstance(event, dict) and event.get("type") == "m.room.history_visibility":
            return text_of(_dict(event, "content"), "history_visibility") or ""
    return "shared"
