"""What a homeserver answers a sync with, whoever wrote it: the bot takes in what it can, moves on, and
is not stopped by any of it."""

import asyncio
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import pytest
from asgiref.sync import async_to_sync
from django.db import transaction
from hypothesis import strategies as st

from botrunner.incoming import handling, recording, submission
from botrunner.incoming.addressing import is_mentioned
from botrunner.incoming.backfill import batch_of
from botrunner.incoming.batch import Batch
from botrunner.incoming.matching import control_of, mismatch, prompt_of
from botrunner.matrix.client import Homeserver
from botrunner.matrix.errors import MatrixError
from botrunner.matrix.events import UNSTORABLE, TimelineEvent, is_own_join, since_own_join, storable
from botrunner.models import RoomEvent, Session
from realm.filters import EventFilter, InvalidFilter
from tests.botrunner import scenes
from tests.botrunner.scenes import ALICE, BOB, HOLDER, ME, ROOM
from tests.fuzz.examples import anything, objects, odd, tried, words

IDS = st.one_of(st.sampled_from(["$a", "$b", "$a\0", "$" + "x" * 300, ""]), words)
BODIES = st.one_of(
    st.sampled_from(["Hello", "!cancel", "> q\n\nHi", f"{ME}: x", "bot-runner"]), words
)
RELATION = objects(
    {"rel_type": st.sampled_from(["m.replace", "m.thread", "m.annotation"]), "event_id": IDS},
    **{"m.in_reply_to": objects({"event_id": IDS})},
)
CONTENT = objects(
    {"body": BODIES, "msgtype": st.sampled_from(["m.text", "m.notice", "m.image"])},
    type=words,
    realm=words,
    userId=words,
    redacts=IDS,
    input=anything,
    membership=st.sampled_from(["join", "invite", "leave"]),
    algorithm=st.sampled_from(["m.megolm.v1.aes-sha2", "m.olm.v1.curve25519-aes-sha2"]),
    ciphertext=words,
    session_id=words,
    sender_key=words,
    **{
        "m.relates_to": RELATION,
        "m.mentions": objects({"user_ids": st.lists(words, max_size=2)}),
        "m.new_content": anything,
    },
)
NOW = int(time.time() * 1000)
KINDS = [
    "m.room.message",
    "m.room.redaction",
    "m.room.encrypted",
    "m.room.member",
    "m.room.encryption",
    "app.boxel.bot-trigger",
]
EVENT = objects(
    {
        "type": st.sampled_from(KINDS),
        "event_id": IDS,
        "sender": st.sampled_from([ALICE, BOB, ME]),
        "origin_server_ts": st.sampled_from([NOW, NOW + 10**9, 0, -1, 2**60]),
        "content": CONTENT,
    },
    state_key=st.sampled_from([ME, ALICE, ""]),
    redacts=IDS,
    unsigned=objects({"prev_content": objects({"membership": words})}),
)
EVENTS = odd(st.lists(odd(EVENT), max_size=3))
JOINED = objects(
    {"timeline": objects({"events": EVENTS}, limited=st.booleans(), prev_batch=words)},
    state=objects({"events": EVENTS}),
    summary=anything,
    ephemeral=anything,
)
INVITED = objects({"invite_state": objects({"events": EVENTS})})
TO_DEVICE = objects(
    {
        "type": st.sampled_from(["m.room.encrypted", "m.room_key", "m.dummy"]),
        "sender": st.sampled_from([ALICE, BOB]),
        "content": CONTENT,
    }
)
ROOMS = st.sampled_from([ROOM, "!new", "!a\0", "!" + "x" * 300])
SYNC = objects(
    {
        "rooms": objects(
            {"join": odd(st.dictionaries(ROOMS, odd(JOINED), max_size=2))},
            invite=odd(st.dictionaries(ROOMS, odd(INVITED), max_size=2)),
            leave=odd(st.dictionaries(ROOMS, anything, max_size=2)),
        )
    },
    to_device=objects({"events": st.lists(odd(TO_DEVICE), max_size=2)}),
    device_lists=objects({"changed": odd(st.lists(words, max_size=2))}, left=anything),
    device_one_time_keys_count=odd(st.dictionaries(words, st.integers(-1, 60), max_size=2)),
)


def as_read(data: Any) -> Any:
    """As it comes out of the reader of JSON that the bot has, or nothing."""
    try:
        return orjson.loads(orjson.dumps(data))
    except (TypeError, orjson.JSONDecodeError):  # numbers and texts that no JSON can have
        return None


class Scripted(Homeserver):
    """Answers a sync with `body`, and other requests with `other`."""

    body: Any = None
    other: Any = None

    async def request(self, method: str, path: str, *args: Any, **kwargs: Any) -> Any:
        told = self.body if "/sync?" in path else self.other
        if not isinstance(told, dict):
            raise MatrixError("UNREADABLE", "The answer is not JSON.", status=200)
        return told


@pytest.fixture
def homeserver(tmp_path: Path) -> Iterator[Scripted]:
    # nio is made within a loop.
    async def made() -> Scripted:
        return Scripted("http://homeserver.invalid", "bot-runner", tmp_path)

    found = asyncio.run(made())
    found.nio.restore_login(ME, "DEVICE", "token")
    found.know_room(ROOM, encrypted=True)
    yield found
    asyncio.run(found.close())


@pytest.fixture
def account(db: None) -> Session:
    scenes.command(ALICE)
    scenes.command(ME, "chat.reply", mention=True)
    return scenes.session()


@tried(100, body=SYNC, page=objects({"chunk": EVENTS}, end=words))
def test_a_sync_is_taken_in(account: Session, homeserver: Scripted, body: Any, page: Any) -> None:
    homeserver.body = as_read({**body, "next_batch": "s1"} if isinstance(body, dict) else body)
    homeserver.other = as_read(page)

    async def fetched() -> Batch | None:
        try:
            news = await homeserver.sync("s0", seconds=0, filter_={})
            return await batch_of(news, "s0", homeserver, {ROOM})
        except MatrixError as error:
            # Only what is no answer at all is asked for again.
            assert not isinstance(homeserver.body, dict), error
            return None

    batch = async_to_sync(fetched)()
    if batch is None:
        return
    savepoint = transaction.savepoint()
    try:
        recording.record_sync(account, HOLDER, batch, partial(submission.submit_recorded, me=ME))
        for pk in handling.pending():
            handling.handle(pk, ME)
        assert Session.objects.get().since == "s1"
        for row in RoomEvent.objects.all():
            row.full_clean(exclude=["room", "source", "verdicts"], validate_unique=False)
    finally:
        transaction.savepoint_rollback(savepoint)


@tried(120, source=odd(EVENT))
def test_an_event_is_read_or_is_none(source: Any) -> None:
    is_own_join(source, ME)
    list(since_own_join([source, source], ME))
    said = TimelineEvent.parse(source)
    if said is None:
        return
    for told in (said.edits, said.redacts, said.thread_root):
        assert told is None or (len(told) <= 255 and not UNSTORABLE.search(told))
    said.mentions(ME)
    is_mentioned(said, ME, ["Helper Bot"])
    control_of(said, ME)
    for wanted in FILTERS:
        if not mismatch(wanted, said, ME):
            assert isinstance(
                prompt_of(wanted, TimelineEvent.parse(storable(source)) or said, ME), str
            )
    orjson.dumps(as_read(storable(source)))


FILTERS = [
    EventFilter.parse(scenes.MESSAGE),
    EventFilter.parse(scenes.MESSAGE | {"prefix": "!", "mention": True}),
    EventFilter.parse(scenes.TRIGGER),
]
FILTER = objects(
    {
        "type": st.sampled_from(["matrix-event", "x"]),
        "event_type": st.sampled_from(["m.room.message", "app.boxel.bot-trigger", "x"]),
        "content_type": words,
    },
    prefix=words,
    mention=st.booleans(),
)


@tried(80, value=st.one_of(FILTER, anything), source=EVENT)
def test_a_filter_is_one_or_says_why_not(value: Any, source: Any) -> None:
    try:
        wanted = EventFilter.parse(value)
    except InvalidFilter as error:
        assert str(error)
        return
    assert wanted.in_words()
    if said := TimelineEvent.parse(source):
        mismatch(wanted, said, ME)
