"""What Prometheus reads.

HTTP is counted in the process that serves it; the processes of a web server add up in
PROMETHEUS_MULTIPROC_DIR. Everything else is read from the database and Redis when it is asked for, so
it is right however many processes and hosts there are, and whatever they do: each web process tells the
same.

What has ended is read from the rollups (agents.usage.rollups), so a scrape costs the same however
many runs
there were. A counter of theirs holds what ended since midnight UTC and then starts anew, which
Prometheus knows how to read: it falls at that moment only. The sum of all time would cost more every
day; what is finer than three hours, and the runs themselves, are let go of in between, the rollups of
three hours never. Labels have a few known values: never an id, never what somebody typed.
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
from agents.models import Attempt, Rollup, Run
from agents.usage import refusals, rollups
from botrunner.models import Reply
from lib import formats
from lib.timeouts import BoundedCheck, CheckFailed, run_checks
from ops import health
from webhooks.models import Delivery

CONTENT_TYPE = CONTENT_TYPE_LATEST
PATIENCE_SECONDS = 4.0
HTTP_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
# Each is the end of a bucket of the rollups, or within 0.3 % of one, so that none has to be split.
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
    """All there is, in Prometheus' text."""
    counted: CollectorRegistry = REGISTRY
    if settings.PROMETHEUS_MULTIPROC_DIR:
        counted = CollectorRegistry()
        MultiProcessCollector(counted)
    return generate_latest(counted) + generate_latest(_SYSTEM)


@dataclass
class Durations:
    """A histogram in the making."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(RUN_BOUNDS) + 1))
    total_ms: int = 0

    def add(self, buckets: dict[str, int], total_ms: int) -> None:
        """What a rollup has of one."""
        for bucket, count in buckets.items():
            self.counts[bisect_left(LAST_BUCKETS, int(bucket))] += count
        self.total_ms += total_ms

    def buckets(self) -> list[tuple[str, float]]:
        """As Prometheus has them: each counts all that are shorter."""
        bounds = [*map(str, map(float, RUN_BOUNDS)), "+Inf"]
        return list(zip(bounds, accumulate(self.counts), strict=True))


@dataclass
class Outcomes:
    """What has ended since a moment, added up."""

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
    """The one place that looks at what has ended. `since` begins one of the longest rollups."""
    found = Outcomes()
    for row in Rollup.objects.filter(grain=Rollup.Grain.HOURS, start__gte=since):
        found.add(row)
    return found


def model_label(model: str) -> str:
    """A model by its name where an operator has named it: others are whatever a client asked for."""
    named = {
        settings.CHAT_DEFAULT_MODEL,
        settings.CHAT_SUMMARY_MODEL,
        *settings.CHAT_ALLOWED_MODELS,
    }
    return model if model in named else OTHER


def _epoch() -> datetime:
    return timezone.now().astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)


def _from_database() -> Iterator[Metric]:
    since = _epoch()
    yield from _outcome_metrics(outcomes(since))
    yield _counter(
        "botrealm_attempts_fenced",
        "Outcomes thrown away because their worker had lost the run.",
        Attempt.objects.filter(fenced_at__gte=since).count(),
    )
    yield _gauge(
        "botrealm_rollup_age_seconds",
        "For how long the oldest outcome has not been counted in the figures here.",
        rollups.seconds_behind(),
    )
    yield from _gauges_of_database()


def _outcome_metrics(found: Outcomes) -> Iterator[Metric]:
    # Those of which there is none yet as well: a rate needs a zero to begin at.
    every_run: Tally[tuple[str, str, str]] = Tally()
    for source in Run.Source.values:
        for status in rollups.ENDED:
            every_run[settings.CHAT_DEFAULT_MODEL, source, status.value] = 0
    every_run.update(found.runs)
    yield _counters(
        "botrealm_runs", "Runs that have ended.", ["model", "source", "status"], every_run
    )
    yield _counters("botrealm_run_failures", "Runs failed.", ["model", "code"], found.failures)
    every_result = Tally(dict.fromkeys(Attempt.Result.values, 0))
    every_result.update(found.attempts)
    yield _counters(
        "botrealm_attempts",
        "Attempts at runs, by how they ended; with runs cancelled before any.",
        ["result"],
        every_result,
    )
    yield _counters(
        "botrealm_tokens",
        "Tokens of attempts, whatever became of them, and of summaries.",
        ["model", "kind"],
        found.tokens,
    )
    yield _counters(
        "botrealm_cost",
        "What they cost, in the currency of the prices.",
        ["model"],
        {model: float(formats.amount(cost)) for model, cost in found.costs.items()},
    )
    yield _counters(
        "botrealm_unpriced",
        "Attempts and summaries whose model had no price: their cost is missing above.",
        ["model"],
        found.unpriced,
    )
    yield _histogram(
        "botrealm_run_queue_seconds",
        "From the question to its first attempt, of runs answered or failed.",
        "source",
        found.queue,
    )
    yield _histogram(
        "botrealm_run_seconds",
        "From the question to its outcome, of runs answered or failed.",
        "source",
        found.whole,
    )
    yield _histogram(
        "botrealm_run_model_seconds",
        "What their last attempt spent in calls of the model.",
        "model",
        found.model,
    )


def _gauges_of_database() -> Iterator[Metric]:
    unfinished = GaugeMetricFamily(
        "botrealm_runs_unfinished", "Runs that have not ended.", labels=["status"]
    )
    rows = Run.objects.unfinished().order_by().values_list("status")
    counts = dict.fromkeys(Run.UNFINISHED, 0) | dict(rows.annotate(count=Count("pk")))
    for status, count in counts.items():
        unfinished.add_metric([status], count)
    yield unfinished
    yield _gauge(
        "botrealm_queue_age_seconds",
        "For how long the oldest claimable run has not been claimed.",
        Run.objects.all().seconds_unclaimed(),
    )
    events, age = health.outbox()
    yield _gauge("botrealm_outbox_events", "Events that no worker has seen on the stream.", events)
    yield _gauge("botrealm_outbox_age_seconds", "The age of the oldest of them.", age)
    told = health.workers()
    yield _gauge("botrealm_workers_alive", "Workers whose beat is fresh.", told["alive"])
    yield _gauge("botrealm_workers_reading", "Those that read the stream.", told["reading"])
    yield _gauge("botrealm_runs_in_hand", "Runs that workers hold.", told["runsInHand"])
    ready = Reply.objects.ready().count()
    yield _gauge("botrealm_replies_ready", "Replies that wait for their room.", ready)
    yield _gauge(
        "botrealm_webhooks_waiting",
        "Deliveries to webhooks that have not been taken yet.",
        Delivery.objects.unfinished().count(),
    )
    yield _gauge(
        "botrealm_webhooks_dead",
        "Deliveries of the last day that were given up.",
        Delivery.objects.dead_since(timezone.now() - timedelta(days=1)).count(),
    )
    # Left out, and so no reason for an alert, where no bot has ever been at work.
    if (seconds := health.bot_sync_seconds()) is not None:
        yield _gauge(
            "botrealm_bot_sync_age_seconds", "Since the bot last heard of its homeserver.", seconds
        )


def _from_redis() -> Iterator[Metric]:
    known = {(source, code): 0 for source in Run.Source.values for code in refusals.CODES}
    found = refusals.counted()
    yield _counters(
        "botrealm_refusals",
        "Questions refused because a limit was reached; those of the stream at each try.",
        ["source", "code"],
        {labels: found.get(labels, 0) for labels in known},
    )
    figures = stream.stats()
    yield _gauge("botrealm_stream_entries", "Entries on the event stream.", figures.length)
    yield _gauge("botrealm_dead_letters", "Entries that no worker could use.", figures.dead)
    yield _gauge("botrealm_tasks_queued", "Tasks in Celery's queue.", figures.queued)
    lag = GaugeMetricFamily(
        "botrealm_stream_lag_seconds",
        "How old the first entry is that a group has yet to read.",
        labels=["group"],
    )
    unread = GaugeMetricFamily(
        "botrealm_stream_lag_entries",
        "How many entries a group has yet to read; with Redis 7 and later.",
        labels=["group"],
    )
    pending = GaugeMetricFamily(
        "botrealm_stream_pending_entries", "Read, and not acknowledged.", labels=["group"]
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


def _histogram(name: str, help: str, label: str, found: dict[str, Durations]) -> Metric:
    family = HistogramMetricFamily(name, help, labels=[label])
    for value, durations in found.items():
        family.add_metric([value], durations.buckets(), durations.total_ms / 1000)
    return family


class System(Collector):
    """One half that cannot be read does not keep the other from being told."""

    parts = {
        "database": BoundedCheck(lambda: list(_from_database())),
        "redis": BoundedCheck(lambda: list(_from_redis())),
    }

    def collect(self) -> Iterator[Metric]:
        ok = GaugeMetricFamily(
            "botrealm_scrape_ok", "Whether it could be read in time.", labels=["part"]
        )
        for name, found in run_checks(self.parts, PATIENCE_SECONDS).items():
            ok.add_metric([name], not isinstance(found, CheckFailed))
            if not isinstance(found, CheckFailed):
                yield from found
        yield ok


_SYSTEM = CollectorRegistry()
_SYSTEM.register(System())
