"""What of an answer of /sync is worth writing down."""

from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import async_to_sync

from botrunner.incoming.backfill import batch_of
from botrunner.incoming.batch import Batch
from botrunner.matrix import responses
from botrunner.matrix.client import Homeserver, SyncUpdate
from tests.botrunner.scenes import ALICE, ME, ROOM, event


@pytest.fixture
def batch(tmp_path: Path) -> Any:
    """What a sync from s1 to s2 brings, of the room that the bot is in."""

    @async_to_sync
    async def made(*events: dict[str, Any], known: bool = True, **room: Any) -> Batch:
        homeserver = Homeserver("http://homeserver.invalid", "bot-runner", tmp_path)
        homeserver.nio.user_id = ME
        joined = {ROOM: {"timeline": {"events": list(events)}, **room}}
        news = SyncUpdate(responses.sync({"next_batch": "s2", "rooms": {"join": joined}}), {})
        try:
            return await batch_of(news, "s1", homeserver, {ROOM} if known else set())
        finally:
            await homeserver.close()

    return made


def test_what_the_bot_itself_said_is_no_news(batch: Any) -> None:
    assert batch(event("Hello", sender=ME)).is_empty
    assert not batch(event("Hello", sender=ME), event("Hi", sender=ALICE)).is_empty


def test_a_room_that_is_new_or_becomes_encrypted_is_news(batch: Any) -> None:
    assert not batch(event("Hello", sender=ME), known=False).is_empty
    state = {"events": [{"type": "m.room.encryption", "state_key": "", "content": {}}]}
    assert not batch(event("Hello", sender=ME), state=state).is_empty
