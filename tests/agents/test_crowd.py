"""Who deletes, cancels, asks, retries and works at once gets in nobody's way."""

from typing import Any

import pytest
from django.db import connection

from agents.models import Run
from realm.models import User
from tests.agents.conftest import Broker
from tests.agents.crowd import Crowd

pytestmark = pytest.mark.skipif(
    connection.vendor != "postgresql", reason="On SQLite one writes at a time."
)


def deadlocks() -> int:
    with connection.cursor() as cursor:
        cursor.execute("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")
        return int(cursor.fetchone()[0])


@pytest.mark.django_db(transaction=True)
def test_all_at_once_to_a_few_threads(
    broker: Broker, settings: Any, request: pytest.FixtureRequest
) -> None:
    settings.RETENTION_THREADS_DAYS = settings.RETENTION_EVENTS_DAYS = 30
    settings.LIMIT_USER_RUNS_WAITING = 100
    settings.LIMIT_USER_MESSAGES_PER_MINUTE = 100_000
    staff = User.objects.create_superuser("staff", password="x")
    before = deadlocks()

    operations = request.config.getoption("--operations")
    report = Crowd(staff).run(operations)

    print(sum(report.done.values()), dict(report.done), dict(report.answers))
    print(
        "deadlocks",
        deadlocks() - before,
        "errors",
        len(report.errors),
        "unexpected",
        report.unexpected,
    )
    for kind, count in report.kinds.most_common():
        print("KIND", count, kind[:200])
    assert not report.errors, "\n".join(report.errors[:40])
    assert not report.unexpected
    assert deadlocks() == before
