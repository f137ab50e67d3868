"""Who deletes, cancels, asks, retries and works at once gets in nobody's way."""

import logging
import threading
from typing import Any

import pytest
from django.db import OperationalError, connection, transaction

from agents.models import Run
from chat.models import Message, Thread
from lib import db
from realm.models import User
from tests.agents.conftest import Broker
from tests.agents.crowd import Crowd
from webhooks.models import Subscription

logger = logging.getLogger(__name__)
pytestmark = [
    pytest.mark.skipif(connection.vendor != "postgresql", reason="On SQLite one writes at a time."),
    pytest.mark.django_db(transaction=True),
]


def deadlocks() -> int:
    with connection.cursor() as cursor:
        cursor.execute("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")
        return int(cursor.fetchone()[0])


def test_all_at_once_to_a_few_threads(
    broker: Broker, settings: Any, request: pytest.FixtureRequest
) -> None:
    settings.RETENTION_THREADS_DAYS = settings.RETENTION_EVENTS_DAYS = 30
    settings.LIMIT_USER_RUNS_UNFINISHED = 100
    settings.LIMIT_USER_MESSAGES_PER_MINUTE = 100_000
    staff = User.objects.create_superuser("staff", password="x")
    Subscription.objects.create(owner=staff, url="https://hooks.example.org/")
    before = deadlocks()

    report = Crowd(staff).run(request.config.getoption("--operations"))

    logger.info("%s %s deadlocks: %d", report.done, report.answers, deadlocks() - before)
    assert not report.errors, "\n".join([*map(str, report.kinds.items()), *report.errors[:10]])
    assert not report.unexpected
    assert deadlocks() == before
    # Nothing half done is left.
    assert not Run.objects.filter(status="completed", answer=None).exists()
    asked = Message.objects.filter(role="user")
    assert asked.count() == Run.objects.count()
    assert not Thread.objects.filter(turns=0).exists()


@pytest.fixture
def crossing() -> Any:
    """Two transactions that wait for each other, unless one is ended: each changes both threads, the
    one in this order and the other in that. How often each was carried out."""
    first, second = (Thread.objects.create() for _ in range(2))
    met = threading.Barrier(2)
    tries = {first.pk: 0, second.pk: 0}

    def change(one: str, other: str) -> None:
        with transaction.atomic():
            tries[one] += 1
            Thread.objects.filter(pk=one).update(title="changed")
            if tries[one] == 1:
                met.wait(30)
            Thread.objects.filter(pk=other).update(title="changed")

    def carry_out(work: Any) -> list[BaseException]:
        failures: list[BaseException] = []

        def one_way(one: str, other: str) -> None:
            try:
                work(change)(one, other)
            except OperationalError as error:
                failures.append(error)
            finally:
                connection.close()

        pairs = [(first.pk, second.pk), (second.pk, first.pk)]
        threads = [threading.Thread(target=one_way, args=pair) for pair in pairs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return failures

    carry_out.tries = tries  # type: ignore[attr-defined]
    return carry_out


def test_what_is_ended_for_a_deadlock_is_carried_out_again(crossing: Any) -> None:
    assert crossing(db.retry_on_conflict) == []

    assert sorted(crossing.tries.values()) == [1, 2]


def test_only_whole_transactions_are_carried_out_again(crossing: Any) -> None:
    def inside_another(change: Any) -> Any:
        def work(one: str, other: str) -> None:
            with transaction.atomic():
                db.retry_on_conflict(change)(one, other)

        return work

    (failure,) = crossing(inside_another)

    assert db.is_conflict(failure)
    assert list(crossing.tries.values()) == [1, 1]
