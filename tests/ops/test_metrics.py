"""What Prometheus is told, and that the dashboard and the alerts ask for nothing else."""

import importlib
import json
import re
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from django.db import transaction
from django.test import Client
from django.utils import timezone
from prometheus_client.parser import text_string_to_metric_families
from redis import Redis

from agents import inbox
from agents.events import stream
from agents.models import Attempt, Event, Limit, Rollup, Run, Summary
from agents.runs import execution, outcomes
from agents.usage import limits, rollups
from agents.worker import presence as workers
from botrunner.models import Session
from chat.models import Message, Thread
from lib import process
from ops import metrics
from tests import factories
from tests.botrunner import scenes as rooms
from tests.fakes.llm import Failure, FakeLLM
from tests.fakes.receiver import HOST
from tests.webhooks import scenes as webhooks
from webhooks.models import Subscription

pytestmark = pytest.mark.django_db(transaction=True)

EPOCH = metrics._epoch
DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


@pytest.fixture(autouse=True)
def _at_no_midnight(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is counted anew each day must not do so during a test."""
    yesterday = timezone.now() - timedelta(days=1)
    monkeypatch.setattr(metrics, "_epoch", lambda: yesterday)


class Scrape:
    def __init__(self, text: str) -> None:
        self.text = text
        self.families = {family.name: family for family in text_string_to_metric_families(text)}

    @property
    def names(self) -> set[str]:
        """As queries may name them."""
        samples = {s.name for family in self.families.values() for s in family.samples}
        # A family that has nothing to tell at the moment.
        for family in self.families.values():
            endings = {
                "counter": ["_total"],
                "gauge": [""],
                "histogram": ["_bucket", "_sum", "_count"],
            }.get(family.type, [])
            samples |= {family.name + ending for ending in endings}
        return samples

    def value(self, sample: str, **labels: str) -> float:
        found = [
            s.value
            for family in self.families.values()
            for s in family.samples
            if s.name == sample and labels.items() <= s.labels.items()
        ]
        assert len(found) == 1, (sample, labels, found)
        return float(found[0])

    def counters(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        """Return all samples that must not fall, but those of this process's own requests."""
        return {
            (s.name, frozenset(s.labels.items())): s.value
            for family in self.families.values()
            if family.type in ("counter", "histogram")
            for s in family.samples
            if s.name.startswith("botrealm_") and not s.name.endswith("_created")
        }

    def label_values(self) -> set[str]:
        return {
            value
            for family in self.families.values()
            for s in family.samples
            for value in s.labels.values()
        }


def scrape() -> Scrape:
    response = Client().get("/metrics")
    assert response.status_code == 200
    assert response.headers["Content-Type"].startswith("text/plain; version=")
    return Scrape(response.content.decode())


class TestRuns:
    def test_outcomes_by_model_source_and_status(self, model: FakeLLM, redis: Redis) -> None:
        run = factories.ask()
        execution.execute(run.pk)
        model.script(Failure(401))
        execution.execute(factories.ask(source=Run.Source.MATRIX).pk)
        rollups.fold()

        told = scrape()

        by = {"model": "gpt-4o-mini"}
        value = told.value
        assert value("botrealm_runs_total", source="http", status="completed", **by) == 1
        assert value("botrealm_runs_total", source="matrix", status="failed", **by) == 1
        assert value("botrealm_runs_total", source="stream", status="failed", **by) == 0
        assert value("botrealm_run_failures_total", code="key_refused", **by) == 1
        run.refresh_from_db()
        assert value("botrealm_tokens_total", kind="prompt", **by) == run.prompt_tokens > 0
        assert value("botrealm_attempts_total", result="completed") == 1
        assert value("botrealm_run_seconds_count", source="http") == 1
        assert value("botrealm_run_queue_seconds_bucket", source="http", le="+Inf") == 1
        assert value("botrealm_run_model_seconds_count", **by) == 2

    def test_durations_fall_into_buckets(self, model: FakeLLM, redis: Redis) -> None:
        run = factories.ask()
        execution.execute(run.pk)
        now = timezone.now()
        begun = now - timedelta(seconds=17)
        Run.objects.update(created_at=now - timedelta(seconds=20), started_at=begun)
        Attempt.objects.update(started_at=begun, ended_at=now)
        rollups.fold()

        told = scrape()

        def bucket(name: str, le: str) -> float:
            return told.value(f"{name}_bucket", source="http", le=le)

        assert [bucket("botrealm_run_seconds", le) for le in ("10.0", "50.0", "+Inf")] == [0, 1, 1]
        assert [bucket("botrealm_run_queue_seconds", le) for le in ("2.0", "5.0")] == [0, 1]
        assert told.value("botrealm_run_seconds_sum", source="http") == pytest.approx(20, abs=0.1)

    @pytest.mark.parametrize("number", range(len(metrics.RUN_BOUNDS)))
    def test_a_bound_is_the_end_of_a_bucket_of_the_rollups(self, number: int) -> None:
        bound = metrics.RUN_BOUNDS[number]
        durations = metrics.Durations()
        for share in (0.97, 1.03):
            durations.add({rollups.Histogram.bucket(int(1000 * bound * share)): 1}, 0)

        assert [count for _, count in durations.buckets()][number] == 1

    def test_what_was_spent(self, model: FakeLLM, redis: Redis) -> None:
        factories.price(prompt="1000", completion="0")
        run = factories.ask()
        execution.execute(run.pk)
        Summary.objects.create(
            thread=run.thread, covers_from=0, covers_to=1, text="t", model="gpt-4o-mini",
            prompt_tokens=3, cost=None,
        )  # fmt: skip
        rollups.fold()

        told = scrape()

        run.refresh_from_db()
        by = {"model": "gpt-4o-mini"}
        assert told.value("botrealm_cost_total", **by) == run.prompt_tokens / 1000 > 0
        assert told.value("botrealm_unpriced_total", **by) == 1
        assert told.value("botrealm_tokens_total", kind="prompt", **by) == run.prompt_tokens + 3
        # A summary is no attempt and no run.
        assert told.value("botrealm_attempts_total", result="completed") == 1

    def test_counters_survive_what_is_let_go_of(self, model: FakeLLM, redis: Redis) -> None:
        execution.execute(factories.ask().pk)
        rollups.fold()
        before = scrape()

        Thread.objects.all().delete()
        Rollup.objects.exclude(grain=max(rollups.KEPT)).delete()
        rollups.forget()
        after = scrape()

        for name, labels in (
            ("botrealm_runs_total", {"source": "http", "status": "completed"}),
            ("botrealm_attempts_total", {"result": "completed"}),
            ("botrealm_run_seconds_sum", {"source": "http"}),
            ("botrealm_tokens_total", {"kind": "prompt"}),
        ):
            assert before.value(name, **labels) == after.value(name, **labels) > 0

    def test_how_far_behind_the_figures_are(self, model: FakeLLM, redis: Redis) -> None:
        assert scrape().value("botrealm_rollup_age_seconds") == 0
        execution.execute(factories.ask().pk)
        Attempt.objects.update(ended_at=timezone.now() - timedelta(minutes=2))
        assert scrape().value("botrealm_rollup_age_seconds") == pytest.approx(120, abs=20)

        rollups.fold()

        assert scrape().value("botrealm_rollup_age_seconds") == 0

    def test_a_fenced_outcome_is_counted(self, model: FakeLLM, redis: Redis) -> None:
        run = factories.ask()
        late = execution.claim(run.pk)
        assert late
        Run.objects.update(lease_expires_at=timezone.now() - timedelta(minutes=1))
        execution.execute(run.pk)
        outcomes.complete(late, "late", outcomes.EMPTY)
        rollups.fold()

        told = scrape()

        assert told.value("botrealm_attempts_fenced_total") == 1
        assert told.value("botrealm_attempts_total", result="lost") == 1
        assert Attempt.objects.exclude(fenced_at=None).get().number == 1

    def test_no_counter_falls_when_what_it_counted_is_deleted(
        self, model: FakeLLM, redis: Redis
    ) -> None:
        for _ in range(2):
            run = factories.ask()
            late = execution.claim(run.pk)
            assert late
            Run.objects.filter(pk=run.pk).update(
                lease_expires_at=timezone.now() - timedelta(minutes=1)
            )
            execution.execute(run.pk)
            outcomes.complete(late, "late", outcomes.EMPTY)
        rollups.fold()
        before = scrape().counters()

        Thread.objects.all().delete()

        after = scrape().counters()
        assert before["botrealm_attempts_fenced_total", frozenset()] == 2
        assert {name: value for name, value in before.items() if after.get(name, 0) < value} == {}

    def test_a_scrape_reads_no_runs_that_have_ended(
        self, model: FakeLLM, django_assert_max_num_queries: Any
    ) -> None:
        execution.execute(factories.ask().pk)
        rollups.fold()
        with django_assert_max_num_queries(20) as queries:
            metrics.outcomes(metrics._epoch())
        read = [query["sql"] for query in queries.captured_queries]

        assert len(read) == 1
        assert "agents_rollup" in read[0]
        assert "agents_run" not in read[0].replace("agents_rollup", "")

    def test_a_day_ends(self, model: FakeLLM, monkeypatch: Any) -> None:
        execution.execute(factories.ask().pk)
        rollups.fold()
        assert metrics.outcomes(metrics._epoch()).runs

        Rollup.objects.update(start=timezone.now() - timedelta(days=2))

        assert not metrics.outcomes(metrics._epoch()).runs


def test_the_epoch_begins_a_rollup() -> None:
    epoch = EPOCH()

    assert rollups.slot(epoch, Rollup.Grain.HOURS) == epoch
    assert timedelta() <= timezone.now() - epoch < timedelta(days=1, minutes=1)


class TestQueues:
    def test_what_waits(self, redis: Redis) -> None:
        presence = workers.WorkerHeartbeat("worker-1", concurrency=4)
        presence.note_read()
        presence.beat()
        run = factories.ask()
        Run.objects.update(due_at=timezone.now() - timedelta(minutes=5))
        Event.objects.update(created_at=timezone.now() - timedelta(minutes=4))
        redis.xadd("agent_events:dead", {"reason": "canary"})

        told = scrape()

        assert told.value("botrealm_runs_unfinished", status="queued") == 1
        assert told.value("botrealm_queue_age_seconds") == pytest.approx(300, abs=20)
        assert told.value("botrealm_outbox_events") == 1
        assert told.value("botrealm_outbox_age_seconds") == pytest.approx(240, abs=20)
        assert told.value("botrealm_workers_alive") == 1
        assert told.value("botrealm_workers_reading") == 1
        assert told.value("botrealm_dead_letters") == 1
        assert told.value("botrealm_scrape_ok", part="database") == 1
        assert told.value("botrealm_scrape_ok", part="redis") == 1
        assert run.pk not in told.text

    def test_how_far_the_groups_are(self, redis: Redis) -> None:
        stream.ensure_group()
        hour_ago = int(time.time() * 1000) - 3_600_000
        redis.xadd("agent_events", {"event": "1"}, id=f"{hour_ago}-0")
        stream.read("worker-1")
        redis.xadd("agent_events", {"event": "2"}, id=f"{hour_ago + 1_800_000}-0")
        redis.xgroup_create("agent_events", "somebody-else", id="0")

        told = scrape()

        lag = told.value("botrealm_stream_lag_seconds", group="agent_runtime")
        assert lag == pytest.approx(1800, abs=20)
        assert told.value("botrealm_stream_pending_entries", group="agent_runtime") == 1
        assert told.value("botrealm_stream_entries") == 2
        assert "somebody-else" not in told.text

    def test_without_redis_the_rest_is_told(self) -> None:
        told = scrape()

        assert told.value("botrealm_scrape_ok", part="redis") == 0
        assert told.value("botrealm_scrape_ok", part="database") == 1
        assert "botrealm_dead_letters" not in told.names

    def test_the_bot(self, settings: Any, redis: Redis) -> None:
        assert "botrealm_bot_sync_age_seconds" not in scrape().names
        Session.objects.create(
            homeserver=settings.MATRIX_URL,
            username=settings.BOT_RUNNER_USERNAME,
            last_sync_at=timezone.now() - timedelta(minutes=3),
        )

        assert scrape().value("botrealm_bot_sync_age_seconds") == pytest.approx(180, abs=20)


class TestHTTP:
    def test_requests_by_route(self, client: Client) -> None:
        def count(**labels: str) -> float:
            text = metrics.exposition().decode()
            try:
                return Scrape(text).value("botrealm_http_requests_total", **labels)
            except AssertionError:
                return 0

        run = {"method": "GET", "route": "/api/chat/runs/<id:run_id>", "status": "404"}
        unknown = {"method": "GET", "route": "unknown", "status": "404"}
        odd = {"method": "other", "route": "/api/", "status": "404"}
        before = count(**run), count(**unknown), count(**odd)
        client.get("/api/chat/runs/run_canary")
        client.get("/wp-login.php?canary")
        client.generic("CANARY", "/api/canary")
        told = count(**run), count(**unknown), count(**odd)

        assert [now - then for now, then in zip(told, before, strict=True)] == [1, 1, 1]
        assert "canary" not in metrics.exposition().decode().lower()

    def test_probes_are_not_counted(self, client: Client) -> None:
        client.get("/healthz")

        assert "/healthz" not in metrics.exposition().decode()


def test_labels_have_no_ids_and_nothing_that_was_typed(model: FakeLLM, redis: Redis) -> None:
    thread = Thread.objects.create(id="thr-canary")
    run = factories.ask("canary", thread_id=thread.pk, model="canary-model", run_id="run-canary")
    execution.execute(run.pk)
    rollups.fold()

    told = scrape()

    assert told.value("botrealm_runs_total", model="other", status="completed") == 1
    assert not [value for value in told.label_values() if "canary" in value]
    ids = {str(pk) for pk in Message.objects.values_list("pk", flat=True)}
    assert not ids & told.label_values()


@pytest.fixture
def everything(redis: Redis, settings: Any, client: Client) -> set[str]:
    """The names of all metrics that there can be."""
    Session.objects.create(
        homeserver=settings.MATRIX_URL,
        username=settings.BOT_RUNNER_USERNAME,
        last_sync_at=timezone.now(),
    )
    client.get("/api")
    importlib.import_module("config.server.refusals")  # a web server has it
    return scrape().names


def asked_for(expression: str) -> set[str]:
    return set(re.findall(r"\bbotrealm_\w+", expression))


def test_the_dashboard_asks_for_what_there_is(everything: set[str]) -> None:
    dashboard = json.loads((DEPLOY / "grafana/botrealm.json").read_text())
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    asked = set().union(*map(asked_for, expressions))

    assert all(map(asked_for, expressions))
    assert asked <= everything, asked - everything
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    # Nothing is measured that nobody looks at.
    bases = {re.sub(r"_(bucket|sum|count|total|created)$", "", name) for name in asked}
    measured = {name for name in everything if name.startswith("botrealm_")}
    unseen = {re.sub(r"_(bucket|sum|count|total|created)$", "", name) for name in measured} - bases
    assert not unseen


def test_the_alerts_ask_for_what_there_is(everything: set[str]) -> None:
    [group] = yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())["groups"]
    asked = [asked_for(rule["expr"]) for rule in group["rules"]]

    assert all(asked)
    assert set().union(*asked) <= everything
    for rule in group["rules"]:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"]
        named = asked_for(rule["annotations"].get("description", ""))
        assert named <= everything


def test_deliveries_that_wait_and_that_were_given_up_are_counted(
    redis: Redis, settings: Any
) -> None:
    settings.HOOKS_ALLOWED_HOSTS = [HOST]
    dead, waiting, owed = [webhooks.delivery(webhooks.subscribe()) for _ in range(3)]
    dead.claim()
    dead.note_dead("It answered 500.", status_code=500)
    Subscription.objects.filter(pk=owed.subscription_id).disable("a holiday")

    told = scrape()

    assert waiting.subscription.enabled
    assert told.value("botrealm_webhooks_waiting") == 1
    assert told.value("botrealm_webhooks_dead") == 1


class TestRefusals:
    @pytest.fixture(autouse=True)
    def _one_a_minute(self, redis: Redis, settings: Any) -> None:
        settings.LIMIT_USER_MESSAGES_PER_MINUTE = 1

    @staticmethod
    def ask(client: Client) -> int:
        asked = {"content": "Hello"}
        return client.post("/api/chat/messages", asked, "application/json").status_code

    def test_those_over_http_by_their_reason(self, client: Client) -> None:
        assert scrape().value("botrealm_refusals_total", source="http", code="rate_limited") == 0
        assert [self.ask(client) for _ in range(3)] == [202, 429, 429]
        told = scrape()
        assert told.value("botrealm_refusals_total", source="http", code="rate_limited") == 2
        assert told.value("botrealm_refusals_total", source="http", code="too_many_waiting") == 0

    def test_those_in_a_room_which_no_web_process_sees(self) -> None:
        """Counted by another process, which ends."""
        rooms.command()
        rooms.take_in(rooms.session(), *[rooms.event("Hello") for _ in range(3)])
        process.reset()
        told = scrape()
        assert told.value("botrealm_refusals_total", source="matrix", code="rate_limited") == 2

    def test_those_on_the_stream(self) -> None:
        Limit.objects.create(kind="user", name=limits.PROGRAMS, messages_per_minute=1)
        for number in range(3):
            with suppress(inbox.Limited):
                submission = inbox.Submission(
                    content=f"{number}",
                    source=Run.Source.STREAM,
                    requester=limits.PROGRAMS,
                    threads=Thread.objects.all(),
                )
                inbox.submit(submission)
        told = scrape()
        assert told.value("botrealm_refusals_total", source="stream", code="rate_limited") == 2

    def test_what_is_taken_back_was_not_refused(self) -> None:
        """The bot repeats a transaction that the database has failed."""
        factories.ask()
        with suppress(ZeroDivisionError), transaction.atomic():
            with suppress(inbox.Limited):
                factories.ask()
            raise ZeroDivisionError
        told = scrape()
        assert told.value("botrealm_refusals_total", source="http", code="rate_limited") == 0

    def test_what_redis_does_not_take_is_told_with_the_next(
        self, client: Client, settings: Any
    ) -> None:
        there = settings.REDIS_URL
        self.ask(client)
        settings.REDIS_URL = "redis://127.0.0.1:1"
        stream._publisher.reset()
        assert [self.ask(client) for _ in range(2)] == [429, 429]
        settings.REDIS_URL = there
        stream._publisher.reset()
        stream._breaker.reset()
        assert self.ask(client) == 429
        told = scrape()
        assert told.value("botrealm_refusals_total", source="http", code="rate_limited") == 3
