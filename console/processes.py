"""States of workers and bots, judged by their progress and not by their presence. Times are compared
with the database's clock, by which they were written."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, cast

from django.conf import settings
from django.db.models.functions import Now
from django.urls import reverse

from agents.models import WORKER_TIMEOUT, Worker
from botrunner.models import Session
from lib.formats import duration

MAX_PROCESSES = 20


@dataclass
class Process:
    name: str
    kind: str
    state: str
    mood: str
    note: str
    link: str = ""


def workers() -> list[Process]:
    rows = Worker.objects.annotate(now=Now()).order_by("-beat_at")[:MAX_PROCESSES]
    processes = []
    for row in rows:
        at = cast("Any", row).now
        last = row.last_finished_at
        note = f"{row.runs_in_hand} of {row.concurrency} slots active; "
        note += f"last finished a run {_ago(at, last)}" if last else "no run finished yet"
        processes.append(Process(row.name, f"worker on {row.host}", *_state(row, at), note))
    if not any(each.state == "running" for each in processes):
        hint = "Start one: celery -A config worker"
        processes.append(Process("No worker", "worker", "not running", "bad", hint))
    return processes


def _state(worker: Worker, now: datetime) -> tuple[str, str]:
    if now - worker.beat_at > WORKER_TIMEOUT:
        return f"silent for {duration(_ms(now - worker.beat_at))}", "bad"
    if worker.is_draining:
        return "shutting down", ""
    if worker.read_at is None or now - worker.read_at > WORKER_TIMEOUT:
        return "stuck: it does not read the stream", "bad"
    return "running", "good"


def bots() -> list[Process]:
    sessions = Session.objects.annotate(now=Now()).order_by("pk")[:MAX_PROCESSES]
    return [_bot(session, cast("Any", session).now) for session in sessions]


def _bot(session: Session, at: datetime) -> Process:
    last, lease = session.last_sync_at, session.lease_expires_at
    patience = settings.OPS_MAX_BOT_SYNC_SECONDS
    fresh = last is not None and (not patience or at - last <= timedelta(seconds=patience))
    notes = [
        f"last sync {_ago(at, last)}" if last else "never synced",
        f"held by {session.holder}" if lease and lease > at else "no process",
    ]
    if session.last_error and not fresh:
        notes.append(session.last_error)
    return Process(
        str(session),
        f"bot at {session.homeserver}",
        "syncs" if fresh else "does not sync",
        "good" if fresh else "bad",
        "; ".join(notes),
        reverse("admin:botrunner_session_change", args=[session.pk]),
    )


def _ago(now: datetime, then: datetime | None) -> str:
    return f"{duration(_ms(now - then))} ago" if then else "never"


def _ms(length: timedelta) -> float:
    return length.total_seconds() * 1000
