"""Rollups: outcomes aggregated by time, model, source and result, and by day, user, place and model.

Each outcome (an attempt, a summary, the end of a run without an attempt) is written with the mark
`to_count`; `fold()` adds it up and removes the mark in one transaction. So each is counted once,
however late it is committed and even if its run is gone, and no lock makes two runs wait.
"""

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from django.db import models, transaction
from django.db.models import Case, F, Min, OuterRef, Subquery, When
from django.db.models.functions import Now
from django.utils import timezone

from agents.models import OVERDUE, Attempt, Event, Rollup, RollupState, Run, Summary, Usage
from lib import db

BATCH = 1000
# The most batches of one fold in a worker; the next fold continues.
BATCHES = 5
# The retention of each grain: finer ones are of interest for a shorter time.
KEPT = {
    Rollup.Grain.MINUTE: timedelta(days=2),
    Rollup.Grain.QUARTER: timedelta(days=10),
    Rollup.Grain.HOURS: timedelta(days=36500),
}
ENDED = (Attempt.Result.COMPLETED, Attempt.Result.FAILED, Attempt.Result.CANCELLED)
ANSWERED = (Attempt.Result.COMPLETED, Attempt.Result.FAILED)

SUMS = ("count", "prompt_tokens", "completion_tokens", "cost", "unpriced")
TIMES = {"wait_ms": "waits", "model_ms": "model_times", "total_ms": "totals"}


class Histogram:
    """A histogram of durations with twenty buckets for each factor of ten. A percentile lies in the
    bucket of the true one, so its error is below 12.3 %."""

    PER_DECADE = 20
    ERROR = 10 ** (1 / PER_DECADE) - 1

    def __init__(self, counts: dict[str, int] | None = None) -> None:
        # By the number of the bucket, as text: the keys of JSON are.
        self.counts: Counter[str] = Counter(counts or {})

    @classmethod
    def bucket(cls, ms: int) -> str:
        return str(math.ceil(cls.PER_DECADE * math.log10(ms))) if ms > 1 else "0"

    def merge(self, counts: dict[str, int]) -> None:
        total = self.counts
        for bucket, count in counts.items():
            total[bucket] += count

    def percentile(self, share: float) -> float | None:
        """Return a percentile in ms; None if nothing was counted."""
        buckets = sorted((int(bucket), count) for bucket, count in self.counts.items())
        rank = share * sum(count for _, count in buckets)
        for bucket, count in buckets:
            if rank <= count:
                high = 10 ** (bucket / self.PER_DECADE)
                low = 10 ** ((bucket - 1) / self.PER_DECADE) if bucket else 0
                return low + (high - low) * rank / count
            rank -= count
        return None


@dataclass
class Tally:
    """The amounts to add to one rollup."""

    first_at: datetime
    last_at: datetime
    sums: Counter[str] = field(default_factory=Counter)
    counts: dict[str, Counter[str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CountedOutcome:
    """An outcome to count."""

    at: datetime
    model: str
    source: str
    place: str
    user: str | None
    result: str
    error_code: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: int | None = 0
    # In ms; None where they are not counted.
    times: tuple[int, int, int] | None = None


def fold(*, batch: int = BATCH, batches: int = BATCHES) -> int:
    """Count marked outcomes. Return their number; 0 if none is left, or another process counts."""
    folded = 0
    for _ in range(batches):
        done = sum(_fold(source.settled(), batch) for source in SOURCES)
        folded += done
        if done < batch:
            break
    return folded


def fold_thread(thread_id: str) -> None:
    """Count all marked outcomes of a thread that is about to be deleted."""
    for source in SOURCES:
        rows = source.rows.filter(**{source.thread: thread_id})
        while rows.exists():
            _fold(replace(source, rows=rows), BATCH)


def seconds_behind() -> float:
    """Return the age of the oldest outcome not yet counted; 0 if there is none. The time of the last
    fold would not do: there may have been no outcome since."""
    first = [
        # Keys grow with time; few events are marked.
        Attempt.objects.filter(to_count=True).order_by("pk").values_list("ended_at")[:1],
        Summary.objects.filter(to_count=True).order_by("pk").values_list("created_at")[:1],
        Event.objects.filter(to_count=True).order_by("pk").values_list("created_at")[:BATCH],
    ]
    now = timezone.now()
    ended = [at for rows in first for (at,) in rows]
    return max(0.0, (now - min(ended, default=now)).total_seconds())


def forget() -> None:
    """Delete rollups past the retention of their grain."""
    for grain, kept in KEPT.items():
        old = Rollup.objects.filter(grain=grain, start__lt=timezone.now() - kept)
        with transaction.atomic():
            old.delete()


def rebuild(*, batch: int = 20 * BATCH) -> int:
    """Count all outcomes in the database again, from zero. Return their number. Pruned ones are lost
    from the figures."""
    with transaction.atomic():
        _lock()
        Rollup.objects.all().delete()
        Usage.objects.all().delete()
        Attempt.objects.filter(to_count=False).update(to_count=True)
        Summary.objects.filter(to_count=False).update(to_count=True)
        Event.objects.filter(to_count=False).update(to_count=True)
    total = 0
    while done := fold(batch=batch):
        total += done
    return total


def would_lose() -> bool:
    """Return whether the rollups cover pruned days, which rebuilding would lose."""
    first = Rollup.objects.filter(grain=Rollup.Grain.HOURS).aggregate(Min("first_at"))
    kept = [
        Attempt.objects.aggregate(at=Min("ended_at"))["at"],
        Summary.objects.aggregate(at=Min("created_at"))["at"],
        Event.objects.exclude(to_count=None).aggregate(at=Min("created_at"))["at"],
    ]
    oldest = first["first_at__min"]
    return oldest is not None and oldest < min(filter(None, kept), default=timezone.now())


@dataclass(frozen=True)
class Source:
    """A table of outcomes, and the function that reads its rows."""

    rows: models.QuerySet[Any, Any]
    read: Callable[[dict[str, Any]], CountedOutcome]
    thread: str = "run__thread"  # its lookup

    def settled(self) -> "Source":
        """Exclude the rows that may still change."""
        cut = models.Q(result=Attempt.Result.CANCELLED) | models.Q(error_code=OVERDUE)
        young = cut & models.Q(ended_at__gt=Now() - PARTIAL_PATIENCE)
        return replace(self, rows=self.rows.exclude(young)) if self.model is Attempt else self

    @property
    def model(self) -> Any:
        return self.rows.model


def _fold(source: Source, batch: int) -> int:
    # Read and added up before the transaction begins: SQLite has one writer, and runs wait for it.
    rows = list(source.rows.order_by("pk")[:batch])
    if not rows:
        return 0
    rollups, usage = _add_up(source.read(row) for row in rows)
    with transaction.atomic():
        _lock()
        marked = source.model.objects.filter(pk__in=[row["pk"] for row in rows], to_count=True)
        if db.in_order(marked).update(to_count=False) != len(rows):
            # Another process has counted some of them meanwhile.
            transaction.set_rollback(True)
            return 0
        _save_rollups(rollups)
        _save_usage(usage)
    return len(rows)


def _lock() -> None:
    """Lock the rollups: a second process waits here, then reads what the first has written."""
    if not RollupState.objects.filter(pk=1).update(folded_at=timezone.now()):
        RollupState.objects.bulk_create(
            [RollupState(pk=1, folded_at=timezone.now())], ignore_conflicts=True
        )
        RollupState.objects.filter(pk=1).update(folded_at=timezone.now())


def _add_up(outcomes: Iterable[CountedOutcome]) -> tuple[dict[Any, Tally], dict[Any, Counter[str]]]:
    rollups: dict[Any, Tally] = {}
    usage: dict[Any, Counter[str]] = {}
    now = timezone.now()
    for one in outcomes:
        sums = {
            "count": 1,
            "prompt_tokens": one.prompt_tokens,
            "completion_tokens": one.completion_tokens,
            "cost": one.cost or 0,
            "unpriced": one.cost is None,
        }
        for grain, kept in KEPT.items():
            if one.at < now - kept:
                continue
            key = (grain, slot(one.at, grain), one.model, one.source, one.result, one.error_code)
            tally = rollups.get(key)
            if tally is None:
                tally = rollups[key] = Tally(one.at, one.at)
            tally.first_at, tally.last_at = min(tally.first_at, one.at), max(tally.last_at, one.at)
            tally.sums.update(sums)
            for name, ms in zip(TIMES, one.times or (), strict=False):
                tally.sums[name] += ms
                tally.counts.setdefault(TIMES[name], Counter())[Histogram.bucket(ms)] += 1
        day = usage.setdefault((one.at.date(), one.user or "", one.place, one.model), Counter())
        del sums["count"]
        day.update(sums)
        day["runs"] += one.result in ENDED
        day["failed"] += one.result == Attempt.Result.FAILED
    return rollups, usage


@functools.lru_cache(maxsize=1024)
def _slot(minute: int, grain: int) -> datetime:
    return datetime.fromtimestamp(minute // grain * grain * 60, tz=UTC)


def slot(at: datetime, grain: int) -> datetime:
    """Return the start of the interval that contains `at`."""
    return _slot(int(at.timestamp()) // 60, grain)


ROLLUP_KEY = ("grain", "start", "model", "source", "result", "error_code")
USAGE_KEY = ("day", "user", "place", "model")


def _save_rollups(tallies: dict[Any, Tally]) -> None:
    known: dict[Any, Rollup] = {}
    for grain in Rollup.Grain.values:
        starts = {key[1] for key in tallies if key[0] == grain}
        rows = Rollup.objects.filter(grain=grain, start__in=starts)
        known |= {tuple(getattr(row, name) for name in ROLLUP_KEY): row for row in rows}
    for key, tally in tallies.items():
        row = known.get(key)
        if row is None:
            row = known[key] = Rollup(
                **dict(zip(ROLLUP_KEY, key, strict=True)),
                first_at=tally.first_at,
                last_at=tally.last_at,
            )
        row.first_at = min(row.first_at, tally.first_at)
        row.last_at = max(row.last_at, tally.last_at)
        for name, number in tally.sums.items():
            setattr(row, name, getattr(row, name) + number)
        for name, counts in tally.counts.items():
            histogram = Histogram(getattr(row, name))
            histogram.merge(counts)
            setattr(row, name, dict(histogram.counts))
    Rollup.objects.bulk_create(
        [known[key] for key in tallies],
        update_conflicts=True,
        unique_fields=list(ROLLUP_KEY),
        update_fields=[*SUMS, *TIMES, *TIMES.values(), "first_at", "last_at"],
    )


def _save_usage(usage: dict[Any, Counter[str]]) -> None:
    rows = Usage.objects.filter(
        day__in={key[0] for key in usage},
        user__in={key[1] for key in usage},
        place__in={key[2] for key in usage},
    )
    known = {tuple(getattr(row, name) for name in USAGE_KEY): row for row in rows}
    for key, sums in usage.items():
        row = known.get(key)
        if row is None:
            row = known[key] = Usage(**dict(zip(USAGE_KEY, key, strict=True)))
        for name, number in sums.items():
            setattr(row, name, getattr(row, name) + number)
    Usage.objects.bulk_create(
        [known[key] for key in usage],
        update_conflicts=True,
        unique_fields=list(USAGE_KEY),
        update_fields=["runs", "failed", *SUMS[1:]],
    )


RUN = {
    "model": F("run__model"),
    "source": F("run__source"),
    "place": F("run__place"),
    # A room's thread has no owner.
    "user": Case(
        When(run__thread__room_id="", then=F("run__thread__owner__username")),
        default=F("run__requester"),
    ),
    "asked_at": F("run__created_at"),
    "asked_again_at": F("run__retried_at"),
    "begun_at": F("run__started_at"),
}
SPENT = ("prompt_tokens", "completion_tokens", "cost")


def _attempt(row: dict[str, Any]) -> CountedOutcome:
    times = None
    if row["result"] in ANSWERED:
        begun_at = min(row["begun_at"] or row["started_at"], row["started_at"])
        asked_at = row["asked_at"]
        if row["asked_again_at"] and row["asked_again_at"] <= row["started_at"]:
            asked_at = row["asked_again_at"]
        waited, took = _ms(asked_at, begun_at), _ms(asked_at, row["ended_at"])
        times = (waited, row["model_ms"], took)
    return _counted(
        row,
        at=row["ended_at"],
        result=row["result"],
        error_code=row["error_code"],
        times=times,
        **{name: row[name] for name in SPENT},
    )


def _unattempted(row: dict[str, Any]) -> CountedOutcome:
    """Read the end of a run that was cancelled or overdue before a worker claimed it."""
    failed = row["type"] == Event.Type.FAILED
    return _counted(
        row,
        at=row["created_at"],
        result=Attempt.Result.FAILED if failed else Attempt.Result.CANCELLED,
        error_code=OVERDUE if failed else "",
    )


def _summary(row: dict[str, Any]) -> CountedOutcome:
    return _counted(
        row | {"source": "", "place": row["place"] or ""},
        at=row["created_at"],
        result=Rollup.SUMMARY,
        **{name: row[name] for name in SPENT},
    )


def _counted(row: dict[str, Any], **columns: Any) -> CountedOutcome:
    return CountedOutcome(
        **{name: row[name] for name in ("model", "source", "place", "user")}, **columns
    )


def _ms(start: datetime, end: datetime) -> int:
    return max(0, int((end - start) / timedelta(milliseconds=1)))


# The worker of an interrupted attempt records its partial result a moment later
# (outcomes.record_partial).
PARTIAL_PATIENCE = timedelta(seconds=5)
_last_run = Run.objects.filter(thread=OuterRef("thread")).order_by("-position")
SOURCES = [
    Source(
        Attempt.objects.filter(to_count=True).values(
            "pk", "result", "error_code", "model_ms", "started_at", "ended_at", *SPENT, **RUN
        ),
        _attempt,
    ),
    Source(
        Event.objects.filter(to_count=True).values("pk", "type", "created_at", **RUN), _unattempted
    ),
    Source(
        Summary.objects.filter(to_count=True).values(
            "pk",
            "model",
            "created_at",
            *SPENT,
            user=F("thread__owner__username"),
            place=Subquery(_last_run.values("place")[:1]),
        ),
        _summary,
        thread="thread",
    ),
]


# Reading.


@dataclass
class RollupSums:
    """The sums and histograms of some rollups."""

    count: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: int = 0
    unpriced: int = 0
    waits: Histogram = field(default_factory=Histogram)
    model_times: Histogram = field(default_factory=Histogram)
    totals: Histogram = field(default_factory=Histogram)

    def add_sums(self, row: "Row", *, counts: bool) -> None:
        """Add the sums of a row; `counts`: its outcomes count too, and not only their cost."""
        self.count += row.count * counts
        self.prompt_tokens += row.prompt_tokens
        self.completion_tokens += row.completion_tokens
        self.cost += row.cost
        self.unpriced += row.unpriced

    def add_times(self, row: "Row") -> None:
        self.waits.merge(row.waits)
        self.model_times.merge(row.model_times)
        self.totals.merge(row.totals)


@dataclass(frozen=True, slots=True)
class Row:
    start: datetime
    model: str
    source: str
    result: str
    error_code: str
    count: int
    prompt_tokens: int
    completion_tokens: int
    cost: int
    unpriced: int
    waits: dict[str, int]
    model_times: dict[str, int]
    totals: dict[str, int]
    first_at: datetime
    last_at: datetime


ROW = [each.name for each in fields(Row)]


def between(start: datetime, end: datetime, grain: int) -> list[Row]:
    """Return the rollups that start from `start` on and before `end`."""
    rows = Rollup.objects.filter(grain=grain, start__gte=slot(start, grain), start__lt=end)
    return [Row(*row) for row in rows.values_list(*ROW)]


def first_seen(causes: Iterable[tuple[str, str]]) -> dict[tuple[str, str], datetime]:
    """Return the first time at which runs failed with these codes on these models."""
    causes = list(causes)
    rows = Rollup.objects.filter(
        grain=Rollup.Grain.HOURS,
        result=Attempt.Result.FAILED,
        error_code__in={code for code, _ in causes},
        model__in={model for _, model in causes},
    )
    seen = rows.order_by().values_list("error_code", "model").annotate(at=Min("first_at"))
    return {(code, model): at for code, model, at in seen}
