"""Maintenance by the leading worker: recover what was missed, and clean up."""

import logging
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial

from django.utils import timezone
from kombu.exceptions import OperationalError as BrokerError

from agents import retention, tasks
from agents.events import stream
from agents.models import Event, Run
from agents.runs import actions, memory
from agents.usage import limits, rollups
from agents.worker import dispatch, presence
from agents.worker.consumer import Consumer
from lib import db

logger = logging.getLogger(__name__)

SWEEP_SECONDS = 1.0
SUMMARY_SECONDS = 15.0
FOLD_SECONDS = 5.0
HOUSEKEEPING_SECONDS = 60.0
PRUNE_SECONDS = 15.0
# Jobs run one after the other, and others are more urgent than old rows.
PRUNE_AT_ONCE_SECONDS = 0.5
MAX_REST_SECONDS = 5.0
SWEEP_BATCH = 500
# An event that no worker has seen on the stream for this long is published again.
RELAY_PATIENCE = timedelta(seconds=5)
# An entry that a worker read and did not acknowledge for this long is claimed by another.
ENTRY_PATIENCE = timedelta(seconds=10)
# Errors of services that recover by themselves.
RETRYABLE_ERRORS = (BrokerError, *db.SERVICE_ERRORS)

# Jobs of other apps, and their intervals in seconds; an app adds them when it is ready. A job is quick,
# and may run twice at the same time.
PERIODIC_JOBS: list[tuple[Callable[[], object], float]] = []


class Maintenance:
    """The periodic jobs. One worker at a time leads and runs them; two at once do no harm."""

    def __init__(self, consumer: Consumer) -> None:
        self.consumer = consumer
        self._jobs: list[tuple[Callable[[], object], float]] = [
            (sweep_runs, SWEEP_SECONDS),
            (self._claim_stale_entries, SWEEP_SECONDS),
            (relay, RELAY_PATIENCE.total_seconds()),
            (sweep_summaries, SUMMARY_SECONDS),
            (rollups.fold, FOLD_SECONDS),
            (rollups.forget, HOUSEKEEPING_SECONDS),
            (limits.forget, HOUSEKEEPING_SECONDS),
            (stream.trim, HOUSEKEEPING_SECONDS),
            (stream.trim_bytes, FOLD_SECONDS),
            (prune, PRUNE_SECONDS),
            (partial(stream.forget_consumers, idle=timedelta(hours=1)), HOUSEKEEPING_SECONDS),
            (presence.delete_gone, HOUSEKEEPING_SECONDS),
            *PERIODIC_JOBS,
        ]
        self._next = [0.0] * len(self._jobs)

    def tick(self) -> None:
        """Run the due jobs. A job that fails does not stop the others; its error is raised after them,
        as by `Consumer.read()`."""
        self.consumer.mark_published()
        # Every worker does this, because it must work without Redis.
        actions.expire_overdue()
        if not stream.acquire_leadership(self.consumer.name):
            return
        failure: Exception | None = None
        for number, (job, seconds) in enumerate(self._jobs):
            started = time.monotonic()
            if started < self._next[number]:
                continue
            try:
                job()
            except RETRYABLE_ERRORS as error:
                failure = error
            ended = time.monotonic()
            # A slow job runs less often, but does not rest for long: it may have waited for a database
            # that is back now, and the sweep must not be late then.
            rest = min(20 * (ended - started), MAX_REST_SECONDS)
            self._next[number] = max(started + seconds * 0.9, ended + rest)
        if failure:
            raise failure

    def _claim_stale_entries(self) -> None:
        self.consumer.handle(stream.claim_stale(self.consumer.name, idle=ENTRY_PATIENCE))


def sweep_runs() -> int:
    """Dispatch due runs that no worker has, fairly between users. Return their number.

    While Celery's queue is long it dispatches none: the queue may hold them, and dispatching them
    repeatedly would make it longer still.
    """
    free = dispatch.shortfall()
    if not free:
        return 0
    if count := dispatch.dispatch_fairly(Run.objects.dispatch_lost(), free):
        logger.info("Dispatched %d due runs that no worker had", count)
    return count


def sweep_summaries() -> None:
    """Dispatch the summaries at which a worker or the model failed."""
    if not queue_is_long():
        for thread_id in memory.due():
            tasks.summarise.delay(thread_id)


def prune() -> None:
    """Delete a few rows past their retention; queued runs come first."""
    until = time.monotonic() + PRUNE_AT_ONCE_SECONDS

    def may_continue() -> bool:
        return time.monotonic() < until and not queue_is_long()

    if may_continue() and (deleted := retention.prune_everything(may_continue)):
        logger.info("Pruned %s", ", ".join(f"{count} {name}" for name, count in deleted.items()))


def queue_is_long() -> bool:
    return dispatch.queue_length() >= SWEEP_BATCH


def relay() -> int:
    """Publish again the events that should be on the stream and that no worker has seen. Return their
    number.

    Not while the workers are behind: then an unseen event is most likely still on the stream.
    """
    if not stream.caught_up():
        return 0
    cutoff = timezone.now() - RELAY_PATIENCE
    missing = Event.objects.unpublished().filter(created_at__lt=cutoff).order_by("created_at")
    entries = [event.as_entry() for event in missing[:SWEEP_BATCH]]
    if entries and stream.publish(entries):
        logger.info("Published %d events that were missing on the stream", len(entries))
    return len(entries)
