"""Who leads, and what is said meanwhile."""

import asyncio
from datetime import timedelta
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.utils import timezone

from botrunner.aio import database_sync_to_async
from botrunner.bot import Bot
from botrunner.leader import Leader
from botrunner.models import Session
from tests.botrunner.scenes import session


@pytest.mark.django_db(transaction=True)
def test_it_says_once_when_the_lease_of_a_dead_one_ends_and_takes_over_then(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    row = session()
    until = timezone.now() + timedelta(hours=1)
    Session.objects.filter(pk=row.pk).update(holder="dead", lease_expires_at=until)
    stopping = asyncio.Event()
    pauses: list[float] = []

    async def pause(seconds: float, stopping: asyncio.Event) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:  # the hour is over
            past = timezone.now() - timedelta(seconds=1)
            await database_sync_to_async(Session.objects.update)(lease_expires_at=past)

    async def lead(leader: Leader, found: Session) -> None:
        stopping.set()

    async def scene() -> None:
        async with asyncio.timeout(60):
            await Leader(stopping).run()

    monkeypatch.setattr(Leader, "_lead", lead)
    monkeypatch.setattr("botrunner.leader.pause", pause)
    monkeypatch.setattr("botrunner.matrix.login.session", lambda: Session.objects.get(pk=row.pk))
    async_to_sync(scene)()

    said = [record.getMessage() for record in caplog.records if "lease" in record.getMessage()]
    assert said == [
        f"Another bot runner leads {row}: standing by until the lease expires, "
        f"at {until:%H:%M:%S} UTC unless it is renewed"
    ]
    assert Session.objects.get(pk=row.pk).holder != "dead"
    assert len(pauses) == 3, "not before"


@pytest.mark.django_db(transaction=True)
def test_each_loop_has_a_singular_name(
    settings: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log says: <name> failed, retrying."""
    settings.BOT_RUNNER_STORE = tmp_path
    settings.BOT_STREAM_EDITS = True
    names = []

    async def repeat(bot: Bot, name: str, *_: Any) -> None:
        names.append(name)

    async def scene() -> None:
        bot = Bot(row, "holder", asyncio.Event())
        await bot._work()
        await bot.homeserver.close()
        if bot.drafts:
            await bot.drafts.close()

    row = session()
    monkeypatch.setattr(Bot, "_repeat", repeat)
    async_to_sync(scene)()

    assert len(names) == 8
    assert [name for name in names if name.split()[0].endswith("s")] == []
