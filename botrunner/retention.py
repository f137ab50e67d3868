"""Retention of room events."""

from collections.abc import Iterator

from agents import retention
from botrunner.models import RoomEvent

# Other writers wait for one batch at most.
BATCH = 500


def prune_some(batch: int = BATCH) -> dict[str, int]:
    """Delete one batch of prunable events; return the number of rows by model, empty at the end."""
    for state in RoomEvent.ENDED:
        # In the order of the primary key the database would scan the other events too.
        events = RoomEvent.objects.prunable(state).order_by("created_at")
        if rows := list(events.values_list("pk", flat=True)[:batch]):
            return retention.delete(RoomEvent.objects.filter(pk__in=rows))
    return {}


def prune(
    may_continue: retention.MayContinue = lambda: True, *, batch: int = BATCH
) -> dict[str, int]:
    """Delete all prunable events while `may_continue` allows it; return the number of rows by model."""

    def deletions() -> Iterator[dict[str, int]]:
        while deleted := prune_some(batch):
            yield deleted

    return retention.delete_in_steps(deletions(), may_continue)


def due() -> dict[str, int]:
    """Count the events that `prune` would delete, without their replies."""
    states = (RoomEvent.objects.prunable(state) for state in RoomEvent.ENDED)
    return {str(RoomEvent._meta.verbose_name_plural): sum(events.count() for events in states)}
