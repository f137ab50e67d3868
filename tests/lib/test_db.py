import time

import pytest
from django.db import DatabaseError, connection, transaction

from lib.db import TRANSIENT_ERRORS
from tests.factories import user


@pytest.mark.skipif(connection.vendor != "postgresql", reason="SQLite has no server to end it")
@pytest.mark.django_db(transaction=True)
def test_a_transaction_with_which_nobody_goes_on_is_ended_and_counts_as_a_lost_connection() -> None:
    with connection.cursor() as cursor:
        cursor.execute("SHOW idle_in_transaction_session_timeout")
        assert cursor.fetchone() == ("10s",)

    with pytest.raises(TRANSIENT_ERRORS) as raised:
        _go_away_in_a_transaction()
    assert isinstance(raised.value, DatabaseError)

    connection.close()
    assert user("@after:localhost").pk


def _go_away_in_a_transaction() -> None:
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("SET LOCAL idle_in_transaction_session_timeout = '50ms'")
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            time.sleep(0.2)
            cursor.execute("SELECT 1")
