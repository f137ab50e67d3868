"""Rows and events for the fast tests; nobody here talks to a homeserver."""

import itertools
import time
from datetime import timedelta
from functools import partial
from typing import Any

from botrunner.incoming import handling, recording, submission
from botrunner.incoming.batch import Batch, RoomUpdate
from botrunner.models import Room, RoomEvent, Session
from realm.models import BotCommand, BotRegistration, User

ME = "@bot-runner:localhost"
ALICE = "@alice:localhost"
BOB = "@bob:localhost"
HOLDER = "host:1:a"
ROOM = "!room"
MESSAGE = {"type": "matrix-event", "event_type": "m.room.message", "content_type": "m.text"}
TRIGGER = {"type": "matrix-event", "event_type": "app.boxel.bot-trigger", "content_type": "ping"}

_ids = itertools.count()


def session() -> Session:
    """One whose lease is held and that has synced before."""
    found = Session.objects.create(
        homeserver="http://hs", username="bot-runner", user_id=ME, device_id="DEVICE", since="s0"
    )
    assert found.acquire(HOLDER, timedelta(minutes=1))
    Room.objects.create(session=found, room_id=ROOM, membership=Room.Membership.JOINED)
    return found


def command(user_id: str = ALICE, fires: str = "chat.reply", **filter_: Any) -> BotCommand:
    user = User.objects.of_matrix_id(user_id)
    registration, _ = BotRegistration.objects.get_or_create(user=user, username=user_id)
    return BotCommand.objects.create(
        registration=registration, command=fires, filter={**MESSAGE, **filter_}
    )


def event(
    content: dict[str, Any] | str = "Hello",
    sender: str = ALICE,
    *,
    type: str = "m.room.message",
    age: float = 0,
    **extra: Any,
) -> dict[str, Any]:
    if isinstance(content, str):
        content = {"msgtype": "m.text", "body": content}
    return {
        "type": type,
        "sender": sender,
        "event_id": f"$event{next(_ids)}",
        "origin_server_ts": int((time.time() + 0.1 - age) * 1000),
        "content": content,
        **extra,
    }


def membership(user_id: str, membership: str, **extra: Any) -> dict[str, Any]:
    """An event by which somebody comes, leaves or has another name."""
    content = {"membership": membership}
    return event(content, user_id, type="m.room.member", state_key=user_id, **extra)


def let_in(session: Session, *user_ids: str) -> None:
    """Have them join the room, as the bot sees it; who is in it is known from here on."""
    session.rooms.update(members_known=True)
    take_in(session, *(membership(user_id, "join") for user_id in user_ids))


def take_in(session: Session, *events: dict[str, Any]) -> int:
    """Write events of the room down as a sync brings them, and act upon them. How many were for the
    bot."""
    batch = Batch(f"{session.since}+", [RoomUpdate(ROOM, list(events), False)])
    kept = RoomEvent.objects.exclude(state=RoomEvent.State.IGNORED)
    before = kept.count()
    recording.record_sync(session, HOLDER, batch, partial(submission.submit_recorded, me=ME))
    new = kept.count() - before
    session.since = batch.next_batch
    for pk in handling.pending():
        handling.handle(pk, ME)
    return new
