"""Readiness of this process, and progress of the whole system."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, cast

from django.conf import settings
from django.db import connection
from django.db.migrations.loader import MigrationLoader
from django.db.migrations.recorder import MigrationRecorder
from django.db.models import Count, Min
from django.db.models.functions import Now
from django.utils import timezone
from redis.exceptions import RedisError

from agents.events import stream
from agents.models import Event, Run, Worker
from botrunner.models import Session
from lib import db
from lib.redis import refused, why
from lib.timeouts import BoundedCheck, CheckFailed, run_checks

PATIENCE_SECONDS = 2.0


@dataclass(frozen=True)
class Check:
    ok: bool
    details: dict[str, Any] = field(default_factory=dict)
    reason: str = ""  # for operators only


def readiness() -> dict[str, Check]:
    return _run(READINESS)


def progress() -> dict[str, Check]:
    return _run(PROGRESS)


def _run(checks: Mapping[str, BoundedCheck[Check]]) -> dict[str, Check]:
    results = run_checks(checks, PATIENCE_SECONDS)
    return {
        name: _failed(name, result) if isinstance(result, CheckFailed) else result
        for name, result in results.items()
    }


def _failed(name: str, failure: CheckFailed) -> Check:
    # The pool may still retry.
    database = db.availability.reason if name != "redis" else ""
    return Check(
        False, {"error": str(failure)}, f"DATABASE_URL: {database}" if database else failure.reason
    )


def _database() -> Check:
    with connection.cursor() as cursor:
        if connection.vendor != "postgresql":
            cursor.execute("SELECT 1")
            return Check(True)
        # A standby, or a server that has been made read-only.
        cursor.execute("SELECT current_setting('transaction_read_only')")
        if cursor.fetchone()[0] == "on":
            return Check(False, {"error": "The database is read-only."})
    return Check(True)


def _redis() -> Check:
    """Check writes: events and tasks need them."""
    try:
        stream.check_writable()
    except RedisError as error:
        reason = refused(error)
        message = f"Redis refuses writes: {reason}." if reason else type(error).__name__
        return Check(settings.OPS_READY_WITHOUT_REDIS, {"error": message}, why(error))
    return Check(True)


def _migrations() -> Check:
    missing = unapplied()
    return Check(not missing, {"unapplied": len(missing)})


def unapplied() -> list[str]:
    """Return the migrations that are not applied to the database."""
    applied = MigrationRecorder(connection).applied_migrations()
    return [f"{app}.{name}" for app, name in _known_migrations() if (app, name) not in applied]


_known: list[tuple[str, str]] = []


def _known_migrations() -> list[tuple[str, str]]:
    """Return the migrations of the code, read once: importing them takes a tenth of a second."""
    if not _known:
        _known.extend(sorted(MigrationLoader(None).disk_migrations))
    return _known


def _queue() -> Check:
    return _within(Run.objects.all().seconds_unclaimed(), settings.OPS_MAX_QUEUE_SECONDS)


def _outbox() -> Check:
    count, age = outbox()
    check = _within(age, settings.OPS_MAX_OUTBOX_SECONDS)
    return Check(check.ok, {**check.details, "events": count})


def outbox() -> tuple[int, float]:
    """Return the number of events not yet seen on the stream, and the age of the oldest in seconds."""
    totals = Event.objects.unpublished().aggregate(count=Count("pk"), oldest=Min("created_at"))
    return totals["count"], _age(totals["oldest"])


def _workers() -> Check:
    counts = workers()
    return Check(counts["reading"] > 0, counts)


def workers() -> dict[str, int]:
    """Count the workers that are alive, those that read the stream, and their active runs."""
    alive = list(Worker.objects.alive().values_list("runs_in_hand", flat=True))
    return {
        "alive": len(alive),
        "reading": Worker.objects.reading().count(),
        "runsInHand": sum(alive),
    }


def _bot() -> Check:
    age = bot_sync_seconds()
    if age is None or not settings.OPS_MAX_BOT_SYNC_SECONDS:
        return Check(True, {"seconds": age})
    return _within(age, settings.OPS_MAX_BOT_SYNC_SECONDS)


def bot_sync_seconds() -> float | None:
    """Return the time since the bot's last sync; None if there has never been a bot."""
    account = Session.objects.filter(
        homeserver=settings.MATRIX_URL, username=settings.BOT_RUNNER_USERNAME
    ).exclude(last_sync_at=None)
    for now, synced in account.annotate(now=Now()).values_list("now", "last_sync_at"):
        return max(0.0, (now - cast("datetime", synced)).total_seconds())
    return None


def _within(age: float, limit: float) -> Check:
    return Check(age <= limit, {"seconds": round(age, 1), "limit": limit})


def _age(moment: datetime | None) -> float:
    return 0.0 if moment is None else max(0.0, (timezone.now() - moment).total_seconds())


READINESS = {
    "database": BoundedCheck(_database),
    "redis": BoundedCheck(_redis),
    "migrations": BoundedCheck(_migrations),
}
PROGRESS = {
    "queue": BoundedCheck(_queue),
    "outbox": BoundedCheck(_outbox),
    "workers": BoundedCheck(_workers),
    "bot": BoundedCheck(_bot),
}
