"""What the bot runner forgets, and when."""

from collections.abc import Iterator

from agents import retention
from botrunner.models import RoomEvent

# What else wants to write waits for one batch at the most.
BATCH = 500


def prune_some(batch: int = BATCH) -> dict[str, int]:
    """Delete one batch of what may be forgotten; how many rows of what, nothing when there is nothing
    left to delete."""
    for state in RoomEvent.ENDED:
        # In the order of the primary key the database would look at all that is kept, too.
        found = RoomEvent.objects.prunable(state).order_by("created_at")
        if rows := list(found.values_list("pk", flat=True)[:batch]):
            return retention.delete(RoomEvent.objects.filter(pk__in=rows))
    return {}


def prune(go_on: retention.GoOn = lambda: True, *, batch: int = BATCH) -> dict[str, int]:
    """Delete all that may be forgotten, for as long as `go_on` says so; how many rows of what."""

    def deletions() -> Iterator[dict[str, int]]:
        while deleted := prune_some(batch):
            yield deleted

    return retention.at_leisure(deletions(), go_on)


def due() -> dict[str, int]:
    """How many `prune` would delete; what goes with them is not counted."""
    states = (RoomEvent.objects.prunable(state) for state in RoomEvent.ENDED)
    return {str(RoomEvent._meta.verbose_name_plural): sum(found.count() for found in states)}
