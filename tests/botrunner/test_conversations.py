"""A room goes on in its thread, whatever becomes of that while somebody asks."""

import threading
import time
from typing import Any

import pytest
from django.db import connection, connections, transaction

from agents import inbox, retention
from agents.models import Run
from botrunner.models import Conversation
from tests.botrunner.scenes import command, event, session, take_in

pytestmark = pytest.mark.django_db(transaction=True)


def threads_of(*words: str) -> list[str]:
    runs = {run.message.content: run.thread_id for run in Run.objects.select_related("message")}
    return [runs[each] for each in words]


def test_a_thread_that_is_deleted_just_before_a_question_is_linked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command()
    row = session()
    take_in(row, event("one"))
    thread = Conversation.objects.get().thread
    submit = inbox.submit

    def deleted_first(submission: inbox.Submission) -> Any:
        retention.delete_thread(thread)
        return submit(submission)

    monkeypatch.setattr(inbox, "submit", deleted_first)
    take_in(row, event("two"))
    monkeypatch.setattr(inbox, "submit", submit)
    take_in(row, event("three"))
    two, three = threads_of("two", "three")
    assert Conversation.objects.get().thread_id == two == three


@pytest.mark.skipif(connection.vendor != "postgresql", reason="On SQLite one writes at a time.")
def test_a_question_that_waits_for_the_deletion_of_its_thread_keeps_the_room_in_one() -> None:
    command()
    row = session()
    take_in(row, event("one"))
    thread = Conversation.objects.get().thread
    deleted, trouble = threading.Event(), []

    def delete() -> None:
        try:
            with transaction.atomic():
                retention.delete_thread(thread)
                deleted.set()
                wait_for_somebody_who_waits()
        except BaseException as error:
            trouble.append(error)
            raise
        finally:
            connections.close_all()

    deleting = threading.Thread(target=delete, daemon=True)
    deleting.start()
    assert deleted.wait(20)
    take_in(row, event("two"))
    deleting.join(20)
    assert not trouble
    take_in(row, event("three"))
    two, three = threads_of("two", "three")
    assert Conversation.objects.get().thread_id == two == three


def wait_for_somebody_who_waits() -> None:
    until = time.monotonic() + 20
    while time.monotonic() < until:
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT count(*) FROM pg_stat_activity"
                " WHERE datname = current_database() AND wait_event_type = 'Lock'"
            )
            if cursor.fetchone()[0]:
                return
        time.sleep(0.02)
    raise AssertionError("Nobody waited.")
