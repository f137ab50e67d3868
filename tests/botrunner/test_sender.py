"""Who sends what is ready, and when. The homeserver is a list of what it was sent."""

import asyncio
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.db import connections

from agents import runs
from agents.models import Run
from botrunner import acting, timeline
from botrunner.models import Reply, Session
from botrunner.replies import ROOMS_AT_ONCE, Sender
from botrunner.timeline import Batch, RoomNews
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


def ask_in(row: Session, *room_ids: str) -> list[str]:
    """A question in each of these rooms; the runs, which have ended."""
    news = [RoomNews(room_id, [event()], False) for room_id in room_ids]
    timeline.write_down(row, HOLDER, Batch("s1", news))
    for pk in acting.pending():
        acting.act(pk, ME)
    run_ids = list(Run.objects.unfinished().values_list("pk", flat=True))
    for run_id in run_ids:
        runs.execute(run_id)
    return run_ids


def test_many_rooms_are_answered_at_once_and_none_has_to_be_asked_for_again() -> None:
    command()
    row = session()
    rooms = [f"!room{number:02}" for number in range(ROOMS_AT_ONCE * 3)]
    run_ids = ask_in(row, *rooms)
    homeserver: Any = Homeserver()
    sender = Sender(homeserver, row)

    async def work() -> None:
        await sender.compose(run_ids)
        await sender.close()

    async_to_sync(work)()

    assert sorted(homeserver.sent) == rooms
    assert not Reply.objects.unfinished().exists()
    connections.close_all()
