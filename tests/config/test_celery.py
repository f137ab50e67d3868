"""What is ours between Celery and Django."""

import pytest
from django.conf import settings
from django.db import connection

from config.celery import Fixup, PersistentConnectionsFixup, app


def test_the_worker_has_our_rule_for_connections() -> None:
    [fixup] = app._fixups
    assert isinstance(fixup, Fixup)


@pytest.mark.django_db(transaction=True)
def test_between_two_tasks_a_connection_is_kept_where_django_keeps_it() -> None:
    connection.ensure_connection()
    before = connection.connection

    PersistentConnectionsFixup(app).close_database()

    kept = settings.DATABASES["default"].get("CONN_MAX_AGE", 0) is None
    assert (connection.connection is before) is kept
    assert connection.connection is None or kept, "it went back to its pool"
