"""Queries about rooms: their members and their power levels."""

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

# Rooms whose members are fetched after one sync, which waits for them.
MAX_ROOMS = 16
LOOKUP_SECONDS = 5.0
MAX_PAUSE_SECONDS = 600.0
# The default level, for rooms that do not set one.
POWER_TO_REDACT = 50
POWER_OF_CREATOR = 100
# Since this room version, creators have more power than any level.
CREATORS_RULE_SINCE = 12


@dataclass
class MemberLookup:
    """A queue of rooms whose members have to be fetched, with retries."""

    homeserver: Homeserver
    # By room: the number of failures and the time of the next attempt.
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
        """Fetch the members of some rooms, at a sync's position or later. Raises `TokenRefused`."""
        rooms = self._due()[:MAX_ROOMS]
        answers = await asyncio.gather(*(self._members(room_id, position) for room_id in rooms))
        fetched = {
            room_id: members
            for room_id, members in zip(rooms, answers, strict=True)
            if members is not None
        }
        self.drop(fetched)
        return fetched

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
            logger.warning("Fetching the members of room %s failed, retrying: %s", room_id, error)
            return None
        return members_of_state(events)


async def may_moderate(homeserver: Homeserver, room_id: str, user_id: str) -> bool:
    """Return whether a user may redact messages of others in a room; False if the homeserver does not
    answer. Raises `TokenRefused`."""
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
        # This runs between two syncs: one room must not hold up the others.
        logger.warning("Fetching the power levels of room %s failed: %s", room_id, error)
        return False
    if _version(create) >= CREATORS_RULE_SINCE:
        others = _content(create).get("additional_creators")
        creators = [create.get("sender"), *(others if isinstance(others, list) else [])]
        return user_id in creators
    return not event and create.get("sender") == user_id and needed <= POWER_OF_CREATOR


async def may_be_joined_by_others(homeserver: Homeserver, room_id: str) -> bool:
    """Return whether the room has a member besides the bot, or may get one without the bot: by an
    invitation that is pending or by its join rule. Raises `MatrixError`."""
    for membership in ("join", "invite"):
        events = await homeserver.members(
            room_id, "", seconds=LOOKUP_SECONDS, membership=membership
        )
        if any(event.get("state_key") != homeserver.user_id for event in events):
            return True
    rule = await homeserver.state(room_id, "m.room.join_rules", seconds=LOOKUP_SECONDS)
    return _content(rule).get("join_rule", "invite") not in ("invite", "private")


def _power(levels: dict[str, Any], user_id: str) -> int:
    default = _level(levels.get("users_default"), 0)
    users = levels.get("users")
    return _level(users.get(user_id), default) if isinstance(users, dict) else default


def _level(value: Any, default: int) -> int:
    """Parse a power level, which is text in some old rooms."""
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
