"""The admin's home: figures from rollups, and the state of unfinished work and processes."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import urlencode

from django.conf import settings
from django.db.models import Count, Min, Q, Sum
from django.db.models.functions import Now
from django.http import HttpRequest
from django.urls import reverse
from django.utils import timezone

from agents.events import stream
from agents.models import Rollup, Run, Usage, today
from agents.usage import prices, rollups
from agents.usage.rollups import ANSWERED, ENDED, RollupSums, Row
from botrunner.models import Reply
from console import charts, processes
from lib.formats import duration, money

Grain = Rollup.Grain
MAX_CAUSES, MAX_MODELS = 12, 12
PERCENTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
OUTCOMES = {"completed": "completed", "failed": "failed", "cancelled": "cancelled"}


@dataclass(frozen=True)
class TimeRange:
    """A time range of the page, in steps of `step` minutes."""

    key: str
    title: str
    length: timedelta
    step: int
    grain: int

    def times(self, now: datetime) -> list[datetime]:
        last = rollups.slot(now, self.step)
        count = int(self.length / timedelta(minutes=self.step))
        return [last - timedelta(minutes=self.step) * back for back in range(count - 1, -1, -1)]


RANGES = {
    each.key: each
    for each in (
        TimeRange("1h", "1 hour", timedelta(hours=1), 1, Grain.MINUTE),
        TimeRange("24h", "24 hours", timedelta(hours=24), 15, Grain.QUARTER),
        TimeRange("7d", "7 days", timedelta(days=7), 180, Grain.HOURS),
        TimeRange("30d", "30 days", timedelta(days=30), 720, Grain.HOURS),
    )
}


@dataclass
class Tile:
    title: str
    value: str
    note: str = ""
    link: str = ""
    mood: str = ""  # good, bad or empty


@dataclass
class FailureCause:
    """Failures of one cause with one model."""

    code: str
    model: str
    count: int = 0
    retried: int = 0
    first_at: datetime | None = None
    last_at: datetime | None = None
    link: str = ""


@dataclass
class RangeSums:
    """The sums of the rollups of a range, by slot, outcome, model and cause."""

    slots: dict[datetime, RollupSums] = field(default_factory=dict)
    outcomes: dict[datetime, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    models: dict[str, RollupSums] = field(default_factory=lambda: defaultdict(RollupSums))
    causes: dict[tuple[str, str], FailureCause] = field(default_factory=dict)
    total: RollupSums = field(default_factory=RollupSums)

    def add(self, row: Row, slot: datetime) -> None:
        if row.result in ENDED:
            self.outcomes[slot][row.result] += row.count
        if row.result in ANSWERED:
            self.slots.setdefault(slot, RollupSums()).add_times(row)
            self.total.add_times(row)
        self.models[row.model].add_sums(row, counts=row.result in ENDED)
        self.total.add_sums(row, counts=row.result in ENDED)
        if row.error_code:
            self._add_cause(row)

    def _add_cause(self, row: Row) -> None:
        key = (row.error_code, row.model)
        cause = self.causes.setdefault(key, FailureCause(*key))
        if row.result == "failed":
            cause.count += row.count
        else:
            cause.retried += row.count
        cause.last_at = max(cause.last_at or row.last_at, row.last_at)
        cause.first_at = min(cause.first_at or row.first_at, row.first_at)


def dashboard(request: HttpRequest, context: dict[str, Any]) -> dict[str, Any]:
    """Return the context of the admin's index; a callback of the theme."""
    chosen = RANGES.get(request.GET.get("range", ""), RANGES["24h"])
    # The page refreshes itself every few seconds, without its frame.
    part = request.headers.get("HX-Request") == "true"
    context["title"] = "Home"
    context |= {"frame": "console/part.html" if part else "admin/base.html", "is_fullwidth": "1"}
    if not getattr(request.user, "has_perm", lambda _: False)("agents.view_run"):
        return context
    return context | {"home": figures(chosen, timezone.now())}


def figures(chosen: TimeRange, now: datetime) -> dict[str, Any]:
    times = chosen.times(now)
    sums = RangeSums()
    for row in rollups.between(times[0], now, chosen.grain):
        sums.add(row, rollups.slot(row.start, chosen.step))
    currency = prices.currency()
    return {
        "range": chosen,
        "ranges": list(RANGES.values()),
        "now": now,
        "is_empty": not sums.models and not Run.objects.exists(),
        "tiles": _tiles(now, currency),
        "charts": [_outcomes(times, sums, chosen), _latency(times, sums)],
        "latency": _percentiles(sums.total),
        "error": f"{rollups.Histogram.ERROR:.0%}",
        "models": _models(sums, currency, chosen),
        "without_price": sorted(name for name, each in sums.models.items() if each.unpriced),
        "failed": runs_url(status__exact=Run.Status.FAILED, period=chosen.key),
        "causes": _causes(sums, chosen),
        "processes": [*processes.workers(), *processes.bots()],
    }


def _tiles(now: datetime, currency: str) -> list[Tile]:
    unfinished = Run.objects.unfinished().aggregate(
        active=Count("pk", filter=Q(status=Run.Status.PROCESSING)),
        queued=Count("pk", filter=Q(status=Run.Status.QUEUED)),
        oldest=Min("due_at", filter=Q(status=Run.Status.QUEUED, due_at__lte=Now())),
    )
    age = (now - unfinished["oldest"]).total_seconds() if unfinished["oldest"] else 0
    hour = Rollup.objects.filter(grain=Grain.MINUTE, start__gte=now - timedelta(hours=1))
    ended = dict(hour.filter(result__in=ENDED).values_list("result").annotate(Sum("count")))
    total, failed = sum(ended.values()), ended.get("failed", 0)
    share = failed / total if total else 0
    spent = Usage.objects.filter(day=today()).aggregate(cost=Sum("cost"), unpriced=Sum("unpriced"))
    dead, dropped = stream.dead_letters(), _dropped()
    return [
        Tile(
            "Oldest queued run",
            duration(1000 * age) if unfinished["oldest"] else "none",
            f"{unfinished['queued']:,} queued",
            runs_url(status__exact=Run.Status.QUEUED, period="all"),
            "bad" if age > settings.OPS_MAX_QUEUE_SECONDS else "",
        ),
        Tile(
            "Active runs",
            f"{unfinished['active']:,}",
            "now",
            runs_url(status__exact=Run.Status.PROCESSING, period="all"),
        ),
        Tile(
            "Failed in the last hour",
            f"{share:.1%}" if total else "none",
            f"{failed:,} of {total:,} runs",
            runs_url(status__exact=Run.Status.FAILED, period="1h"),
            "bad" if share > 0.1 else "good" if total else "",
        ),
        Tile(
            "Dead letters",
            "unknown" if dead is None else f"{dead:,}",
            "unprocessable stream entries" if dead is not None else "Redis is unavailable",
            reverse("admin:dead_letters"),
            "bad" if dead else "",
        ),
        Tile(
            "Undelivered replies",
            dropped,
            "given up",
            f"{reverse('admin:botrunner_reply_changelist')}?status__exact=dropped",
            "bad" if dropped != "0" else "",
        ),
        Tile(
            "Cost today",
            money(spent["cost"] or 0, currency),
            f"{spent['unpriced']:,} calls without a price"
            if spent["unpriced"]
            else "since 00:00 UTC",
            f"{reverse('admin:agents_usage_changelist')}?period=today",
        ),
    ]


def _dropped() -> str:
    count = Reply.objects.filter(status=Reply.Status.DROPPED)[:1001].count()
    return "1,000+" if count > 1000 else str(count)


def _outcomes(times: list[datetime], sums: RangeSums, chosen: TimeRange) -> charts.Chart:
    columns: list[dict[str, float]] = [
        {kind: sums.outcomes[time][kind] for kind in OUTCOMES} for time in times
    ]
    rects, top = charts.bars(columns)
    totals = {kind: sum(column[kind] for column in columns) for kind in OUTCOMES}
    total = sum(totals.values())
    titles = []
    for column in columns:
        ended = sum(column.values())
        failed = f", {column['failed'] / ended:.1%} failed" if column["failed"] else ""
        titles.append(f"{ended / chosen.step:.3g} runs per minute{failed}")
    share = f" ({totals['failed'] / total:.1%})" if total else ""
    return charts.Chart(
        title="Runs per minute",
        legend=[
            (kind, f"{totals[kind]:,} {word}{share if kind == 'failed' else ''}")
            for kind, word in OUTCOMES.items()
        ],
        slots=charts.slots(times, titles),
        rects=rects,
        ticks=[(0, f"{top / chosen.step:.3g}"), (charts.HEIGHT, "0")] if top else [],
        first=_first(times),
    )


def _latency(times: list[datetime], sums: RangeSums) -> charts.Chart:
    kinds = {kind: kind for kind in PERCENTILES}
    values = {
        kind: [
            sums.slots[time].totals.percentile(PERCENTILES[kind]) if time in sums.slots else None
            for time in times
        ]
        for kind in kinds
    }
    low, high = charts.decades([each for column in values.values() for each in column])
    titles = [
        ", ".join(f"{kind} {duration(values[kind][number])}" for kind in kinds)
        for number in range(len(times))
    ]
    return charts.Chart(
        title="End-to-end latency",
        legend=list(kinds.items()),
        slots=charts.slots(times, titles),
        lines=[charts.line(kind, column, low, high) for kind, column in values.items()],
        ticks=[(y, duration(ms)) for y, ms in charts.decade_ticks(low, high)] if sums.slots else [],
        first=_first(times),
    )


def _first(times: list[datetime]) -> str:
    return f"{times[0]:%d %b %H:%M} UTC"


def _percentiles(total: RollupSums) -> list[tuple[str, list[str]]]:
    return [
        (title, [duration(histogram.percentile(share)) for share in PERCENTILES.values()])
        for title, histogram in (
            ("Time in queue", total.waits),
            ("Model calls", total.model_times),
            ("End to end", total.totals),
        )
    ]


def _models(sums: RangeSums, currency: str, chosen: TimeRange) -> list[dict[str, Any]]:
    ranked = sorted(sums.models.items(), key=lambda each: (-each[1].cost, -each[1].count))
    return [
        {
            "name": name,
            "runs": f"{each.count:,}",
            "prompt": f"{each.prompt_tokens:,}",
            "completion": f"{each.completion_tokens:,}",
            "cost": money(each.cost, currency) if each.cost or not each.unpriced else "no price",
            "link": runs_url(model=name, period=chosen.key),
            "price_link": "" if not each.unpriced else add_price_url(name),
        }
        for name, each in ranked[:MAX_MODELS]
    ]


def _causes(sums: RangeSums, chosen: TimeRange) -> list[FailureCause]:
    causes = sorted(sums.causes.values(), key=lambda each: (-each.count, -each.retried))
    causes = causes[:MAX_CAUSES]
    first_seen = rollups.first_seen((each.code, each.model) for each in causes) if causes else {}
    for cause in causes:
        cause.first_at = first_seen.get((cause.code, cause.model), cause.first_at)
        cause.link = runs_url(
            status__exact=Run.Status.FAILED,
            error_code=cause.code,
            model=cause.model,
            period=chosen.key,
        )
    return causes


def runs_url(**lookups: Any) -> str:
    """Return the URL of a filtered list of runs."""
    return f"{reverse('admin:agents_run_changelist')}?{urlencode(lookups)}"


def add_price_url(model: str) -> str:
    return f"{reverse('admin:agents_price_add')}?{urlencode({'model': model})}"
