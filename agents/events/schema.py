"""Parse the events of the stream, which any program may have written."""

import uuid
from dataclasses import dataclass
from typing import Any

import orjson

from agents.models import Event
from chat.models import CHOSEN_ID

ENDS = {Event.Type.COMPLETED, Event.Type.FAILED, Event.Type.CANCELLED}


class MalformedEvent(Exception):
    """The entry is not an event; the message gives the reason."""


@dataclass(frozen=True)
class ParsedEvent:
    """An event of the stream."""

    id: uuid.UUID
    type: str
    correlation_id: str | None
    payload: dict[str, Any]

    @classmethod
    def parse(cls, raw: bytes | None) -> "ParsedEvent":
        """Return the event. Raises `MalformedEvent`."""
        if raw is None:
            raise MalformedEvent("it has no field 'event'")
        try:
            fields = orjson.loads(raw)
        except orjson.JSONDecodeError:
            raise MalformedEvent("'event' is not JSON") from None
        if not isinstance(fields, dict):
            raise MalformedEvent("'event' is not an object")
        try:
            event_id = uuid.UUID(fields.get("id"))
        except (TypeError, ValueError, AttributeError):
            raise MalformedEvent("'id' is not a UUID") from None
        kind, correlation_id, payload = map(fields.get, ("type", "correlationId", "payload"))
        if not isinstance(kind, str):
            raise MalformedEvent("'type' is not a string")
        if not isinstance(correlation_id, str | None):
            raise MalformedEvent("'correlationId' is not a string")
        if not isinstance(payload, dict):
            raise MalformedEvent("'payload' is not an object")
        event = cls(event_id, kind, correlation_id, payload)
        if event.type == Event.Type.REQUESTED:
            event.chosen_id("runId")
        elif event.type in ENDS and payload.get("threadId") is not None:
            event.chosen_id("threadId")
        return event

    @property
    def run_id(self) -> str | None:
        """The requested run, if the event is a request."""
        return self.payload["runId"] if self.type == Event.Type.REQUESTED else None

    @property
    def ended_thread(self) -> str | None:
        """The thread of an ended run, if the event is an outcome: its next run may start."""
        return self.optional_text("threadId") if self.type in ENDS else None

    def text(self, key: str) -> str:
        value = self.payload.get(key)
        if not isinstance(value, str):
            raise MalformedEvent(f"'payload.{key}' is not a string")
        return value

    def chosen_id(self, key: str) -> str:
        if not CHOSEN_ID.match(value := self.text(key)):
            raise MalformedEvent(f"{key} must be 1 to 64 letters, digits, '_' or '-'")
        return value

    def optional_text(self, key: str) -> str | None:
        return None if self.payload.get(key) is None else self.text(key)
