"""Events that could not be decrypted when they were received, until their keys arrive."""

import logging
from datetime import timedelta
from typing import Any

from django.conf import settings
from django.db import transaction
from django.db.models import F, Window
from django.db.models.functions import RowNumber
from django.utils import timezone

from botrunner.incoming.classification import classify, is_from_person
from botrunner.matrix.events import TimelineEvent
from botrunner.models import RoomEvent

logger = logging.getLogger(__name__)

MAX_OF_SENDER = 50
# The columns that depend on the decrypted event.
DECRYPTED_COLUMNS = ["kind", "state", "type", "content_type", "source", "note", "verdicts"]


def undecrypted() -> list[tuple[int, str, Any]]:
    """Return primary key, room id and source of encrypted events, the latest of each sender: the
    keys of a flood may never arrive. Events that are too old are ignored from now on."""
    waiting = RoomEvent.objects.filter(state=RoomEvent.State.PENDING, kind=RoomEvent.Kind.ENCRYPTED)
    limit = timezone.now() - timedelta(seconds=settings.BOT_RUNNER_MAX_EVENT_AGE)
    waiting.filter(sent_at__lt=limit).update(
        state=RoomEvent.State.IGNORED, note="Its key was never received.", source=None
    )
    place = Window(RowNumber(), partition_by=F("sender"), order_by=F("id").desc())
    latest = waiting.annotate(place=place).filter(place__lte=MAX_OF_SENDER).order_by("place", "id")
    rows = latest.values_list("pk", "room__room_id", "source")[:500]
    return sorted(rows, key=lambda row: row[0])


def record_decrypted(pk: int, source: dict[str, Any], me: str) -> None:
    """Replace an encrypted event with the decrypted one, which is then handled like any other."""
    with transaction.atomic():
        state = RoomEvent.State.PENDING
        claim = RoomEvent.objects.filter(pk=pk, state=state, kind=RoomEvent.Kind.ENCRYPTED)
        # Another process may have decrypted and handled it.
        if not claim.update(state=state):
            return
        row = RoomEvent.objects.with_session().get(pk=pk)
        event = TimelineEvent.parse(source)
        decrypted = None
        if event and is_from_person(event, me):
            decrypted = classify([(row.room, event)], me)[0].row
        if decrypted is None or decrypted.kind == RoomEvent.Kind.ENCRYPTED:
            row.state, row.source = RoomEvent.State.IGNORED, None
            row.note = "Not a message from a person."
        else:
            for name in DECRYPTED_COLUMNS:
                setattr(row, name, getattr(decrypted, name))
        row.save(update_fields=DECRYPTED_COLUMNS)
        logger.info("Event %s in room %s was decrypted", row.event_id, row.room.room_id)
