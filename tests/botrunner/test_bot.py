"""The bot's own loop. Without a homeserver."""

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.db import OperationalError, connections

from agents import inbox
from agents.models import Run
from botrunner import acting, timeline
from botrunner.bot import Bot
from botrunner.models import RoomEvent, Session
from botrunner.timeline import Batch, RoomNews
from tests.botrunner.scenes import HOLDER, ME, ROOM, command, event, session


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


@pytest.mark.parametrize("asked_at_once", [True, False])
@pytest.mark.django_db(transaction=True)
def test_an_event_that_cannot_be_handled_holds_up_none_of_the_others(
    settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked_at_once: bool
) -> None:
    settings.BOT_RUNNER_STORE = tmp_path
    command()
    row = session()
    asked = inbox.ask

    def fails_for_one(*, content: str, **rest: Any) -> Any:
        if content == "two":
            raise ZeroDivisionError("nobody foresaw this")
        return asked(content=content, **rest)

    monkeypatch.setattr(inbox, "ask", fails_for_one)
    news = RoomNews(ROOM, [event("one"), event("two"), event("three")], False)
    ask = partial(acting.ask, me=ME) if asked_at_once else None
    assert timeline.write_down(row, HOLDER, Batch("s1", [news]), ask) == 3
    assert not Run.objects.exists()

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


@pytest.mark.django_db
def test_while_the_database_is_away_a_batch_is_not_half_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command()
    row = session()

    def away(**asked: Any) -> Any:
        raise OperationalError

    monkeypatch.setattr(inbox, "ask", away)
    batch = Batch("s1", [RoomNews(ROOM, [event()], False)])
    with pytest.raises(OperationalError):
        timeline.write_down(row, HOLDER, batch, partial(acting.ask, me=ME))
    assert (Session.objects.get().since, RoomEvent.objects.exists()) == ("s0", False)
