"""Who sends what is ready, and when. The homeserver is a list of what it was sent."""

import asyncio
import threading
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.db import connections

from agents.models import Run
from agents.runs import execution
from botrunner.aio import database_sync_to_async
from botrunner.incoming import handling, recording
from botrunner.incoming.batch import Batch, RoomUpdate
from botrunner.models import Reply, Session
from botrunner.outgoing import queue
from botrunner.outgoing.sender import ROOMS_AT_ONCE, ReplySender
from tests.botrunner.scenes import HOLDER, ME, command, event, session

pytestmark = pytest.mark.django_db(transaction=True)


class Homeserver:
    user_id = ME
    device_id = "DEVICE"

    def __init__(self) -> None:
        self.sent: list[str] = []

    async def send(self, room_id: str, content: dict[str, Any], transaction: str) -> str:
        await asyncio.sleep(0)
        self.sent.append(room_id)
        return f"$sent{len(self.sent)}"


class Poisoned(Homeserver):
    """Breaks at what is said in one room."""

    async def send(self, room_id: str, content: dict[str, Any], transaction: str) -> str:
        if room_id == "!poisoned":
            raise KeyError("body")
        return await super().send(room_id, content, transaction)


def ask_in(row: Session, *room_ids: str) -> list[str]:
    """A question in each of these rooms; the runs, which have ended."""
    news = [RoomUpdate(room_id, [event()], False) for room_id in room_ids]
    recording.record_sync(row, HOLDER, Batch("s1", news))
    for pk in handling.pending():
        handling.handle(pk, ME)
    run_ids = list(Run.objects.unfinished().values_list("pk", flat=True))
    for run_id in run_ids:
        execution.execute(run_id)
    return run_ids


def test_many_rooms_are_answered_at_once_and_none_has_to_be_asked_for_again() -> None:
    command()
    row = session()
    rooms = [f"!room{number:02}" for number in range(ROOMS_AT_ONCE * 3)]
    run_ids = ask_in(row, *rooms)
    homeserver: Any = Homeserver()
    sender = ReplySender(homeserver, row)

    async def work() -> None:
        await sender.compose(run_ids)
        await sender.close()

    async_to_sync(work)()

    assert sorted(homeserver.sent) == rooms
    assert not Reply.objects.unfinished().exists()
    connections.close_all()


def test_a_reply_that_cannot_be_sent_keeps_no_other_waiting() -> None:
    command()
    row = session()
    ask_in(row, "!poisoned", "!sound")
    homeserver: Any = Poisoned()
    sender = ReplySender(homeserver, row)

    async def work() -> None:
        await sender.compose()
        await sender.close()
        await sender.compose()  # and nothing broke
        await sender.close()

    async_to_sync(work)()

    assert homeserver.sent == ["!sound"]
    poisoned = Reply.objects.get(room__room_id="!poisoned")
    assert (poisoned.status, poisoned.error) == ("ready", "BROKEN: KeyError")
    assert poisoned.due_at is not None
    Reply.objects.filter(pk=poisoned.pk).update(attempts=5, due_at=None)
    async_to_sync(work)()
    poisoned.refresh_from_db()
    assert poisoned.status == Reply.Status.DROPPED
    connections.close_all()


def test_what_takes_time_to_render_keeps_the_database_free(monkeypatch: pytest.MonkeyPatch) -> None:
    command()
    row = session()
    run_ids = ask_in(row, *(f"!room{number}" for number in range(3)))
    homeserver: Any = Homeserver()
    sender = ReplySender(homeserver, row)
    begun, free = threading.Event(), threading.Event()
    render = queue.render

    def slowly(found: list[queue.ReplyText]) -> list[Reply]:
        begun.set()
        assert free.wait(20)
        return render(found)

    monkeypatch.setattr(queue, "render", slowly)

    async def work() -> None:
        composing = asyncio.create_task(sender.compose(run_ids))
        assert await asyncio.to_thread(begun.wait, 20)
        # On the one thread of the database, while it is rendered.
        assert (
            await asyncio.wait_for(database_sync_to_async(Reply.objects.unfinished().count)(), 20)
            == 3
        )
        free.set()
        await composing
        await sender.close()

    async_to_sync(work)()

    assert len(homeserver.sent) == 3
    connections.close_all()


def test_a_backlog_is_worked_off_in_one_go_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "BATCH", 2)
    command()
    row = session()
    ask_in(row, *(f"!room{number}" for number in range(7)))
    homeserver: Any = Homeserver()
    sender = ReplySender(homeserver, row)

    async def work() -> None:
        await sender.compose()
        await sender.close()

    async_to_sync(work)()

    assert len(homeserver.sent) == 7
    connections.close_all()
