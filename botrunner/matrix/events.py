"""Events of a room's timeline: parsing, and checks of what other servers wrote."""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, TypeGuard

from realm.filters import ROOM_MESSAGE

ENCRYPTED = "m.room.encrypted"
REDACTION = "m.room.redaction"
MEMBER = "m.room.member"
# A field in the content of every reply: instances of this bot ignore each other by it.
REPLY_FIELD = "app.botrealm.reply"
MAX_ID_LENGTH = 255
# The message replied to, as clients put it in front of a reply. Its first line names the sender: other
# lines that begin with ">" are the sender's own.
REPLY_FALLBACK = re.compile(r"\A> (?:\* )?<@[^\s<>]+>[^\n]*(?:\n>[^\n]*)*(?:\r?\n)*")
UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
# Later readers may accept fewer levels than the JSON parser does.
MAX_DEPTH = 100


@dataclass(frozen=True)
class TimelineEvent:
    """An event of a timeline that a person may have addressed to the bot."""

    event_id: str
    sender: str
    sent_at: datetime
    type: str
    content: dict[str, Any]
    source: dict[str, Any]

    @classmethod
    def parse(cls, source: Any) -> "TimelineEvent | None":
        """Return None for malformed events and for state events."""
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
            sent_at = datetime.fromtimestamp(milliseconds / 1000, tz=UTC)
        except (OverflowError, ValueError, OSError):
            return None
        return cls(event_id, sender, sent_at, source["type"], content, source)

    @cached_property
    def content_type(self) -> str:
        """The kind of message or trigger; empty if the content names none."""
        return text_of(self.content, "msgtype" if self.type == ROOM_MESSAGE else "type") or ""

    @property
    def relation(self) -> dict[str, Any]:
        relation = self.content.get("m.relates_to")
        return relation if isinstance(relation, dict) else {}

    @property
    def edits(self) -> str | None:
        """The id of the event that this one edits."""
        return _id_of(self.relation, "event_id") if self._relates("m.replace") else None

    def edited_by(self, edit: "TimelineEvent") -> "TimelineEvent | None":
        """Return this event with the content of an edit; None if the edit has none."""
        new_content = edit.content.get("m.new_content")
        if not isinstance(new_content, dict):
            return None
        content = {**self.content, **new_content}
        return replace(self, content=content, source={**self.source, "content": content})

    @property
    def redacts(self) -> str | None:
        """The id of the event that this one redacts."""
        if self.type != REDACTION:
            return None
        return _id_of(self.content, "redacts") or _id_of(self.source, "redacts")

    @property
    def thread_root(self) -> str:
        """The root of the event's Matrix thread; empty outside of a thread."""
        return (_id_of(self.relation, "event_id") or "") if self._relates("m.thread") else ""

    def mentions(self, user_id: str) -> bool | None:
        """Return whether the sender's client declares a mention of the user; None if it declares no
        mentions at all."""
        mentions = self.content.get("m.mentions")
        if not isinstance(mentions, dict):
            return None
        user_ids = mentions.get("user_ids")
        return isinstance(user_ids, list) and user_id in user_ids

    @property
    def replies_to(self) -> str | None:
        """The id of the event that this one replies to. In a Matrix thread every event names one, for
        clients without threads: that is no reply."""
        target = self.relation.get("m.in_reply_to")
        if not isinstance(target, dict) or self._is_falling_back:
            return None
        return _id_of(target, "event_id")

    @cached_property
    def body(self) -> str:
        body = text_of(self.content, "body") or ""
        if "m.in_reply_to" in self.relation and not self._is_falling_back:
            body = REPLY_FALLBACK.sub("", body)
        return body.strip()

    @property
    def _is_falling_back(self) -> bool:
        return self._relates("m.thread") and self.relation.get("is_falling_back") is True

    def _relates(self, kind: str) -> bool:
        return self.relation.get("rel_type") == kind


def _id_of(data: dict[str, Any], key: str) -> str | None:
    value = data.get(key)
    return value if is_id(value) else None


def is_id(value: Any) -> TypeGuard[str]:
    """Return whether this can be the id of an event, a room or a user: another homeserver may send
    any JSON."""
    return (
        isinstance(value, str) and 0 < len(value) <= MAX_ID_LENGTH and not UNSTORABLE.search(value)
    )


def server_of(user_id: str) -> str:
    return user_id.partition(":")[2]


def storable(data: Any, depth: int = MAX_DEPTH) -> Any:
    """Return the data without what PostgreSQL cannot store as JSON, cut at `depth` levels."""
    if isinstance(data, str):
        return UNSTORABLE.sub("", data)
    if depth == 0 or (isinstance(data, float) and not math.isfinite(data)):
        return None
    if isinstance(data, dict):
        return {storable(key): storable(value, depth - 1) for key, value in data.items()}
    if isinstance(data, list):
        return [storable(item, depth - 1) for item in data]
    return data


# The fields that a decrypted event keeps: its sender wrote all the others too.
DECRYPTED_FIELDS = ("event_id", "sender", "origin_server_ts", "room_id", "type", "content")


def sanitize_decrypted(source: dict[str, Any]) -> dict[str, Any]:
    """Return a decrypted event without the power of a state event or a redaction: its sender wrote
    the type too, and no homeserver has checked it."""
    event = {name: source[name] for name in DECRYPTED_FIELDS if name in source}
    return {**event, "content": {}} if event.get("type") == REDACTION else event


class Entrance:
    """Finds where the bot's time in a room begins: at its last invite, or at its join if that needed
    none. Takes the events newest first."""

    def __init__(self, me: str) -> None:
        self.me = me
        self._is_invited = False

    def is_at(self, event: Any) -> bool:
        """Return whether everything before this event is from before the bot's time."""
        if not isinstance(event, dict) or event.get("type") != MEMBER:
            return False
        if event.get("state_key") != self.me:
            return False
        if is_own_join(event, self.me):
            self._is_invited = _membership_before(event) == "invite"
            return not self._is_invited
        # One invite may follow another: the bot's time begins at the first of them.
        return self._is_invited and (
            _membership(event) != "invite" or _membership_before(event) != "invite"
        )


def since_own_join(events: Iterable[dict[str, Any]], me: str) -> Iterator[dict[str, Any]]:
    """Yield the events after the bot's last join; none without a join."""
    later: list[dict[str, Any]] | None = None
    for event in events:
        if is_own_join(event, me):
            later = []
        elif later is not None:
            later.append(event)
    yield from later or []


def is_own_join(event: Any, me: str) -> bool:
    """Return whether `me` joined by this event; a change of name has the same membership before it."""
    if not isinstance(event, dict) or event.get("type") != MEMBER:
        return False
    return (
        event.get("state_key") == me
        and _membership(event) == "join"
        and _membership_before(event) != "join"
    )


def is_joined(event: dict[str, Any]) -> bool:
    """Return whether the user of a membership event is in the room after it."""
    return _membership(event) == "join"


def display_name(event: Any, user_id: str) -> str:
    """Return the name that a user gives itself by a membership event; empty for any other event."""
    if not isinstance(event, dict) or event.get("type") != MEMBER or not is_joined(event):
        return ""
    if event.get("state_key") != user_id or event.get("sender") != user_id:
        return ""
    return storable(text_of(event["content"], "displayname") or "")


def members_of_state(events: Iterable[dict[str, Any]]) -> dict[str, str]:
    """Return the members of a room: user id to the id of the membership event."""
    return {
        event["state_key"]: event["event_id"]
        for event in events
        if event.get("type") == MEMBER
        and is_id(event.get("state_key"))
        and is_id(event.get("event_id"))
        and is_joined(event)
    }


def absent(room: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the membership events of users outside the room, from the state section of a sync. For
    members that section is incomplete, and the timeline has them too."""
    events = room.get("state", {}).get("events", [])
    return [event for event in events if event.get("type") == MEMBER and not is_joined(event)]


def _membership(event: dict[str, Any]) -> Any:
    content = event.get("content")
    return content.get("membership") if isinstance(content, dict) else None


def _membership_before(event: dict[str, Any]) -> Any:
    unsigned = event.get("unsigned")
    before = unsigned.get("prev_content") if isinstance(unsigned, dict) else None
    return before.get("membership") if isinstance(before, dict) else None


def text_of(data: dict[str, Any], key: str) -> str | None:
    value = data.get(key)
    return value if isinstance(value, str) else None
