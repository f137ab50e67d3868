"""What a question in a room costs the bot: someone waits for each of these statements."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext

from agents.models import Run
from agents.runs import execution
from botrunner.incoming import recording, submission
from botrunner.incoming.batch import Batch, RoomUpdate
from botrunner.models import Reply, RoomEvent
from botrunner.outgoing import queue
from tests.botrunner.scenes import HOLDER, ME, ROOM, command, event, session, take_in

pytestmark = pytest.mark.django_db


@contextmanager
def at_most(most: int) -> Iterator[None]:
    """Statements, without those that begin and end transactions."""
    with CaptureQueriesContext(connection) as queries:
        yield
    told = [query["sql"] for query in queries]
    told = [sql for sql in told if sql.startswith(("SELECT", "INSERT", "UPDATE", "DELETE"))]
    assert len(told) <= most, "\n".join(told)


def test_a_question_and_its_reply_cost_seventeen_statements() -> None:
    command()
    row = session()
    take_in(row, event("The first begins a conversation."))
    execution.execute(Run.objects.get().pk)
    Reply.objects.update(status=Reply.Status.SENT)
    batch = Batch("s2", [RoomUpdate(ROOM, [event("The second goes on with it.")], False)])

    with at_most(12):
        recording.record_sync(row, HOLDER, batch, partial(submission.submit_recorded, me=ME))
    run = Run.objects.unfinished().get()
    execution.execute(run.pk)
    with at_most(3):
        ready = queue.compose(row, [run.pk])
        [reply] = ready.values()
        outgoing = queue.next_of(reply.room_id, row.device_id, ready)
    assert outgoing is not None
    # All that sending it looks at has been read.
    with at_most(0):
        assert outgoing.reply.parts[0]["body"].endswith("goes on with it.")
        assert outgoing.reply.message.event_id
        assert outgoing.reply.message.created_at
        assert outgoing.reply.registration_id
    with at_most(2):
        queue.record_part(outgoing.reply, "$sent")
        assert queue.next_of(outgoing.reply.room_id, row.device_id) is None
    assert Reply.objects.get(run=run).status == Reply.Status.SENT


def test_more_questions_at_once_cost_no_more_of_the_way_in() -> None:
    command()
    row = session()
    take_in(row, event("The first begins a conversation."))
    several = [event(f"Question {number}") for number in range(4)]
    batch = Batch("s2", [RoomUpdate(ROOM, several, False)])
    with at_most(5 + 4 * 7):
        recording.record_sync(row, HOLDER, batch, partial(submission.submit_recorded, me=ME))
    assert Run.objects.count() == 5
    assert not RoomEvent.objects.filter(state=RoomEvent.State.PENDING).exists()
