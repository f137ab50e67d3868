"""Which rooms the bot leaves, and which invitations it declines. Without a homeserver."""

from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.db.models.functions import Now
from django.utils import timezone

from agents.models import Run
from botrunner.incoming import recording
from botrunner.incoming.batch import Batch, Invitation
from botrunner.incoming.leaving import DECLINED, EMPTY, Leaver
from botrunner.matrix.errors import MatrixError, MatrixTimeout
from botrunner.models import Room, Session
from tests.botrunner.scenes import (
    ALICE,
    BOB,
    HOLDER,
    ME,
    ROOM,
    command,
    event,
    let_in,
    membership,
    session,
    take_in,
)

pytestmark = pytest.mark.django_db(transaction=True)


class Homeserver:
    user_id = ME

    def __init__(self, *, fails: MatrixError | None = None, rule: str = "invite") -> None:
        self.left: list[tuple[str, str]] = []
        self.others: dict[str, list[str]] = {"join": [], "invite": []}
        self.fails = fails
        self.rule = rule

    async def leave(self, room_id: str, reason: str, *, seconds: float) -> None:
        if self.fails:
            raise self.fails
        self.left.append((room_id, reason))

    async def members(self, room_id: str, at: str, *, seconds: float, membership: str) -> Any:
        return [{"state_key": each} for each in (ME, *self.others[membership])]

    async def state(self, room_id: str, kind: str, *, seconds: float) -> Any:
        return {"content": {"join_rule": self.rule}}


def leave(row: Session, homeserver: Homeserver) -> list[tuple[str, str]]:
    """Let the time of grace pass."""
    Room.objects.filter(leave_due_at__isnull=False).update(leave_due_at=Now())
    forgotten: list[str] = []  # by the bot

    @async_to_sync
    async def scene() -> None:
        leaver: Any = Leaver(homeserver, row, forgotten.append)  # type: ignore[arg-type]
        await leaver.leave_due()

    scene()
    return homeserver.left


def invite(row: Session, inviter: str) -> Room:
    batch = Batch(f"{row.since}+", invitations=[Invitation("!new", inviter)])
    recording.record_sync(row, HOLDER, batch)
    row.since = batch.next_batch
    return Room.objects.get(room_id="!new")


class TestEmptyRooms:
    @pytest.fixture
    def row(self) -> Session:
        command()
        found = session()
        let_in(found, ME, ALICE, BOB)
        return found

    def room(self) -> Room:
        return Room.objects.get(room_id=ROOM)

    def empty(self, row: Session) -> None:
        take_in(row, membership(ALICE, "leave"), membership(BOB, "ban"))

    def test_are_left_and_their_runs_cancelled(self, row: Session) -> None:
        take_in(row, event("Hello"))
        self.empty(row)
        assert leave(row, Homeserver()) == [(ROOM, EMPTY)]
        assert (self.room().membership, self.room().error) == ("left", EMPTY)
        assert Run.objects.get().status == "cancelled"

    def test_not_before_everyone_has_gone(self, row: Session) -> None:
        take_in(row, membership(ALICE, "leave"))
        assert leave(row, Homeserver()) == []

    def test_not_once_someone_is_back(self, row: Session) -> None:
        self.empty(row)
        take_in(row, membership(BOB, "join"))
        assert leave(row, Homeserver()) == []
        assert self.room().leave_due_at is None

    @pytest.mark.parametrize("kind", ["join", "invite"])
    def test_not_where_the_homeserver_knows_someone(self, row: Session, kind: str) -> None:
        self.empty(row)
        homeserver = Homeserver()
        homeserver.others[kind] = [BOB]
        assert leave(row, homeserver) == []
        assert (self.room().membership, self.room().leave_due_at) == ("joined", None)

    @pytest.mark.parametrize("rule", ["public", "knock", "restricted"])
    def test_not_where_others_may_join(self, row: Session, rule: str) -> None:
        self.empty(row)
        assert leave(row, Homeserver(rule=rule)) == []

    def test_not_if_the_setting_is_off(self, row: Session, settings: Any) -> None:
        settings.BOT_RUNNER_LEAVE_EMPTY_ROOMS = False
        self.empty(row)
        assert leave(row, Homeserver()) == []

    def test_not_while_the_members_are_unknown(self, row: Session) -> None:
        Room.objects.update(members_known=False)
        self.empty(row)
        assert leave(row, Homeserver()) == []

    def test_those_that_were_empty_before_a_start(self, row: Session) -> None:
        self.empty(row)
        Room.objects.update(leave_due_at=None)
        homeserver = Homeserver()
        leave(row, homeserver)
        assert self.room().leave_due_at is not None
        assert leave(row, homeserver) == [(ROOM, EMPTY)]

    def test_again_later_where_the_homeserver_is_away(self, row: Session) -> None:
        self.empty(row)
        leave(row, Homeserver(fails=MatrixTimeout("UNREACHABLE", "No answer.")))
        due = self.room().leave_due_at
        assert self.room().membership == "joined"
        assert due is not None
        assert due > timezone.now()


class TestInvitations:
    @pytest.fixture(autouse=True)
    def _narrow(self, settings: Any) -> None:
        settings.BOT_RUNNER_ALLOWED_INVITERS = [ALICE]

    def test_of_someone_who_may_not_are_declined_once(self) -> None:
        row, homeserver = session(), Homeserver()
        assert invite(row, BOB).membership == "refused"
        assert leave(row, homeserver) == [("!new", DECLINED)]
        assert leave(row, homeserver) == [("!new", DECLINED)]
        room = Room.objects.get(room_id="!new")
        assert (room.membership, room.leave_due_at) == ("refused", None)

    def test_are_followed_once_the_inviter_may(self, settings: Any) -> None:
        row = session()
        invite(row, BOB)
        leave(row, Homeserver())
        settings.BOT_RUNNER_ALLOWED_INVITERS = [ALICE, BOB]
        room = invite(row, BOB)
        assert (room.membership, room.leave_due_at, room.error) == ("invited", None, "")
        assert leave(row, Homeserver()) == []

    def test_that_are_gone_already_are_no_more_to_decline(self) -> None:
        row = session()
        invite(row, BOB)
        leave(row, Homeserver(fails=MatrixError("M_FORBIDDEN", status=403)))
        assert Room.objects.get(room_id="!new").leave_due_at is None

    def test_a_sync_that_shows_the_refusal_keeps_its_reason(self) -> None:
        row = session()
        reason = invite(row, BOB).error
        recording.record_sync(row, HOLDER, Batch("s9", left=["!new"]))
        room = Room.objects.get(room_id="!new")
        assert (room.membership, room.error, room.leave_due_at) == ("refused", reason, None)

    def test_that_follow_a_refusal_within_a_sync_are_followed(self) -> None:
        row = session()
        batch = Batch("s9", invitations=[Invitation("!new", ALICE)], left=["!new"])
        recording.record_sync(row, HOLDER, batch)
        assert Room.objects.get(room_id="!new").membership == "invited"
