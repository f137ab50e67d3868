"""Each outcome is in the figures once, however and whenever it came about."""

import math
import random
import statistics
import threading
from collections import Counter
from datetime import timedelta
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.db import connection, transaction
from django.db.models import Sum
from django.db.models.functions import Now
from django.utils import timezone

from agents.models import Attempt, Event, Rollup, Run, Summary, Usage
from agents.runs import actions, execution, memory
from agents.usage import rollups
from agents.usage.rollups import Histogram
from chat.models import Thread
from tests import factories
from tests.fakes.llm import Failure, FakeLLM
from tests.plans import explain

pytestmark = pytest.mark.django_db
GRAINS = Rollup.Grain.values


def counts(grain: int = Rollup.Grain.MINUTE) -> dict[str, int]:
    """How often each result was counted, with the code of the failure."""
    found: Counter[str] = Counter()
    for row in Rollup.objects.filter(grain=grain):
        found[f"{row.result} {row.error_code}".strip()] += row.count
    return dict(found)


def test_an_outcome_is_counted_once_in_each_grain(model: FakeLLM) -> None:
    factories.price()
    run = factories.ask(owner=factories.user("alice"), place="!room:localhost")
    execution.execute(run.pk)

    assert rollups.fold() == 1
    assert rollups.fold() == 0

    run.refresh_from_db()
    for grain in GRAINS:
        assert counts(grain) == {"completed": 1}
    row = Rollup.objects.get(grain=Rollup.Grain.MINUTE)
    assert (row.model, row.source, row.unpriced) == ("gpt-4o-mini", "http", 0)
    assert (row.prompt_tokens, row.completion_tokens) == (run.prompt_tokens, run.completion_tokens)
    assert row.cost == run.cost
    assert run.finished_at
    assert row.start == run.finished_at.replace(second=0, microsecond=0)
    assert row.total_ms == pytest.approx((run.finished_at - run.created_at) / ms(1), abs=50)
    assert sum(row.totals.values()) == sum(row.waits.values()) == 1
    used = Usage.objects.get()
    assert (used.user, used.place, used.runs) == ("@alice:localhost", "!room:localhost", 1)
    assert (used.cost, used.day) == (run.cost, run.finished_at.date())


def test_what_was_tried_again_counts_as_a_retry_and_one_outcome(model: FakeLLM) -> None:
    model.script(Failure(status=503))
    run = factories.ask()
    execution.execute(run.pk)
    rollups.fold()
    assert counts() == {"retried unavailable": 1}

    Run.objects.update(due_at=Now())
    execution.execute(run.pk)
    rollups.fold()

    assert counts() == {"retried unavailable": 1, "completed": 1}
    assert Usage.objects.get().runs == 1


def test_a_failure_is_counted_by_its_cause(model: FakeLLM) -> None:
    model.script(Failure(status=401))
    execution.execute(factories.ask().pk)
    rollups.fold()

    assert counts() == {"failed key_refused": 1}
    assert Usage.objects.get().failed == 1
    assert list(rollups.first_seen([("key_refused", "gpt-4o-mini")])) == [
        ("key_refused", "gpt-4o-mini")
    ]


def test_a_lost_worker_is_counted(model: FakeLLM) -> None:
    run = factories.ask()
    execution.claim(run.pk)
    Run.objects.update(lease_expires_at=Now() - timedelta(seconds=1))
    execution.execute(run.pk)
    rollups.fold()

    assert counts() == {"lost worker_lost": 1, "completed": 1}


@pytest.mark.parametrize("claimed", [False, True])
def test_a_cancellation_is_counted_once(claimed: bool) -> None:
    run = factories.ask()
    if claimed:
        execution.claim(run.pk)
    actions.cancel(run)

    # By when its worker would have told what it had come to.
    Attempt.objects.update(ended_at=timezone.now() - rollups.PARTIAL_PATIENCE)
    rollups.fold()
    rollups.fold()

    assert counts() == {"cancelled": 1}
    assert Usage.objects.get().runs == 1


def test_a_summary_counts_for_tokens_and_not_as_a_run(model: FakeLLM) -> None:
    factories.price()
    thread = factories.conversation(6)
    Run.objects.update(place="!room:localhost")
    Thread.objects.update(summary_due_at=thread.created_at)
    summary = memory.summarise(thread.pk)
    rollups.fold()

    assert summary
    assert counts() == {"summary": 1}
    used = Usage.objects.get()
    assert (used.runs, used.cost, used.place) == (0, summary.cost, "!room:localhost")


def test_what_has_no_price_is_told_apart(model: FakeLLM) -> None:
    execution.execute(factories.ask().pk)
    rollups.fold()

    assert Usage.objects.get().unpriced == 1
    assert Rollup.objects.get(grain=Rollup.Grain.MINUTE).unpriced == 1


def test_what_is_done_to_a_run_afterwards_changes_no_count() -> None:
    run = factories.ask()
    execution.execute(run.pk)
    rollups.fold()
    run.thread.delete()
    rollups.fold()

    assert counts() == {"completed": 1}


def test_many_batches_add_up() -> None:
    for number in range(7):
        execution.execute(factories.ask(model=f"model-{number % 2}").pk)

    assert rollups.fold(batch=2, batches=2) == 4
    assert rollups.fold(batch=2) == 3

    for grain in GRAINS:
        assert counts(grain) == {"completed": 7}
    assert sum(row.runs for row in Usage.objects.all()) == 7


@pytest.mark.django_db(transaction=True)
def test_of_many_who_count_at_once_each_outcome_is_counted_by_one() -> None:
    for _ in range(30):
        execution.execute(factories.ask().pk)
    start = threading.Barrier(4)

    def count() -> None:
        start.wait()
        while Attempt.objects.filter(to_count=True).exists():
            rollups.fold(batch=3)
        connection.close()

    workers = [threading.Thread(target=count) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)

    for grain in GRAINS:
        assert counts(grain) == {"completed": 30}
    assert Usage.objects.aggregate(Sum("runs"))["runs__sum"] == 30


def test_a_fold_that_breaks_off_counts_nothing(monkeypatch: Any) -> None:
    execution.execute(factories.ask().pk)

    def die(usage: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        broken.setattr(rollups, "_save_usage", die)
        with transaction.atomic():
            rollups.fold()
    assert counts() == {}

    rollups.fold()
    assert counts() == {"completed": 1}


def test_to_rebuild_gives_the_same(model: FakeLLM) -> None:
    factories.price()
    model.script(Failure(status=503))
    for _ in range(3):
        execution.execute(factories.ask(owner=None).pk)
    actions.cancel(factories.ask())
    rollups.fold()
    before = snapshot()

    call_command("rebuild_rollups")

    assert snapshot() == before


def test_to_rebuild_is_refused_where_it_would_lose_figures() -> None:
    run = factories.ask()
    execution.execute(run.pk)
    rollups.fold()
    run.thread.delete()

    with pytest.raises(CommandError, match="--force"):
        call_command("rebuild_rollups")
    assert counts() == {"completed": 1}
    call_command("rebuild_rollups", force=True)
    assert counts() == {}


def test_fine_figures_are_kept_for_days_and_coarse_ones_for_good() -> None:
    for days in (0, 5, 50):
        run = factories.ask()
        execution.execute(run.pk)
        Attempt.objects.filter(run=run).update(ended_at=timezone.now() - timedelta(days=days))
    rollups.fold()
    assert [counts(grain)["completed"] for grain in GRAINS] == [1, 2, 3]

    minutes = Rollup.objects.filter(grain=Rollup.Grain.MINUTE)
    minutes.update(start=timezone.now() - timedelta(days=5))
    rollups.forget()
    assert [counts(grain).get("completed", 0) for grain in GRAINS] == [0, 2, 3]


@pytest.mark.parametrize("share", [0.5, 0.95, 0.99])
def test_a_percentile_is_within_the_error_that_is_told(share: float) -> None:
    random.seed(4711)
    times = sorted(int(random.lognormvariate(6, 1.5)) for _ in range(5000))
    histogram = Histogram()
    for each in times:
        histogram.merge({Histogram.bucket(each): 1})

    true = statistics.quantiles(times, n=100)[round(share * 100) - 1]

    assert histogram.percentile(share) == pytest.approx(true, rel=Histogram.ERROR)
    assert Histogram.ERROR < 0.123


def test_percentiles_at_the_ends() -> None:
    assert Histogram().percentile(0.5) is None
    assert (Histogram({"0": 3}).percentile(0.99) or 0) <= 1
    for each in (1, 2, 10, 1000, 10_000_000):
        high = 10 ** (int(Histogram.bucket(each)) / Histogram.PER_DECADE)
        assert each <= high * 1.000001
        assert math.isclose(high, each) or each > high / (1 + Histogram.ERROR) / 1.000001


@pytest.mark.parametrize("source", [Attempt, Event, Summary])
def test_what_is_to_be_counted_is_found_by_an_index(source: Any) -> None:
    query = source.objects.filter(to_count=True).order_by("pk")[:100]

    assert f"{source.__name__.lower()}_to_count" in explain(query)


def snapshot() -> Any:
    key = ("grain", "start", "result", "error_code")
    sums = ("count", "prompt_tokens", "cost", "total_ms", "totals")
    return (
        list(Rollup.objects.order_by(*key).values_list(*key, *sums)),
        list(Usage.objects.order_by("day", "user").values_list("day", "user", "runs", "cost")),
    )


def ms(number: float) -> timedelta:
    return timedelta(milliseconds=number)
