"""Events of runs, and their entries on the stream."""

import uuid
from typing import Any

from django.db import models
from django.db.models import Q
from django.utils import timezone

from agents.models.runs import Run

# Redis keeps each event for a day, and all of them in memory.
ENTRY_TEXT_BYTES = 16 * 1024
LONG_TEXTS = ("prompt", "output", "error")


class EventQuerySet(models.QuerySet["Event"]):
    def unpublished(self) -> "EventQuerySet":
        return self.filter(published_at=None)


class Event(models.Model):
    """An event of the stream: written with the change of its run, published after the commit, and
    published again by the relay until a worker has seen it on the stream."""

    class Type(models.TextChoices):
        REQUESTED = "agent.run.requested"
        COMPLETED = "agent.run.completed"
        FAILED = "agent.run.failed"
        CANCELLED = "agent.run.cancelled"

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    type = models.CharField(max_length=30, choices=Type.choices)
    run = models.ForeignKey(Run, models.CASCADE, related_name="events")
    correlation_id = models.CharField(max_length=200)
    payload = models.JSONField()
    created_at = models.DateTimeField(default=timezone.now)
    published_at = models.DateTimeField(
        null=True, blank=True, help_text="The time at which it was seen on the stream."
    )
    # Of an outcome without an attempt: True until the rollups have counted it. Empty for all others.
    to_count = models.BooleanField(null=True, editable=False)
    # Of an outcome: True until its webhook deliveries are created (agents.events.hooks).
    to_deliver = models.BooleanField(null=True, editable=False)

    objects = EventQuerySet.as_manager()

    class Meta:
        ordering = ["created_at"]
        permissions = [("replay_event", "Can publish events again")]
        indexes = [
            # The relay's query.
            models.Index(
                fields=["created_at"], name="event_unpublished", condition=Q(published_at=None)
            ),
            # rollups.fold()
            models.Index(fields=["id"], name="event_to_count", condition=Q(to_count=True)),
            # webhooks.deliveries.fan_out()
            models.Index(
                fields=["created_at"], name="event_to_deliver", condition=Q(to_deliver=True)
            ),
            # The admin's list, newest first, whole and by type.
            models.Index(fields=["-created_at", "id"], name="event_newest"),
            models.Index(fields=["type", "-created_at"], name="event_by_type"),
            # agents.retention: the oldest of those that may go.
            models.Index(
                fields=["published_at"],
                name="event_published",
                condition=Q(published_at__isnull=False),
            ),
        ]

    def __str__(self) -> str:
        return f"{self.type} {self.run_id}"

    def as_entry(self) -> dict[str, object]:
        """Return the entry for the stream, with long texts shortened; the database has them whole."""
        return {
            "id": str(self.id),
            "type": self.type,
            "timestamp": self.created_at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "correlationId": self.correlation_id,
            "payload": shortened(self.payload),
        }


def shortened(payload: dict[str, Any]) -> dict[str, Any]:
    """Cut the texts of a payload to ENTRY_TEXT_BYTES; a cut one is marked, as in `promptTruncated`."""
    short = payload
    for name in LONG_TEXTS:
        text = payload.get(name)
        # No character has more than four bytes: most texts need not be encoded.
        if isinstance(text, str) and len(text) * 4 > ENTRY_TEXT_BYTES:
            encoded = text.encode(errors="replace")
            if len(encoded) > ENTRY_TEXT_BYTES:
                start = encoded[:ENTRY_TEXT_BYTES].decode(errors="ignore")
                short = {**short, name: start, f"{name}Truncated": True}
    return short
