"""Who invited the bot, as a sync tells it. Without a homeserver."""

from typing import Any

import pytest

from botrunner import shapes
from botrunner.membership import invites
from botrunner.timeline import Invite
from tests.botrunner.scenes import ALICE, BOB, ME


def member(state_key: Any, membership: Any, sender: Any = ALICE) -> dict[str, Any]:
    """Stripped, as homeservers show it to who is invited: without an id and a time."""
    content = {"membership": membership}
    return {
        "type": "m.room.member",
        "state_key": state_key,
        "sender": sender,
        "content": content,
    }


def found(rooms: dict[str, Any]) -> list[Invite]:
    return invites(shapes.sync({"rooms": {"invite": rooms}})["rooms"]["invite"], ME)


def invited(*events: Any) -> dict[str, Any]:
    return {"!room": {"invite_state": {"events": list(events)}}}


def test_an_invitation_without_id_and_time_counts_once_among_what_is_shown_beside_it() -> None:
    create = {"type": "m.room.create", "state_key": "", "sender": ALICE, "content": {}}
    rooms = invited(create, member(ALICE, "join"), member(BOB, "invite"), member(ME, "invite"))
    assert found(rooms) == [Invite("!room", ALICE)]


@pytest.mark.parametrize(
    "rooms",
    [
        {"!room": None},
        {"!room": {"invite_state": "x"}},
        {"!room": {"invite_state": {"events": None}}},
        invited(None, "x", 7, [], {}),
        invited({"type": "m.room.member", "state_key": ME, "content": "invite"}),
        invited(member(ME, ["invite"])),
        invited(member(ME, "knock")),
        invited(member({}, "invite")),
        # No column could hold these, and the sync that brings them would come for ever.
        invited(member(ME, "invite", sender=None)),
        invited(member(ME, "invite", sender="@a\0b:localhost")),
        invited(member(ME, "invite", sender=f"@{'a' * 300}:localhost")),
        {"!" + "r" * 300: invited(member(ME, "invite"))["!room"]},
        {"!a\0b": invited(member(ME, "invite"))["!room"]},
    ],
)
def test_what_is_no_invitation_is_none(rooms: dict[str, Any]) -> None:
    assert found(rooms) == []
