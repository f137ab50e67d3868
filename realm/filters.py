"""When a bot command fires: the filter of a command, as it is sent and stored."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MATRIX_EVENT = "matrix-event"
BOT_TRIGGER = "app.boxel.bot-trigger"
ROOM_MESSAGE = "m.room.message"
EVENT_TYPES = (BOT_TRIGGER, ROOM_MESSAGE)
MAX_LENGTH = 255


class InvalidFilter(ValueError):
    """The filter makes no sense; the message says why and is safe to show, `key` where ("" for the
    whole)."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(f"{key}: {message}" if key else message)
        self.key = key
        self.message = message


@dataclass(frozen=True)
class Filter:
    """Which events a command is for.

    `content_type` is the `type` in the content of a trigger, the `msgtype` of a message. Where
    `prefix` is set the text must begin with it; where `mention` is set the bot must be mentioned.
    """

    type: str
    event_type: str
    content_type: str
    prefix: str | None = None
    mention: bool | None = None

    @classmethod
    def parse(cls, value: Any) -> "Filter":
        """Raises `InvalidFilter`. A key that is not known is refused: to drop a condition silently
        would make the command fire too often."""
        if not isinstance(value, Mapping):
            raise InvalidFilter("", "It must be an object.")
        known = list(cls.__dataclass_fields__)
        for key in value:
            if key not in known:
                raise InvalidFilter("", f"There is no key {key[:40]!r}, only {', '.join(known)}.")
        return cls(
            type=_one_of(value, "type", (MATRIX_EVENT,)),
            event_type=_one_of(value, "event_type", EVENT_TYPES),
            content_type=_text(value, "content_type"),
            prefix=_text(value, "prefix") if value.get("prefix") is not None else None,
            mention=_switch(value, "mention"),
        )

    def in_words(self) -> str:
        """What it lets pass, for an admin to read."""
        if self.event_type == BOT_TRIGGER:
            return f"a trigger of type {self.content_type!r}"
        conditions = []
        if self.prefix:
            conditions.append(f"begins with {self.prefix!r}")
        if self.mention:
            conditions.append("mentions the bot")
        if not conditions:
            return f"any message of type {self.content_type!r}"
        return f"a message of type {self.content_type!r} that {' and '.join(conditions)}"


def _one_of(value: Mapping[str, Any], key: str, choices: tuple[str, ...]) -> str:
    found = value.get(key)
    if not isinstance(found, str) or found not in choices:
        raise InvalidFilter(key, f"It must be {' or '.join(map(repr, choices))}.")
    return found


def _text(value: Mapping[str, Any], key: str) -> str:
    found = value.get(key)
    if not isinstance(found, str) or not found.strip() or len(found) > MAX_LENGTH:
        raise InvalidFilter(key, f"It must be a string of 1 to {MAX_LENGTH} characters.")
    if "\x00" in found:
        raise InvalidFilter(key, "It must not hold a null character.")
    return found


def _switch(value: Mapping[str, Any], key: str) -> bool | None:
    found = value.get(key)
    if found is not None and not isinstance(found, bool):
        raise InvalidFilter(key, "It must be true or false.")
    return found
