"""What the homeserver is asked about rooms: who is in them, and with what power."""

import asyncio
import logging
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from botrunner.matrix.client import Homeserver
from botrunner.matrix.errors import MatrixError, TokenRefused
from botrunner.matrix.events import members_of_state

logger = logging.getLogger(__name__)

# Of rooms whose members are asked for with one sync, which waits for them.
AT_ONCE = 16
LOOKUP_SECONDS = 5.0
MAX_PAUSE_SECONDS = 600.0
# The level that it takes where a room names none.
POWER_TO_REDACT = 50
POWER_OF_CREATOR = 100
# From this version of rooms on, creators have more power than any level gives.
CREATORS_RULE_FROM = 12


@dataclass
class Lookup:
    """Rooms whose members are to be asked for; those that the homeserver did not name, later again."""

    homeserver: Homeserver
    # How often it failed, and when it is tried again.
    _rooms: dict[str, tuple[int, float]] = field(default_factory=dict)

    def add(self, room_ids: Iterable[str]) -> None:
        for room_id in room_ids:
            self._rooms.setdefault(room_id, (0, 0.0))

    def drop(self, room_ids: Iterable[str]) -> None:
        for room_id in room_ids:
            self._rooms.pop(room_id, None)

    @property
    def is_due(self) -> bool:
        return bool(self._due())

    async def fetch(self, position: str) -> dict[str, dict[str, str]]:
        """The members of some rooms, as they are at a sync's position or after it. Raises
        `TokenRefused`."""
        rooms = self._due()[:AT_ONCE]
        answers = await asyncio.gather(*(self._members(room_id, position) for room_id in rooms))
        found = {
            room_id: members
            for room_id, members in zip(rooms, answers, strict=True)
            if members is not None
        }
        self.drop(found)
        return found

    def _due(self) -> list[str]:
        now = time.monotonic()
        return [room_id for room_id, (_, due) in self._rooms.items() if due <= now]

    async def _members(self, room_id: str, position: str) -> dict[str, str] | None:
        try:
            events = await self.homeserver.members(room_id, position, seconds=LOOKUP_SECONDS)
        except TokenRefused:
            raise
        except MatrixError as error:
            failures = self._rooms[room_id][0] + 1
            wait = min(MAX_PAUSE_SECONDS, 2.0**failures)
            self._rooms[room_id] = failures, time.monotonic() + wait
            logger.warning("The members of room %s are not known: %s", room_id, error)
            return None
        return members_of_state(events)


async def may_moderate(homeserver: Homeserver, room_id: str, user_id: str) -> bool:
    """Answer if a user may redact the messages of others in a room; not where the homeserver does not.
    Raises `TokenRefused`."""
    try:
        event = await homeserver.state(room_id, "m.room.power_levels", seconds=LOOKUP_SECONDS)
        levels = _content(event)
        needed = _level(levels.get("redact"), POWER_TO_REDACT)
        if event and _power(levels, user_id) >= needed:
            return True
        create = await homeserver.state(room_id, "m.room.create", seconds=LOOKUP_SECONDS)
    except TokenRefused:
        raise
    except MatrixError as error:
        # It is asked in between two syncs: one room must not hold up the others.
        logger.warning("The power levels of room %s are not known: %s", room_id, error)
        return False
    if _version(create) >= CREATORS_RULE_FROM:
        others = _content(create).get("additional_creators")
        creators = [create.get("sender"), *(others if isinstance(others, list) else [])]
        return user_id in creators
    return not event and create.get("sender") == user_id and needed <= POWER_OF_CREATOR


def _power(levels: dict[str, Any], user_id: str) -> int:
    usual = _level(levels.get("users_default"), 0)
    users = levels.get("users")
    return _level(users.get(user_id), usual) if isinstance(users, dict) else usual


def _level(value: Any, default: int) -> int:
    """Old rooms have some as text."""
    try:
        return default if value is None else int(value)
    except (TypeError, ValueError):
        return default


def _version(create: dict[str, Any]) -> int:
    version = str(_content(create).get("room_version"))
    return int(version) if re.fullmatch("[0-9]{1,9}", version, re.ASCII) else 1


def _content(event: dict[str, Any]) -> dict[str, Any]:
    content = event.get("content")
    return content if isinstance(content, dict) else {}
