"""The filter of a bot command, which selects the room events that run it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MATRIX_EVENT = "matrix-event"
BOT_TRIGGER = "app.boxel.bot-trigger"
ROOM_MESSAGE = "m.room.message"
EVENT_TYPES = (BOT_TRIGGER, ROOM_MESSAGE)
MAX_LENGTH = 255
# Messages of other specified types are files, places or requests: their body is a name for them.
TEXT_TYPES = ("m.text", "m.emote", "m.notice")


class InvalidFilter(ValueError):
    """The filter is invalid. The message has the reason and is safe to show; `key` is the invalid key,
    "" for the whole filter."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(f"{key}: {message}" if key else message)
        self.key = key
        self.message = message


@dataclass(frozen=True)
class EventFilter:
    """The events that run a command.

    `content_type` is the `type` in the content of a trigger, the `msgtype` of a message. If `prefix` is
    set, the text must start with it; if `mention` is set, the bot must be mentioned.
    """

    type: str
    event_type: str
    content_type: str
    prefix: str | None = None
    mention: bool | None = None

    @classmethod
    def parse(cls, value: Any) -> "EventFilter":
        """Parse a filter. An unknown key is refused, because a dropped condition would run the command
        too often. Raises `InvalidFilter`."""
        if not isinstance(value, Mapping):
            raise InvalidFilter("", "It must be an object.")
        known = list(cls.__dataclass_fields__)
        for key in value:
            if key not in known:
                raise InvalidFilter(
                    "", f"Unknown key {key[:40]!r}. Known keys: {', '.join(known)}."
                )
        return cls(
            type=_one_of(value, "type", (MATRIX_EVENT,)),
            event_type=_one_of(value, "event_type", EVENT_TYPES),
            content_type=_text(value, "content_type"),
            prefix=_text(value, "prefix") if value.get("prefix") is not None else None,
            mention=_switch(value, "mention"),
        )

    def check_readable(self) -> None:
        """Raise `InvalidFilter` if the events have no text that a command could be given."""
        if self.event_type == ROOM_MESSAGE and not is_text(self.content_type):
            raise InvalidFilter(
                "content_type",
                f"Messages of type {self.content_type!r} have no text, and commands get text only. "
                "Use 'm.text'.",
            )

    def in_words(self) -> str:
        """Describe the filter for people."""
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


def is_text(content_type: str) -> bool:
    """Return whether messages of this `msgtype` are text. Those of other applications have a text for
    all clients as their body."""
    is_specified = content_type.startswith(("m.", "org.matrix.msc"))
    return content_type in TEXT_TYPES or not is_specified


def _one_of(value: Mapping[str, Any], key: str, choices: tuple[str, ...]) -> str:
    choice = value.get(key)
    if not isinstance(choice, str) or choice not in choices:
        raise InvalidFilter(key, f"It must be {' or '.join(map(repr, choices))}.")
    return choice


def _text(value: Mapping[str, Any], key: str) -> str:
    text = value.get(key)
    if not isinstance(text, str) or not text.strip() or len(text) > MAX_LENGTH:
        raise InvalidFilter(key, f"It must be a string of 1 to {MAX_LENGTH} characters.")
    if "\x00" in text:
        raise InvalidFilter(key, "It must not hold a null character.")
    return text


def _switch(value: Mapping[str, Any], key: str) -> bool | None:
    flag = value.get(key)
    if flag is not None and not isinstance(flag, bool):
        raise InvalidFilter(key, "It must be true or false.")
    return flag
