"""Events as they are read from the stream, where any program may have written them."""

import uuid
from dataclasses import dataclass
from typing import Any

import orjson

from agents.models import Event
from chat.models import CHOSEN_ID

ENDS = {Event.Type.COMPLETED, Event.Type.FAILED, Event.Type.CANCELLED}


class Malformed(Exception):
    """The entry is not an event; the message says why."""


@dataclass(frozen=True)
class Told:
    """An event as it was read from the stream."""

    id: uuid.UUID
    type: str
    correlation_id: str | None
    payload: dict[str, Any]

    @classmethod
    def parse(cls, raw: bytes | None) -> "Told":
        """Raises `Malformed`."""
        if raw is None:
            raise Malformed("it has no field 'event'")
        try:
            event = orjson.loads(raw)
        except orjson.JSONDecodeError:
            raise Malformed("'event' is not JSON") from None
        if not isinstance(event, dict):
            raise Malformed("'event' is not an object")
        try:
            event_id = uuid.UUID(event.get("id"))
        except (TypeError, ValueError, AttributeError):
            raise Malformed("'id' is not a UUID") from None
        kind, correlation_id, payload = map(event.get, ("type", "correlationId", "payload"))
        if not isinstance(kind, str):
            raise Malformed("'type' is not a string")
        if not isinstance(correlation_id, str | None):
            raise Malformed("'correlationId' is not a string")
        if not isinstance(payload, dict):
            raise Malformed("'payload' is not an object")
        told = cls(event_id, kind, correlation_id, payload)
        if told.type == Event.Type.REQUESTED:
            told.chosen_id("runId")
        elif told.type in ENDS and payload.get("threadId") is not None:
            told.chosen_id("threadId")
        return told

    @property
    def run_id(self) -> str | None:
        """The run that is asked for, if one is."""
        return self.payload["runId"] if self.type == Event.Type.REQUESTED else None

    @property
    def ended_thread(self) -> str | None:
        """The thread whose run has ended, if one has: its next run may go on."""
        return self.optional_text("threadId") if self.type in ENDS else None

    def text(self, key: str) -> str:
        value = self.payload.get(key)
        if not isinstance(value, str):
            raise Malformed(f"'payload.{key}' is not a string")
        return value

    def chosen_id(self, key: str) -> str:
        if not CHOSEN_ID.match(value := self.text(key)):
            raise Malformed(f"{key} must be 1 to 64 letters, digits, '_' or '-'")
        return value

    def optional_text(self, key: str) -> str | None:
        return None if self.payload.get(key) is None else self.text(key)
