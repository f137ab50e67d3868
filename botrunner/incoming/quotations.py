"""Quotations of a message: the message that it replies to and, where it begins a conversation in a
Matrix thread, the root of that.

Texts come from the homeserver, which knows edits and redactions, or from the conversation of the quoted
message. Nothing is quoted that the sender may not see by the room's history visibility.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Literal

from agents import inbox
from agents.runs import corrections
from botrunner.matrix.events import TimelineEvent, storable
from botrunner.matrix.lookup import FoundEvent
from botrunner.models import QuotedEvent, Reply, Room, RoomEvent, RoomMember
from chat.models import Message, Quotation

logger = logging.getLogger(__name__)

MAX_CHARACTERS = 10_000
OPEN = ("world_readable", "shared")
FILES = {"m.image": "image", "m.file": "file", "m.audio": "audio file", "m.video": "video"}
TEXTS = ("m.text", "m.notice", "m.emote")

Kind = Literal["reply", "root"]
Found = Mapping[str, FoundEvent]


class EventsNeeded(Exception):
    """Submitting a message depends on events that are not recorded with their content."""

    def __init__(self, room_id: str, event_ids: list[str], *, related: bool = False) -> None:
        super().__init__(f"Events of room {room_id} are needed: {', '.join(event_ids)}.")
        self.room_id, self.event_ids = room_id, event_ids
        # And the events that these relate to.
        self.related = related


def of(
    row: RoomEvent, event: TimelineEvent, thread_id: str | None, found: Found | None, me: str
) -> tuple[Quotation, ...]:
    """Return the quotations of a message in a thread, which is new if `thread_id` is None. `found` has
    the events that the homeserver shows. Raises `EventsNeeded` if this is None and they are needed."""
    sources = _sources(event, is_new=thread_id is None)
    if not sources:
        return ()
    quoter = _Quoter(row, thread_id, me)
    if found is None and (unknown := [each for each in sources if not quoter.knows(each)]):
        raise EventsNeeded(row.room.room_id, unknown)
    quotations: list[Quotation] = []
    for event_id, kind in sources.items():
        quotations += quoter.quote(event_id, kind, (found or {}).get(event_id))
    return tuple(quotations)


def _sources(event: TimelineEvent, *, is_new: bool) -> dict[str, Kind]:
    sources: dict[str, Kind] = {}
    if is_new and event.thread_root:
        sources[event.thread_root] = "root"
    if event.replies_to:
        sources.setdefault(event.replies_to, "reply")
    sources.pop(event.event_id, None)
    return sources


def record(room: Room, accepted: inbox.Accepted, quotations: Iterable[Quotation]) -> None:
    """Record which events a message quotes, in the transaction that submits it."""
    sources = dict.fromkeys(quotation["source"] for quotation in quotations)
    if sources:
        QuotedEvent.objects.bulk_create(
            QuotedEvent(room=room, message_id=accepted.message_id, event_id=source)
            for source in sources
        )


def remove(room: Room, event_id: str | None) -> bool:
    """Remove what messages quote of a redacted event; return False if none does."""
    quoting = QuotedEvent.objects.filter(room=room, event_id=event_id or "")
    messages = set(quoting.values_list("message", flat=True))
    if messages:
        corrections.redact_quotations(messages, event_id or "")
        quoting.delete()
    return bool(messages)


@dataclass(frozen=True)
class _Turn:
    """A recorded message to the bot with its answer, as far as there is one."""

    event_id: str
    sender: str
    seen_at: datetime
    thread_id: str
    position: int
    # Empty once it was redacted.
    text: str
    answer: str | None


class _Quoter:
    """Makes the quotations of one message."""

    def __init__(self, row: RoomEvent, thread_id: str | None, me: str) -> None:
        self.row = row
        self.thread_id = thread_id
        self.me = me
        self._turns: dict[str, _Turn | None] = {}

    def knows(self, event_id: str) -> bool:
        """Return whether nothing has to be fetched to quote an event."""
        turn = self._turn(event_id)
        return turn is not None and self._may_see(turn.sender, turn.seen_at, visibility="")

    def quote(self, event_id: str, kind: Kind, found: FoundEvent | None) -> list[Quotation]:
        turn = self._turn(event_id)
        if turn:
            visibility = found.visibility if found else ""
            return self._turn_quoted(turn, kind, visibility, has_answer=kind == "root")
        if found is None:
            return []
        event = found.event
        if event.sender == self.me:
            return self._answer_quoted(kind, found)
        if not self._may_see(event.sender, self._seen_at(event_id), found.visibility):
            return []
        return self._quotation(kind, event.sender, _text(event), event_id)

    def _turn_quoted(
        self, turn: _Turn, kind: Kind, visibility: str, *, has_answer: bool
    ) -> list[Quotation]:
        if kind == "reply" and self._is_latest(turn):
            return []
        if not self._may_see(turn.sender, turn.seen_at, visibility):
            return []
        quoted = self._quotation(kind, turn.sender, turn.text, turn.event_id)
        if has_answer:
            quoted += self._quotation(kind, self.me, turn.answer or "", turn.event_id)
        return quoted

    def _answer_quoted(self, kind: Kind, found: FoundEvent) -> list[Quotation]:
        """Quote a message of the bot: an answer, as it is in its conversation, or another one. An
        answer that begins a thread has its question before it."""
        event, visibility = found.event, found.visibility
        asked = event.replies_to or ""
        turn = self._turn(asked) if asked else None
        if turn is None:
            seen_at = self._seen_at(asked) if asked else None
            if not self._may_see(event.sender, seen_at, visibility):
                return []
            return self._quotation(kind, self.me, _text(event), event.event_id)
        if kind == "reply" and self._is_latest(turn):
            return []
        quoted = []
        if kind == "root":
            quoted += self._turn_quoted(turn, kind, visibility, has_answer=False)
        if visibility in OPEN or self._may_see(turn.sender, turn.seen_at, visibility):
            text = _text(event) if turn.answer is None else turn.answer
            quoted += self._quotation(kind, self.me, text, event.event_id)
        return quoted

    def _quotation(self, kind: Kind, sender: str, text: str, source: str) -> list[Quotation]:
        text = storable(text).strip()
        if not text:
            return []
        if len(text) > MAX_CHARACTERS:
            text = f"{text[:MAX_CHARACTERS]} [...]"
        author: Literal["user", "assistant", "other"] = "other"
        if sender in (self.me, self.row.sender):
            author = "assistant" if sender == self.me else "user"
        return [Quotation(kind=kind, author=author, text=text, source=source)]

    def _is_latest(self, turn: _Turn) -> bool:
        """Return whether the turn is the last one of the conversation: the model is sent it just before
        the message."""
        if turn.thread_id != self.thread_id:
            return False
        later = Message.objects.filter(thread=self.thread_id, position__gt=turn.position + 1)
        return not later.exists()

    def _may_see(self, sender: str, seen_at: datetime | None, visibility: str) -> bool:
        """Return whether the room shows an event to the sender of the message."""
        if sender == self.row.sender or visibility in OPEN:
            return True
        joined = RoomMember.objects.filter(room=self.row.room, user_id=self.row.sender)
        return seen_at is not None and joined.filter(joined_at__lte=seen_at).exists()

    def _seen_at(self, event_id: str) -> datetime | None:
        rows = RoomEvent.objects.filter(room=self.row.room, event_id=event_id)
        return rows.values_list("created_at", flat=True).first()

    def _turn(self, event_id: str) -> _Turn | None:
        if event_id not in self._turns:
            self._turns[event_id] = self._load_turn(event_id)
        return self._turns[event_id]

    def _load_turn(self, event_id: str) -> _Turn | None:
        replies = Reply.objects.filter(room=self.row.room, message__event_id=event_id)
        columns = (
            *("message__sender", "message__created_at", "run__thread_id", "run__position"),
            *("run__message__content", "run__answer__content", "run__message__redacted_at"),
        )
        found = replies.exclude(run=None).order_by("pk").values_list(*columns).first()
        if found is None:
            return None
        *columns_of_turn, redacted_at = found
        turn = _Turn(event_id, *columns_of_turn)
        # The room may still have the answer.
        return replace(turn, text="", answer="") if redacted_at else turn


def _text(event: TimelineEvent) -> str:
    """Return the text of an event; of a file its name."""
    if event.content_type in TEXTS:
        return event.body
    if event.content_type in FILES:
        return f"[{FILES[event.content_type]}: {event.body}]"
    return ""
