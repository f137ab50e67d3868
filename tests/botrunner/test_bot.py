"""The bot's own loop. Without a homeserver."""

import asyncio
import itertools
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.db import connections

from agents import inbox
from agents.models import Run
from botrunner import timeline
from botrunner.bot import Bot
from botrunner.models import RoomEvent
from botrunner.timeline import Batch, RoomNews
from tests.botrunner.scenes import HOLDER, ROOM, command, event, session


@pytest.mark.django_db
@pytest.mark.parametrize("streams", [False, True])
def test_who_does_not_stream_has_no_reader_of_what_runs_tell(
    settings: Any, tmp_path: Path, streams: bool
) -> None:
    settings.BOT_RUNNER_STORE, settings.BOT_STREAM_EDITS = tmp_path, streams
    row = session()

    async def scene() -> Bot:
        bot = Bot(row, HOLDER, asyncio.Event())
        await bot.homeserver.close()
        return bot

    assert bool(asyncio.run(scene()).drafts) == streams


@pytest.mark.django_db(transaction=True)
def test_an_event_that_cannot_be_handled_holds_up_none_of_the_others(
    settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.BOT_RUNNER_STORE = tmp_path
    command()
    row = session()
    events = [event("one"), event("two"), event("three")]
    assert timeline.write_down(row, HOLDER, Batch("s1", [RoomNews(ROOM, events, False)])) == 3
    calls, ask = itertools.count(), inbox.ask

    def fails_once(**asked: Any) -> Any:
        if next(calls) == 1:
            raise ZeroDivisionError("nobody foresaw this")
        return ask(**asked)

    monkeypatch.setattr(inbox, "ask", fails_once)

    async def scene() -> None:
        bot = Bot(row, HOLDER, asyncio.Event())
        bot.homeserver.nio.user_id = row.user_id
        await bot._act()
        await bot.homeserver.close()

    async_to_sync(scene)()
    states = list(RoomEvent.objects.values_list("state", flat=True))
    assert states == ["handled", "failed", "handled"]
    assert Run.objects.count() == 2
    connections.close_all()
