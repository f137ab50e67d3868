"""A database of any size: a sample history (sample.py), and copies of it that the database makes with
other ids and times."""

from __future__ import annotations

import sys
import time
from typing import Any

from django.db import connection, transaction
from django.db.models import AutoField, DateTimeField, ForeignKey, Max, Model, UUIDField

from agents.models import Run
from agents.usage import rollups
from botrunner.models import RoomEvent
from chat.models import Message, Thread
from tests.benchmarks.sample import TABLES, History

ORIGINALS = 20_000
OWN = {Thread, Message, Run, RoomEvent}
# What is unique or names a row, though it is no key.
NAMES = {"request_event_id", "correlation_id", "event_id", "key", "root"}
SHIFT_SECONDS = 37


def seed(runs: int, *, days: int = 30) -> None:
    """Create `runs` runs with all their rows, counted in the rollups."""
    begun = time.perf_counter()
    originals = min(runs, ORIGINALS)
    History(runs=originals, days=days).write_all()
    _say(f"{originals} runs", begun)
    copies = round(runs / originals) - 1
    room_events = RoomEvent.objects.aggregate(Max("pk"))["pk__max"] or 0
    for number in range(1, copies + 1):
        with transaction.atomic():
            _trust()
            for model in TABLES:
                _copy(model, number, room_events)
        if number % 10 == 0:
            _say(f"{number} of {copies} copies", begun)
    while rollups.fold(batch=50_000, batches=1):
        _say("folding", begun)
    with connection.cursor() as cursor:
        cursor.execute("ANALYZE")
    _say("done", begun)


def _trust() -> None:
    """Disable foreign key checks, as a superuser may: the rows they refer to are copied too."""
    if connection.vendor == "postgresql":
        with connection.cursor() as cursor:
            cursor.execute("SET LOCAL session_replication_role = replica")


def _copy(model: type[Model], number: int, room_events: int) -> None:
    columns, values = [], []
    for field in model._meta.concrete_fields:
        if field.primary_key and isinstance(field, AutoField) and model is not RoomEvent:
            continue
        columns.append(f'"{field.column}"')
        values.append(_value(field, number, room_events))
    table = model._meta.db_table
    names = {field.column for field in model._meta.concrete_fields}
    owner = next(name for name in ("run_id", "thread_id", "id") if name in names)
    # Not of the copies.
    only = f"id <= {room_events}" if model is RoomEvent else f"{owner} NOT LIKE '%-%'"
    with connection.cursor() as cursor:
        cursor.execute(
            f"INSERT INTO {table} ({', '.join(columns)}) "
            f"SELECT {', '.join(values)} FROM {table} WHERE {only}"
        )


def _value(field: Any, number: int, room_events: int) -> str:
    column = f'"{field.column}"'
    if isinstance(field, DateTimeField):
        return _earlier(column, number * SHIFT_SECONDS)
    refers = isinstance(field, ForeignKey) and field.related_model in OWN
    if not (field.primary_key or refers or field.name in NAMES):
        return column
    target = field.target_field if isinstance(field, ForeignKey) else field
    if isinstance(target, UUIDField):
        return _other_uuid(column, number)
    if isinstance(target, AutoField):
        return f"{column} + {number * room_events}"
    return f"{column} || '-{number}'"


def _earlier(column: str, seconds: int) -> str:
    if connection.vendor == "sqlite":
        return f"strftime('%Y-%m-%d %H:%M:%f', {column}, '-{seconds} seconds')"
    return f"{column} - interval '{seconds} seconds'"


def _other_uuid(column: str, number: int) -> str:
    # In the place of the version, which is 4 in all originals.
    version = f"{0xF000 + number:04x}"
    if connection.vendor == "sqlite":
        return f"substr({column}, 1, 12) || '{version}' || substr({column}, 17)"
    digits = f"replace({column}::text, '-', '')"
    return f"(substr({digits}, 1, 12) || '{version}' || substr({digits}, 17))::uuid"


def _say(what: str, begun: float) -> None:
    print(f"{time.perf_counter() - begun:6.0f} s  {what}", file=sys.stderr, flush=True)
