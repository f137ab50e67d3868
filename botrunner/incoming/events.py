"""What an event of a room's timeline says."""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, TypeGuard

from realm.filters import ROOM_MESSAGE

ENCRYPTED = "m.room.encrypted"
REDACTION = "m.room.redaction"
# What other instances of this bot put into what they say, so that two never talk to each other.
MARK = "app.botrealm.reply"
MAX_ID_LENGTH = 255
UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
# Whatever reads it later may go down fewer levels than what read it first.
MAX_DEPTH = 100


@dataclass(frozen=True)
class Said:
    """An event of a timeline that a person may have meant for the bot."""

    event_id: str
    sender: str
    said_at: datetime
    type: str
    content: dict[str, Any]
    source: dict[str, Any]

    @classmethod
    def parse(cls, source: Any) -> "Said | None":
        """None for what is no event, or a piece of a room's state."""
        if not isinstance(source, dict) or "state_key" in source:
            return None
        event_id, sender = source.get("event_id"), source.get("sender")
        milliseconds, content = source.get("origin_server_ts"), source.get("content")
        if not (
            is_id(event_id)
            and is_id(sender)
            and isinstance(milliseconds, int)
            and isinstance(content, dict)
            and isinstance(source.get("type"), str)
        ):
            return None
        try:
            said_at = datetime.fromtimestamp(milliseconds / 1000, tz=UTC)
        except (OverflowError, ValueError, OSError):
            return None
        return cls(event_id, sender, said_at, source["type"], content, source)

    @cached_property
    def content_type(self) -> str:
        """What kind of message or trigger it is; empty where it does not say."""
        return text_of(self.content, "msgtype" if self.type == ROOM_MESSAGE else "type") or ""

    @property
    def relation(self) -> dict[str, Any]:
        relation = self.content.get("m.relates_to")
        return relation if isinstance(relation, dict) else {}

    @property
    def edits(self) -> str | None:
        """The event that this one puts other words to, if it does."""
        return _id_of(self.relation, "event_id") if self._relates("m.replace") else None

    @property
    def redacts(self) -> str | None:
        """The event that this one takes back, if it does."""
        if self.type != REDACTION:
            return None
        return _id_of(self.content, "redacts") or _id_of(self.source, "redacts")

    @property
    def thread_root(self) -> str:
        """The root of the Matrix thread that it is said in; empty outside of one."""
        return (_id_of(self.relation, "event_id") or "") if self._relates("m.thread") else ""

    def mentions(self, user_id: str) -> bool:
        mentions = self.content.get("m.mentions")
        if isinstance(mentions, dict):
            named = mentions.get("user_ids")
            return isinstance(named, list) and user_id in named
        # From before there were intentional mentions.
        return user_id in self.body

    @cached_property
    def body(self) -> str:
        body = text_of(self.content, "body") or ""
        if "m.in_reply_to" in self.relation and body.startswith("> "):
            body = re.sub(r"\A(?:>[^\n]*\n)+\n?", "", body)
        return body.strip()

    def _relates(self, kind: str) -> bool:
        return self.relation.get("rel_type") == kind


def _id_of(data: dict[str, Any], key: str) -> str | None:
    value = data.get(key)
    return value if is_id(value) else None


def is_id(value: Any) -> TypeGuard[str]:
    """Whether it can be the id of an event, a room or a user: another homeserver may have sent
    anything."""
    return (
        isinstance(value, str) and 0 < len(value) <= MAX_ID_LENGTH and not UNSTORABLE.search(value)
    )


def server_of(user_id: str) -> str:
    return user_id.partition(":")[2]


def storable(data: Any, depth: int = MAX_DEPTH) -> Any:
    """Without what PostgreSQL cannot hold in JSON, and what is `depth` levels down."""
    if isinstance(data, str):
        return UNSTORABLE.sub("", data)
    if depth == 0 or (isinstance(data, float) and not math.isfinite(data)):
        return None
    if isinstance(data, dict):
        return {storable(key): storable(value, depth - 1) for key, value in data.items()}
    if isinstance(data, list):
        return [storable(item, depth - 1) for item in data]
    return data


# What is kept of an event that came out of an encrypted one: the sender wrote all the rest of it.
OF_OPENED = ("event_id", "sender", "origin_server_ts", "room_id", "type", "content")


def opened(source: dict[str, Any]) -> dict[str, Any]:
    """An event that came out of an encrypted one. Its type too was written by the sender, and no
    homeserver has seen it: so it is no piece of a room's state and takes nothing back."""
    kept = {name: source[name] for name in OF_OPENED if name in source}
    return {**kept, "content": {}} if kept.get("type") == REDACTION else kept


def since_own_join(events: Iterable[dict[str, Any]], me: str) -> Iterator[dict[str, Any]]:
    """The events after the bot's last join among them; none if it is not there."""
    kept: list[dict[str, Any]] | None = None
    for event in events:
        if is_own_join(event, me):
            kept = []
        elif kept is not None:
            kept.append(event)
    yield from kept or []


def is_own_join(event: Any, me: str) -> bool:
    """Whether `me` came in by this event: a change of name has the same membership before it."""
    if not isinstance(event, dict) or event.get("type") != "m.room.member":
        return False
    unsigned = event.get("unsigned")
    before = unsigned.get("prev_content") if isinstance(unsigned, dict) else None
    return event.get("state_key") == me and _joins(event.get("content")) and not _joins(before)


def _joins(content: Any) -> bool:
    return isinstance(content, dict) and content.get("membership") == "join"


def text_of(data: dict[str, Any], key: str) -> str | None:
    value = data.get(key)
    return value if isinstance(value, str) else None
