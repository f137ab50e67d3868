"""Metrics for Prometheus.

Each web process counts its own HTTP requests; the processes of one server add up in
PROMETHEUS_MULTIPROC_DIR. Everything else is read from the database and Redis at each scrape, so every
web process reports the same.

Outcomes are read from the rollups (agents.usage.rollups), so the cost of a scrape does not grow with
the number of runs. Their counters start at midnight UTC and reset each day, which Prometheus handles:
the sum of all time would cost more every day. Finer rollups, and the runs, are pruned; rollups of three
hours are not. Labels have a few known values: never an id, never user input.
"""

from bisect import bisect_left
from collections import Counter as Tally
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import accumulate
from math import log10
from typing import Any

from django.conf import settings
from django.db.models import Count
from django.utils import timezone
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    CollectorRegistry,
    Counter,
    Histogram,
    generate_latest,
)
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from agents.events import stream
from agents.models import Attempt, FencedCount, Rollup, Run
from agents.usage import refusals, rollups
from botrunner.models import Reply
from lib import formats
from lib.timeouts import BoundedCheck, CheckFailed, run_checks
from ops import health
from webhooks.models import Delivery

CONTENT_TYPE = CONTENT_TYPE_LATEST
PATIENCE_SECONDS = 4.0
HTTP_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
# Each is the end of a bucket of the rollups, within 0.3 %, so that none is split.
RUN_BOUNDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
LAST_BUCKETS = [round(rollups.Histogram.PER_DECADE * log10(1000 * each)) for each in RUN_BOUNDS]
OTHER = "other"

HTTP_REQUESTS = Counter(
    "botrealm_http_requests", "Requests answered.", ["method", "route", "status"]
)
HTTP_SECONDS = Histogram(
    "botrealm_http_request_seconds",
    "From the first middleware to the answer.",
    ["method", "route"],
    buckets=HTTP_BOUNDS,
)


def observe_request(method: str, route: str, status: int, seconds: float) -> None:
    HTTP_REQUESTS.labels(method, route, status).inc()
    HTTP_SECONDS.labels(method, route).observe(seconds)


def exposition() -> bytes:
    """Return all metrics in the text format of Prometheus."""
    http: CollectorRegistry = REGISTRY
    if settings.PROMETHEUS_MULTIPROC_DIR:
        http = CollectorRegistry()
        MultiProcessCollector(http)
    return generate_latest(http) + generate_latest(_SYSTEM)


@dataclass
class Durations:
    """A histogram under construction."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(RUN_BOUNDS) + 1))
    total_ms: int = 0

    def add(self, buckets: dict[str, int], total_ms: int) -> None:
        """Add the histogram of a rollup."""
        for bucket, count in buckets.items():
            self.counts[bisect_left(LAST_BUCKETS, int(bucket))] += count
        self.total_ms += total_ms

    def buckets(self) -> list[tuple[str, float]]:
        """Return cumulative buckets, as Prometheus has them."""
        bounds = [*map(str, map(float, RUN_BOUNDS)), "+Inf"]
        return list(zip(bounds, accumulate(self.counts), strict=True))


@dataclass
class Outcomes:
    """The sums of outcomes since a moment."""

    runs: Tally[tuple[str, str, str]] = field(default_factory=Tally)  # by model, source and status
    failures: Tally[tuple[str, str]] = field(default_factory=Tally)  # by model and error code
    attempts: Tally[str] = field(default_factory=Tally)  # by result
    tokens: Tally[tuple[str, str]] = field(default_factory=Tally)  # by model and kind
    costs: Tally[str] = field(default_factory=Tally)  # by model
    unpriced: Tally[str] = field(default_factory=Tally)  # by model
    queue: dict[str, Durations] = field(default_factory=lambda: defaultdict(Durations))  # by source
    whole: dict[str, Durations] = field(default_factory=lambda: defaultdict(Durations))  # by source
    model: dict[str, Durations] = field(default_factory=lambda: defaultdict(Durations))  # by model

    def add(self, row: Rollup) -> None:
        model = model_label(row.model)
        self.tokens[model, "prompt"] += row.prompt_tokens
        self.tokens[model, "completion"] += row.completion_tokens
        self.costs[model] += row.cost
        self.unpriced[model] += row.unpriced
        if row.result != Rollup.SUMMARY:
            self.attempts[row.result] += row.count
        if row.result in rollups.ENDED:
            self.runs[model, row.source, row.result] += row.count
        if row.result == Attempt.Result.FAILED:
            self.failures[model, row.error_code] += row.count
        if row.result in rollups.ANSWERED:
            self.queue[row.source].add(row.waits, row.wait_ms)
            self.whole[row.source].add(row.totals, row.total_ms)
            self.model[model].add(row.model_times, row.model_ms)


def outcomes(since: datetime) -> Outcomes:
    """Sum the outcomes since `since`, which begins a rollup of three hours."""
    sums = Outcomes()
    for row in Rollup.objects.filter(grain=Rollup.Grain.HOURS, start__gte=since):
        sums.add(row)
    return sums


def model_label(model: str) -> str:
    """Return the model as a label: by its name if it is configured, as clients may request any name."""
    configured = {
        settings.CHAT_DEFAULT_MODEL,
        settings.CHAT_SUMMARY_MODEL,
        *settings.CHAT_ALLOWED_MODELS,
    }
    return model if model in configured else OTHER


def _epoch() -> datetime:
    return timezone.now().astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)


def _from_database() -> Iterator[Metric]:
    since = _epoch()
    yield from _outcome_metrics(outcomes(since))
    yield _counter(
        "botrealm_attempts_fenced",
        "Outcomes discarded because their worker had lost the run.",
        FencedCount.objects.of_today(),
    )
    yield _gauge(
        "botrealm_rollup_age_seconds",
        "Age of the oldest outcome not yet counted in these figures.",
        rollups.seconds_behind(),
    )
    yield from _gauges_of_database()


def _outcome_metrics(sums: Outcomes) -> Iterator[Metric]:
    # Includes series without a run yet: a rate needs a zero to start from.
    every_run: Tally[tuple[str, str, str]] = Tally()
    for source in Run.Source.values:
        for status in rollups.ENDED:
            every_run[settings.CHAT_DEFAULT_MODEL, source, status.value] = 0
    every_run.update(sums.runs)
    yield _counters(
        "botrealm_runs", "Runs that have ended.", ["model", "source", "status"], every_run
    )
    yield _counters("botrealm_run_failures", "Runs failed.", ["model", "code"], sums.failures)
    every_result = Tally(dict.fromkeys(Attempt.Result.values, 0))
    every_result.update(sums.attempts)
    yield _counters(
        "botrealm_attempts",
        "Attempts by result, and runs cancelled before any attempt.",
        ["result"],
        every_result,
    )
    yield _counters(
        "botrealm_tokens",
        "Tokens of all attempts and of summaries.",
        ["model", "kind"],
        sums.tokens,
    )
    yield _counters(
        "botrealm_cost",
        "Cost of attempts and summaries, in the currency of the prices.",
        ["model"],
        {model: float(formats.amount(cost)) for model, cost in sums.costs.items()},
    )
    yield _counters(
        "botrealm_unpriced",
        "Attempts and summaries whose model had no price: their cost is missing above.",
        ["model"],
        sums.unpriced,
    )
    yield _histogram(
        "botrealm_run_queue_seconds",
        "From the message to its first attempt, of runs answered or failed.",
        "source",
        sums.queue,
    )
    yield _histogram(
        "botrealm_run_seconds",
        "From the message to its outcome, of runs answered or failed.",
        "source",
        sums.whole,
    )
    yield _histogram(
        "botrealm_run_model_seconds",
        "Time of the last attempt spent in calls of the model.",
        "model",
        sums.model,
    )


def _gauges_of_database() -> Iterator[Metric]:
    unfinished = GaugeMetricFamily(
        "botrealm_runs_unfinished", "Unfinished runs.", labels=["status"]
    )
    rows = Run.objects.unfinished().order_by().values_list("status")
    counts = dict.fromkeys(Run.UNFINISHED, 0) | dict(rows.annotate(count=Count("pk")))
    for status, count in counts.items():
        unfinished.add_metric([status], count)
    yield unfinished
    yield _gauge(
        "botrealm_queue_age_seconds",
        "Waiting time of the oldest claimable run.",
        Run.objects.all().seconds_unclaimed(),
    )
    events, age = health.outbox()
    yield _gauge("botrealm_outbox_events", "Events not yet seen on the stream.", events)
    yield _gauge("botrealm_outbox_age_seconds", "Age of the oldest of them.", age)
    workers = health.workers()
    yield _gauge("botrealm_workers_alive", "Workers with a recent heartbeat.", workers["alive"])
    yield _gauge("botrealm_workers_reading", "Workers that read the stream.", workers["reading"])
    yield _gauge("botrealm_runs_in_hand", "Active runs of all workers.", workers["runsInHand"])
    ready = Reply.objects.ready().count()
    yield _gauge("botrealm_replies_ready", "Replies waiting to be sent.", ready)
    yield _gauge(
        "botrealm_webhooks_waiting",
        "Webhook deliveries that are not finished.",
        Delivery.objects.unfinished().count(),
    )
    yield _gauge(
        "botrealm_webhooks_dead",
        "Dead deliveries of the last day.",
        Delivery.objects.dead_since(timezone.now() - timedelta(days=1)).count(),
    )
    # Absent, so that no alert fires, if there has never been a bot.
    if (seconds := health.bot_sync_seconds()) is not None:
        yield _gauge("botrealm_bot_sync_age_seconds", "Time since the bot's last sync.", seconds)


def _from_redis() -> Iterator[Metric]:
    known = {(source, code): 0 for source in Run.Source.values for code in refusals.CODES}
    counts = refusals.counted()
    yield _counters(
        "botrealm_refusals",
        "Messages refused because of a limit; those of the stream at each attempt.",
        ["source", "code"],
        {labels: counts.get(labels, 0) for labels in known},
    )
    figures = stream.stats()
    yield _gauge("botrealm_stream_entries", "Entries on the event stream.", figures.length)
    yield _gauge("botrealm_dead_letters", "Entries that could not be used.", figures.dead)
    yield _gauge("botrealm_tasks_queued", "Tasks in Celery's queue.", figures.queued)
    lag = GaugeMetricFamily(
        "botrealm_stream_lag_seconds",
        "Age of the first unread entry of a group.",
        labels=["group"],
    )
    unread = GaugeMetricFamily(
        "botrealm_stream_lag_entries",
        "Unread entries of a group (Redis 7 and later).",
        labels=["group"],
    )
    pending = GaugeMetricFamily(
        "botrealm_stream_pending_entries", "Entries read and not acknowledged.", labels=["group"]
    )
    ours = {settings.REDIS_CONSUMER_GROUP, settings.BOT_RUNNER_CONSUMER_GROUP}
    for group in figures.groups:
        if group.name not in ours:
            continue
        lag.add_metric([group.name], group.unread_seconds)
        pending.add_metric([group.name], group.pending)
        if group.unread is not None:
            unread.add_metric([group.name], group.unread)
    yield from (lag, unread, pending)


def _gauge(name: str, help: str, value: float) -> Metric:
    return GaugeMetricFamily(name, help, value=value)


def _counter(name: str, help: str, value: float) -> Metric:
    return CounterMetricFamily(name, help, value=value)


def _counters(
    name: str, help: str, labels: list[str], values: Mapping[Any, float]
) -> CounterMetricFamily:
    family = CounterMetricFamily(name, help, labels=labels)
    for key, value in values.items():
        family.add_metric([key] if isinstance(key, str) else list(key), value)
    return family


def _histogram(name: str, help: str, label: str, histograms: dict[str, Durations]) -> Metric:
    family = HistogramMetricFamily(name, help, labels=[label])
    for value, durations in histograms.items():
        family.add_metric([value], durations.buckets(), durations.total_ms / 1000)
    return family


class SystemCollector(Collector):
    """Collects from the database and Redis; if one fails, the metrics of the other are still
    reported."""

    parts = {
        "database": BoundedCheck(lambda: list(_from_database())),
        "redis": BoundedCheck(lambda: list(_from_redis())),
    }

    def collect(self) -> Iterator[Metric]:
        ok = GaugeMetricFamily(
            "botrealm_scrape_ok", "1 if the part could be read in time.", labels=["part"]
        )
        for name, metrics in run_checks(self.parts, PATIENCE_SECONDS).items():
            ok.add_metric([name], not isinstance(metrics, CheckFailed))
            if not isinstance(metrics, CheckFailed):
                yield from metrics
        yield ok


_SYSTEM = CollectorRegistry()
_SYSTEM.register(SystemCollector())
