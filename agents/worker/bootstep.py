"""The worker's side of the stream: a step of every Celery worker, so that
`celery -A config worker` is all that an operator starts.

The reader takes entries through the consumer group and hands each run to a Celery task. The keeper
looks each second for what was missed: by Redis, by a dead worker, by an attempt that is due again.
"""

import gc
import logging
import os
import random
import socket
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any

from celery import bootsteps, signals
from celery.worker import state
from django.conf import settings
from django.db import (
    DataError,
    IntegrityError,
    close_old_connections,
    connection,
    transaction,
)
from django.db.models import OuterRef, Subquery
from django.db.models.functions import Now
from django.utils import timezone
from kombu.exceptions import OperationalError as BrokerError
from redis.exceptions import RedisError

from agents import inbox, retention, tasks
from agents.events import publisher, stream
from agents.events.schema import MalformedEvent, ParsedEvent
from agents.llm import completions
from agents.models import DeletedRun, Event, Run
from agents.runs import actions, execution, fairness, memory
from agents.usage import limits, rollups
from agents.worker import dispatch, presence
from agents.worker.maintenance import CHORES
from chat.models import Thread
from lib import db
from lib.tracing import tagged

logger = logging.getLogger(__name__)

SWEEP_SECONDS = 1.0
TURN_SECONDS = 0.05
HOUSEKEEPING_SECONDS = 60.0
MAX_PAUSE_SECONDS = 5.0
SWEEP_BATCH = 500
SUMMARY_SECONDS = 15.0
FOLD_SECONDS = 5.0
SWITCH_SECONDS = 0.0005
GARBAGE_OBJECTS = 10_000
LAST_SECONDS = 1.0
PRUNE_SECONDS = 15.0
# The keeper does its chores in turn, and has more pressing ones than old rows.
PRUNE_AT_ONCE_SECONDS = 0.5
# What passes by itself, when whoever is away comes back.
TROUBLE = (BrokerError, *db.SERVICE_ERRORS)
# An event that no worker has seen on the stream for this long is added again.
RELAY_PATIENCE = timedelta(seconds=5)
# An entry that a worker took and did not acknowledge for this long is taken over.
ENTRY_PATIENCE = timedelta(seconds=10)


class Reader:
    """Turns entries of the stream into tasks."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._seen: deque[uuid.UUID] = deque()
        self._turns = dispatch.Turns()

    def read(self) -> None:
        """Handle what is new; returns after a second at the most. Raises `RedisError`,
        `DatabaseError`, `OperationalError` of kombu."""
        # Slots become free without a word here while runs wait for their turn.
        wait = TURN_SECONDS if fairness.left.is_set() else stream.BLOCK_SECONDS
        self.handle(stream.read(self.name, seconds=wait))

    def handle(self, entries: list[stream.Entry]) -> None:
        """Hand the runs of these entries to Celery and acknowledge. Whatever is repeated after dying
        in between is harmless: a run is claimed once."""
        if not entries:
            self._turns.hand(())
            return
        told = dict(self._parse(entries))
        requested = {event.run_id for event in told.values() if event.run_id}
        known = set(Run.objects.filter(pk__in=requested).values_list("pk", flat=True))
        late: set[stream.Entry] = set()
        for entry, event in told.items():
            if not event.run_id or event.run_id in known:
                continue
            try:
                if self._take_in(entry, event):
                    known.add(event.run_id)
            except inbox.Limited as error:
                # Nobody else has it, and nobody would hear of a refusal: it comes again.
                logger.info("A request on the stream has to wait: %s", error)
                late.add(entry)
        ended = {event.ended_thread for event in told.values() if event.ended_thread}
        self._turns.hand([*(requested & known), *self._following(ended)])
        self._seen.extend(event.id for event in told.values())
        stream.acknowledge(entry for entry in entries if entry not in late)

    def mark_published(self) -> None:
        """Note which events have been seen on the stream: in one statement for many, and off the way
        of the runs. Dying before it makes the relay add them once more."""
        seen = [self._seen.popleft() for _ in range(len(self._seen))]
        if seen:
            with transaction.atomic():
                unpublished = Event.objects.unpublished().filter(pk__in=seen)
                db.in_order(unpublished).update(published_at=Now())

    def _following(self, threads: set[str]) -> list[str]:
        """The next run of each of these threads. Whether it may be claimed is for the claim to tell."""
        if not threads:
            return []
        unfinished = Run.objects.unfinished().filter(thread=OuterRef("pk")).order_by("position")
        following = Thread.objects.filter(pk__in=threads).values_list(
            Subquery(unfinished.values("pk")[:1]), flat=True
        )
        return list(filter(None, following))

    def _parse(self, entries: list[stream.Entry]) -> Iterator[tuple[stream.Entry, ParsedEvent]]:
        for entry in entries:
            try:
                yield entry, ParsedEvent.parse(entry.raw)
            except MalformedEvent as error:
                stream.dead_letter(entry, str(error))

    def _take_in(self, entry: stream.Entry, event: ParsedEvent) -> bool:
        """Make a run of another program's request. False when nothing can be made of it. Raises
        `inbox.Limited`."""
        try:
            if event.payload.get("promptTruncated"):
                # One of ours, whose run has been deleted since.
                raise MalformedEvent("its prompt is not whole, and its run is not there")
            with tagged(request_id=str(event.id)):
                inbox.ask(
                    content=event.text("prompt"),
                    source=Run.Source.STREAM,
                    asker=limits.PROGRAMS,
                    threads=Thread.objects.outside_rooms().exclude(owner__is_active=False),
                    thread_id=event.optional_text("threadId"),
                    model=event.optional_text("model"),
                    correlation_id=event.correlation_id,
                    run_id=event.run_id,
                    event_id=event.id,
                )
        except inbox.Limited:
            raise
        except inbox.UnknownThread as error:
            stream.dead_letter(entry, _of_room(event.payload["threadId"]) or str(error))
            return False
        except (MalformedEvent, inbox.Refused) as error:
            if isinstance(error, inbox.Deleted) and _was_deleted(event.run_id):
                # Asked before its thread was deleted, with all that was said there.
                logger.info("The run of a request on the stream was deleted")
            else:
                stream.dead_letter(entry, str(error))
            return False
        except IntegrityError:
            if not Run.objects.filter(pk=event.run_id).exists():
                stream.dead_letter(entry, "its 'id' is that of another event")
                return False
        except (DataError, ValueError) as error:
            # The database refuses it, and would refuse it for ever.
            logger.exception("A request on the stream cannot be recorded")
            stream.dead_letter(entry, f"it cannot be recorded ({type(error).__name__})")
            return False
        return True


def _of_room(thread_id: str) -> str:
    """The reason why a request for the thread of a room is set aside; empty for another thread."""
    if not Thread.objects.exclude(room_id="").filter(pk=thread_id).exists():
        return ""
    return "its thread belongs to a Matrix room, and only what is asked in the room enters it"


def _was_deleted(run_id: str | None) -> bool:
    return DeletedRun.objects.filter(pk=run_id).exists()


class Keeper:
    """Looks for what was missed. One worker at a time does it, which spares the others the work; two
    at once do no harm."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        # Each chore and how often it is done; what takes long is done less often.
        self._chores: list[tuple[Callable[[], object], float]] = [
            (sweep_runs, SWEEP_SECONDS),
            (self._take_over, SWEEP_SECONDS),
            (relay, RELAY_PATIENCE.total_seconds()),
            (sweep_summaries, SUMMARY_SECONDS),
            (rollups.fold, FOLD_SECONDS),
            (rollups.forget, HOUSEKEEPING_SECONDS),
            (limits.forget, HOUSEKEEPING_SECONDS),
            (stream.trim, HOUSEKEEPING_SECONDS),
            (stream.trim_bytes, FOLD_SECONDS),
            (sweep_old, PRUNE_SECONDS),
            (partial(stream.forget_consumers, idle=timedelta(hours=1)), HOUSEKEEPING_SECONDS),
            (presence.forget_gone, HOUSEKEEPING_SECONDS),
            *CHORES,
        ]
        self._next = [0.0] * len(self._chores)

    def tick(self) -> None:
        """Do what is due. One chore that fails does not keep the others from being done; then it
        raises like `Reader.read()`."""
        self.reader.mark_published()
        # By each worker, and without Redis too: nobody else ends these.
        actions.expire_overdue()
        if not stream.acquire_leadership(self.reader.name):
            return
        failure: Exception | None = None
        for number, (chore, seconds) in enumerate(self._chores):
            started = time.monotonic()
            if started < self._next[number]:
                continue
            try:
                chore()
            except TROUBLE as error:
                failure = error
            ended = time.monotonic()
            # What takes long is done less often, but not for long: it may have waited for a database
            # that is back now, and all waits for the sweep then.
            rest = min(20 * (ended - started), MAX_PAUSE_SECONDS)
            self._next[number] = max(started + seconds * 0.9, ended + rest)
        if failure:
            raise failure

    def _take_over(self) -> None:
        self.reader.handle(stream.claim_stale(self.reader.name, idle=ENTRY_PATIENCE))


def sweep_runs() -> int:
    """Hand over the runs that are due and that nobody works on, each asker's in turn. How many.

    While Celery's queue is long, none: they may be in it, and to hand them over again and again would
    make it longer still.
    """
    free = dispatch.room()
    if not free:
        return 0
    if handed := dispatch.hand_over_fairly(Run.objects.dispatch_lost(), free):
        logger.info("Handed over %d runs that were due and not being worked on", handed)
    return handed


def sweep_summaries() -> None:
    """Have the summaries made that a worker or the model failed at."""
    if not queue_is_long():
        for thread_id in memory.due():
            tasks.summarise.delay(thread_id)


def sweep_old() -> None:
    """Delete a little of what is too old; the work that waits goes before."""
    enough = time.monotonic() + PRUNE_AT_ONCE_SECONDS

    def go_on() -> bool:
        return time.monotonic() < enough and not queue_is_long()

    if go_on() and (gone := retention.prune_everything(go_on)):
        logger.info("Pruned %s", ", ".join(f"{count} {name}" for name, count in gone.items()))


def queue_is_long() -> bool:
    return dispatch.queued() >= SWEEP_BATCH


def relay() -> int:
    """Add the events to the stream again that should be there and that no worker has seen. How many.

    Not while the workers are behind: then an event that they have not seen is most likely there.
    """
    if not stream.caught_up():
        return 0
    cutoff = timezone.now() - RELAY_PATIENCE
    missing = Event.objects.unpublished().filter(created_at__lt=cutoff).order_by("created_at")
    entries = [event.as_entry() for event in missing[:SWEEP_BATCH]]
    if entries and stream.publish(entries):
        logger.info("Added %d events to the stream that were missing there", len(entries))
    return len(entries)


class Loop(threading.Thread):
    """Calls a unit of work again and again; waits, longer each time, while Redis or the database is
    away; ends the process on anything unforeseen, so that its supervisor starts a sound one."""

    def __init__(self, name: str, unit: Callable[[], None], *, every: float = 0.0) -> None:
        super().__init__(name=name, daemon=True)
        self.unit = unit
        self.every = every
        self.stopping = threading.Event()

    def run(self) -> None:
        failures = 0
        while not self.stopping.wait(self._pause(failures)):
            try:
                self.unit()
                if failures:
                    logger.info("The %s works again", self.name)
                failures = 0
                close_old_connections()
            except TROUBLE as error:
                if not failures:
                    logger.warning("The %s has to wait: %s", self.name, error)
                failures += 1
                connection.close()
            except Exception:
                logger.exception("The %s broke; this worker ends", self.name)
                state.should_stop = os.EX_SOFTWARE
                return

    def _pause(self, failures: int) -> float:
        if not failures:
            return self.every
        return random.uniform(0.1, min(MAX_PAUSE_SECONDS, 0.25 * 2.0**failures))  # noqa: S311


class Leaving(threading.Thread):
    """Sees to it that a worker which was told to stop is gone when its grace is over. Celery waits
    for its threads, and nothing can interrupt those; whoever loses patience with it then kills it,
    and its runs wait for their leases to lapse."""

    def __init__(self, last: Callable[[], None]) -> None:
        super().__init__(name="leaving", daemon=True)
        self.last = last
        self.told = threading.Event()

    def run(self) -> None:
        self.told.wait()
        time.sleep(settings.WORKER_GRACE_SECONDS)
        try:
            if returned := execution.release_runs():
                logger.info("Handed back %d runs that took longer than the grace", returned)
        except db.DATABASE_ERRORS:
            logger.exception("The runs were not handed back: they wait for their leases to lapse")
        # Threads that get a chunk now notice, and the process ends as Celery would have it.
        time.sleep(LAST_SECONDS)
        self.last()
        logging.shutdown()
        os._exit(int(state.should_stop or state.should_terminate or os.EX_OK))


class Runtime(bootsteps.StartStopStep):
    """Starts the reader, the keeper and the listener beside the pool of a Celery worker."""

    requires = {"celery.worker.components:Pool"}

    def __init__(self, parent: Any, **options: Any) -> None:
        super().__init__(parent, **options)
        self.loops: list[Loop] = []
        # In a container everybody is process 1.
        born = os.getpid() if os.getpid() != 1 else socket.gethostname()
        self.name = settings.REDIS_CONSUMER_NAME or f"worker-{born}"
        # Waits from the start on: a signal's handler had better start no thread.
        self.leaving = Leaving(self._gone)
        self.presence = presence.Presence(self.name, parent.concurrency)

    def start(self, parent: Any) -> None:
        # Short turns: a run goes through three threads, and each waits its turn for the interpreter.
        sys.setswitchinterval(SWITCH_SECONDS)
        completions.warm_up()
        # What has been loaded stays: looked through for garbage time and again, it cost a tenth.
        gc.freeze()
        gc.set_threshold(GARBAGE_OBJECTS, *gc.get_threshold()[1:])
        fairness.seats.slots = parent.concurrency
        reader = Reader(self.name)

        def read() -> None:
            reader.read()
            self.presence.note_read()

        self.loops = [
            Loop("reader", read),
            Loop("keeper", Keeper(reader).tick, every=SWEEP_SECONDS),
            Loop("listener", publisher.current().listen),
        ]
        # Of its own, and on to the end: what takes long is done by others, and a worker that waits
        # for its last runs is still there.
        beat = Loop("beat", self.presence.beat, every=presence.BEAT_SECONDS)
        for thread in (*self.loops, beat, self.leaving):
            thread.start()
        signals.worker_shutting_down.connect(self._leave)
        signals.worker_shutdown.connect(self._gone)
        logger.info("Worker %s reads %s", self.name, settings.REDIS_STREAM_KEY)

    def _leave(self, **_: Any) -> None:
        self.leaving.told.set()

    def close(self, parent: Any) -> None:
        """The first thing when the worker stops by itself, without a signal."""
        self._leave()

    def stop(self, parent: Any) -> None:
        for loop in self.loops:
            loop.stopping.set()
        for loop in self.loops:
            loop.join(timeout=3)
        with suppress(RedisError):
            stream.resign(self.name)
        with suppress(*TROUBLE):
            self.presence.drain()

    def _gone(self, **_: Any) -> None:
        with suppress(*TROUBLE):
            self.presence.leave()
