"""The events of runs: rows written with the change of a run, and published after the commit."""

import uuid
from functools import partial
from typing import Any

from django.db import transaction
from django.utils import timezone

from agents.events import hooks, stream
from agents.lifecycle.states import EventType
from agents.models import Event, EventQuerySet, Run
from lib import db


def emit_event(
    run: Run,
    type: EventType | None,
    payload: dict[str, Any],
    *,
    to_count: bool | None = None,
    is_published: bool = False,
) -> None:
    """Write an event of a run, and publish it after the commit; nothing without a `type`.

    `to_count`: for an outcome without an attempt, which the rollups count. `is_published`: it was read
    from the stream.
    """
    if type is None:
        return
    is_request = type == EventType.REQUESTED
    event = Event.objects.create(
        id=run.request_event_id if is_request else uuid.uuid4(),
        type=Event.Type(type),
        run=run,
        correlation_id=run.correlation_id,
        payload=payload,
        to_count=to_count,
        to_deliver=None if is_request else hooks.needs_delivery(Event.Type(type)),
        published_at=timezone.now() if is_published else None,
    )
    if not is_published:
        transaction.on_commit(partial(stream.publish, [event.as_entry()]), robust=True)


@db.retry_on_conflict
def republish(events: EventQuerySet) -> int:
    """Add events to the stream again; return their number. Readers recognise repeats by id."""
    entries = [event.as_entry() for event in events]
    # The relay repeats it until a worker has seen them on the stream.
    db.in_order(events).update(published_at=None)
    transaction.on_commit(partial(stream.publish, entries), robust=True)
    return len(entries)
