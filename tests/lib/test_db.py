import time
from collections.abc import Callable
from typing import Any

import pytest
from django.db import DatabaseError, IntegrityError, connection, transaction

from agents.models import Pace
from chat.models import Message, Thread
from lib import db
from lib.db import TRANSIENT_ERRORS
from realm.models import User
from tests import factories
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


def refused(write: Callable[[], Any]) -> IntegrityError:
    with pytest.raises(IntegrityError) as found, transaction.atomic():
        write()
    return found.value


@pytest.mark.django_db
class TestWhatAConstraintRefused:
    def test_a_duplicate_is_of_certain_fields(self) -> None:
        known = user("@known:localhost")
        error = refused(lambda: User.objects.create(username=known.username))

        assert db.is_duplicate(error, User, "username")
        assert not db.is_duplicate(error, User, "matrix_user_id")
        assert not db.is_duplicate(error, User, "username", "matrix_user_id")
        assert not db.is_duplicate(error, Thread, "id")
        assert db.may_be_a_race(error)
        assert not db.is_missing_row(error)

    def test_of_a_primary_key_and_of_several_fields(self) -> None:
        message = factories.ask().message
        copy = Message(pk=message.pk, thread=message.thread, position=99, content="x")
        error = refused(lambda: copy.save(force_insert=True))
        assert db.is_duplicate(error, Message, "id")

        copy = Message(thread=message.thread, position=message.position, content="x")
        error = refused(lambda: copy.save(force_insert=True))
        assert db.is_duplicate(error, Message, "position", "thread")

    @pytest.mark.django_db(transaction=True)  # found by the commit
    def test_a_missing_row(self) -> None:
        error = refused(lambda: Thread.objects.create(owner_id=987654))

        assert db.is_missing_row(error)
        assert db.may_be_a_race(error)
        assert not db.is_duplicate(error, Thread, "id")

    @pytest.mark.parametrize("number", [None, -1])
    def test_a_wrong_value_is_no_race(self, number: int | None) -> None:
        error = refused(lambda: Pace.objects.create(scope="x", unfinished=number))

        assert not db.may_be_a_race(error)
        assert not db.is_missing_row(error)
        assert not db.is_duplicate(error, Pace, "scope")

    def test_what_ignores_conflicts_ignores_duplicates_only(self) -> None:
        known = factories.conversation(1)
        Thread.objects.bulk_create([Thread(id=known.pk)], ignore_conflicts=True)

        error = refused(
            lambda: Thread.objects.bulk_create([Thread(turns=None)], ignore_conflicts=True)
        )
        assert not db.may_be_a_race(error)
