"""The bot's own loop. Without a homeserver."""

import asyncio
import itertools
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from asgiref.sync import async_to_sync
from django.db import OperationalError, connections

from agents import inbox
from agents.models import Run
from botrunner import bot as loop
from botrunner.bot import Bot
from botrunner.incoming import recording, submission
from botrunner.incoming.batch import Batch, RoomUpdate
from botrunner.matrix import client
from botrunner.models import RoomEvent, Session
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


@pytest.mark.django_db(transaction=True)
def test_a_first_sync_that_is_too_long_is_said_once_and_asked_for_again(
    settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    settings.BOT_RUNNER_STORE = tmp_path
    monkeypatch.setattr(client, "MAX_ANSWER_BYTES", 1024 * 1024)
    monkeypatch.setattr(loop, "MAX_PAUSE_SECONDS", 0.01)
    row = session()
    row.since = ""
    row.save(update_fields=["since"])
    asked = itertools.count(1)

    async def scene() -> None:
        stopping = asyncio.Event()

        async def sync(request: web.Request) -> web.Response:
            assert "since" not in request.query
            is_long = next(asked) <= 3
            return web.json_response({"next_batch": "s1", "x": "x" * (is_long * 2 * 1024 * 1024)})

        async def keys(request: web.Request) -> web.Response:
            return web.json_response({"one_time_key_counts": {"signed_curve25519": 50}})

        async def match() -> None:
            while not row.since:
                await asyncio.sleep(0.01)
            stopping.set()

        app = web.Application()
        app.router.add_get("/_matrix/client/v3/sync", sync)
        app.router.add_post("/_matrix/client/v3/keys/upload", keys)
        async with TestServer(app) as server:
            settings.MATRIX_URL = str(server.make_url("/")).rstrip("/")
            bot = Bot(row, HOLDER, stopping)
            bot.homeserver.nio.restore_login(ME, "DEVICE", "token")
            async with asyncio.timeout(30):
                await asyncio.gather(bot._repeat("Sync", bot.sync, 0), match())
            await bot.homeserver.close()

    with caplog.at_level("INFO"):
        async_to_sync(scene)()
    said = [record.getMessage() for record in caplog.records if record.name == "botrunner.bot"]
    assert [line for line in said if "longer than 1 MiB" in line] == [
        "Sync failed, retrying: TOO_LONG: The homeserver's answer to /_matrix/client/v3/sync is longer "
        "than 1 MiB."
    ]
    assert "Sync recovered" in said
    row.refresh_from_db()
    assert (row.since, next(asked)) == ("s1", 5)
    assert "longer than 1 MiB" in row.last_error


@pytest.mark.parametrize("asked_at_once", [True, False])
@pytest.mark.django_db(transaction=True)
def test_an_event_that_cannot_be_handled_holds_up_none_of_the_others(
    settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked_at_once: bool
) -> None:
    settings.BOT_RUNNER_STORE = tmp_path
    command()
    row = session()
    submit = inbox.submit

    def fails_for_one(submission: inbox.Submission) -> Any:
        if submission.content == "two":
            raise ZeroDivisionError("nobody foresaw this")
        return submit(submission)

    monkeypatch.setattr(inbox, "submit", fails_for_one)
    news = RoomUpdate(ROOM, [event("one"), event("two"), event("three")], False)
    ask = partial(submission.submit_recorded, me=ME) if asked_at_once else None
    assert recording.record_sync(row, HOLDER, Batch("s1", [news]), ask) == 3
    assert not Run.objects.exists()

    async def scene() -> None:
        bot = Bot(row, HOLDER, asyncio.Event())
        bot.homeserver.nio.user_id = row.user_id
        await bot._handle_pending()
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

    def unavailable(submission: inbox.Submission) -> Any:
        raise OperationalError

    monkeypatch.setattr(inbox, "submit", unavailable)
    batch = Batch("s1", [RoomUpdate(ROOM, [event()], False)])
    with pytest.raises(OperationalError):
        recording.record_sync(row, HOLDER, batch, partial(submission.submit_recorded, me=ME))
    assert (Session.objects.get().since, RoomEvent.objects.exists()) == ("s0", False)
