"""Read requests from the stream and dispatch their runs."""

import logging
import uuid
from collections import deque
from collections.abc import Iterator

from django.db import DataError, IntegrityError, transaction
from django.db.models import OuterRef, Subquery
from django.db.models.functions import Now

from agents import inbox
from agents.events import stream
from agents.events.schema import MalformedEvent, ParsedEvent
from agents.models import DeletedRun, Event, Run
from agents.runs import fairness
from agents.usage import limits
from agents.worker.dispatch import Dispatcher
from chat.models import Thread
from lib import db
from lib.tracing import tagged

logger = logging.getLogger(__name__)

BACKLOG_SECONDS = 0.05


class Consumer:
    """A consumer of the stream: entries become Celery tasks."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._seen: deque[uuid.UUID] = deque()
        self._dispatcher = Dispatcher()

    def read(self) -> None:
        """Handle new entries; return after at most a second. Raises `RedisError`, `DatabaseError`,
        `OperationalError` of kombu."""
        # Poll while there is a backlog: nothing signals a free slot.
        wait = BACKLOG_SECONDS if fairness.backlog.is_set() else stream.BLOCK_SECONDS
        self.handle(stream.read(self.name, seconds=wait))

    def handle(self, entries: list[stream.Entry]) -> None:
        """Dispatch the runs of these entries, then acknowledge them. After a crash in between entries
        are handled twice, which is harmless: a run is claimed once."""
        if not entries:
            self._dispatcher.dispatch(())
            return
        events = dict(self._parse(entries))
        requested = {event.run_id for event in events.values() if event.run_id}
        known = set(Run.objects.filter(pk__in=requested).values_list("pk", flat=True))
        deferred: set[stream.Entry] = set()
        for entry, event in events.items():
            if not event.run_id or event.run_id in known:
                continue
            try:
                if self._submit(entry, event):
                    known.add(event.run_id)
            except inbox.Limited as error:
                # Only Redis has it, and its sender would not learn of a refusal: it is delivered again.
                logger.info("Request on the stream deferred: %s", error)
                deferred.add(entry)
        ended = {event.ended_thread for event in events.values() if event.ended_thread}
        self._dispatcher.dispatch([*(requested & known), *self._next_runs(ended)])
        self._seen.extend(event.id for event in events.values())
        stream.acknowledge(entry for entry in entries if entry not in deferred)

    def mark_published(self) -> None:
        """Mark the events that were seen on the stream: in one statement, and off the path of the runs.
        After a crash before it the relay publishes them once more."""
        seen = [self._seen.popleft() for _ in range(len(self._seen))]
        if seen:
            with transaction.atomic():
                unpublished = Event.objects.unpublished().filter(pk__in=seen)
                db.in_order(unpublished).update(published_at=Now())

    def _next_runs(self, threads: set[str]) -> list[str]:
        """Return the next run of each of these threads; the claim decides whether it may start."""
        if not threads:
            return []
        unfinished = Run.objects.unfinished().filter(thread=OuterRef("pk")).order_by("position")
        next_runs = Thread.objects.filter(pk__in=threads).values_list(
            Subquery(unfinished.values("pk")[:1]), flat=True
        )
        return list(filter(None, next_runs))

    def _parse(self, entries: list[stream.Entry]) -> Iterator[tuple[stream.Entry, ParsedEvent]]:
        for entry in entries:
            try:
                yield entry, ParsedEvent.parse(entry.raw)
            except MalformedEvent as error:
                stream.dead_letter(entry, str(error))

    def _submit(self, entry: stream.Entry, event: ParsedEvent) -> bool:
        """Submit the request of another program; return False if it is unusable. Raises
        `inbox.Limited`."""
        try:
            if event.payload.get("promptTruncated"):
                # One of ours, whose run has been deleted since.
                raise MalformedEvent("its prompt is truncated, and its run does not exist")
            with tagged(request_id=str(event.id)):
                inbox.submit(
                    inbox.Submission(
                        content=event.text("prompt"),
                        source=Run.Source.STREAM,
                        requester=limits.PROGRAMS,
                        threads=Thread.objects.outside_rooms().exclude(owner__is_active=False),
                        thread_id=event.optional_text("threadId"),
                        model=event.optional_text("model"),
                        correlation_id=event.correlation_id,
                        run_id=event.run_id,
                        event_id=event.id,
                    )
                )
        except inbox.Limited:
            raise
        except inbox.UnknownThread as error:
            stream.dead_letter(entry, _room_reason(event.payload["threadId"]) or str(error))
            return False
        except (MalformedEvent, inbox.Refused) as error:
            if isinstance(error, inbox.Deleted) and _was_deleted(event.run_id):
                # Requested before its thread was deleted.
                logger.info("Request on the stream ignored: its run was deleted")
            else:
                stream.dead_letter(entry, str(error))
            return False
        except IntegrityError as error:
            if not Run.objects.filter(pk=event.run_id).exists():
                stream.dead_letter(entry, _conflict_reason(error))
                return False
        except (DataError, ValueError) as error:
            # The database refuses it, and always will.
            logger.exception("Request on the stream cannot be recorded")
            stream.dead_letter(entry, f"it cannot be recorded ({type(error).__name__})")
            return False
        return True


def _conflict_reason(error: IntegrityError) -> str:
    if db.may_be_a_race(error):
        return "its 'id' is that of another event"
    logger.error("Request on the stream cannot be recorded", exc_info=error)
    return f"it cannot be recorded ({type(error).__name__})"


def _room_reason(thread_id: str) -> str:
    """Return why a request for the thread of a room is refused; empty for another thread."""
    if not Thread.objects.exclude(room_id="").filter(pk=thread_id).exists():
        return ""
    return "its thread belongs to a Matrix room, which accepts messages from the room only"


def _was_deleted(run_id: str | None) -> bool:
    return DeletedRun.objects.filter(pk=run_id).exists()
