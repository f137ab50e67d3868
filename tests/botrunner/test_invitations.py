"""Who invited the bot, as a sync tells it, and which rooms it joins when. Without a homeserver."""

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.db import connections
from django.db.models import F
from django.utils import timezone

from botrunner.aio import database_sync_to_async, pause
from botrunner.incoming import invitations, recording
from botrunner.incoming import joining as membership
from botrunner.incoming.batch import Batch, Invitation
from botrunner.incoming.invitations import parse_invitations
from botrunner.incoming.joining import Joiner
from botrunner.matrix import responses
from botrunner.matrix.errors import MatrixError, MatrixTimeout
from botrunner.models import Room, Session
from realm.models import User
from tests.botrunner.scenes import ALICE, BOB, HOLDER, ME, session


def member(state_key: Any, membership: Any, sender: Any = ALICE) -> dict[str, Any]:
    """Stripped, as homeservers show it to who is invited: without an id and a time."""
    content = {"membership": membership}
    return {
        "type": "m.room.member",
        "state_key": state_key,
        "sender": sender,
        "content": content,
    }


def found(rooms: dict[str, Any]) -> list[Invitation]:
    return parse_invitations(responses.sync({"rooms": {"invite": rooms}})["rooms"]["invite"], ME)


def invited(*events: Any) -> dict[str, Any]:
    return {"!room": {"invite_state": {"events": list(events)}}}


def test_an_invitation_without_id_and_time_counts_once_among_what_is_shown_beside_it() -> None:
    create = {"type": "m.room.create", "state_key": "", "sender": ALICE, "content": {}}
    rooms = invited(create, member(ALICE, "join"), member(BOB, "invite"), member(ME, "invite"))
    assert found(rooms) == [Invitation("!room", ALICE)]


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


class Homeserver:
    """Joins at once, but rooms whose server never answers."""

    user_id = ME

    def __init__(self, *, fails: MatrixError | None = None) -> None:
        self.joined: list[str] = []
        self.tried: list[str] = []
        self.waiting: list[str] = []
        self.most = 0
        self.fails = fails

    async def join(self, room_id: str, *, seconds: float) -> None:
        self.tried.append(room_id)
        if self.fails:
            raise self.fails
        if "silent" in room_id:
            self.waiting.append(room_id)
            self.most = max(self.most, len(self.waiting))
            await asyncio.sleep(seconds)
            self.waiting.remove(room_id)
            raise MatrixTimeout("UNREACHABLE", "No answer.")
        self.joined.append(room_id)


MALLORY = "@mallory:elsewhere.example"


@pytest.mark.django_db(transaction=True)
class TestJoining:
    @pytest.fixture(autouse=True)
    def _close(self) -> Iterator[None]:
        yield
        connections.close_all()

    @pytest.fixture
    def row(self) -> Session:
        row = session()
        row.connected_since = timezone.now()
        return row

    def invite(self, row: Session, *invitations: tuple[str, str]) -> None:
        batch = Batch(f"{row.since}+", invitations=[Invitation(*each) for each in invitations])
        recording.record_sync(row, HOLDER, batch)
        row.since = batch.next_batch

    def work(self, row: Session, homeserver: Any, until: Callable[[], bool]) -> None:
        """Let it join, as the bot does, until something holds."""

        async def scene() -> None:
            freed = asyncio.Event()
            joiner = Joiner(homeserver, row, freed)
            try:
                async with asyncio.timeout(60):
                    while not await database_sync_to_async(until)():
                        await joiner.start_due()
                        freed.clear()
                        await pause(0.05, freed)
            finally:
                await joiner.close()

        async_to_sync(scene)()

    def silent(self, row: Session, count: int = 20, inviter: str = MALLORY) -> None:
        self.invite(row, *((f"!silent{n}-{inviter}", inviter) for n in range(count)))

    def test_a_good_invitation_does_not_wait_for_those_that_are_not_answered(
        self, row: Session
    ) -> None:
        self.silent(row)
        self.invite(row, ("!good", ALICE))
        homeserver = Homeserver()
        self.work(row, homeserver, lambda: "!good" in homeserver.joined)

        # None of them was waited for to its end.
        assert not Room.objects.exclude(join_attempts=0).exclude(room_id="!good").exists()
        assert homeserver.most <= membership.MAX_OF_INVITER

    def test_nor_one_of_the_same_inviter_for_longer_than_a_short_try_each(
        self, row: Session, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(membership, "FIRST_SECONDS", 0.05)
        self.silent(row, inviter=BOB)
        self.invite(row, ("!good", BOB))
        homeserver = Homeserver()
        self.work(row, homeserver, lambda: "!good" in homeserver.joined)

        # Each of them once, at the most: what was never tried goes first.
        silent = [room_id for room_id in homeserver.tried if "silent" in room_id]
        assert len(silent) == len(set(silent)) <= 20

    def test_whoever_invites_from_many_accounts_of_a_server_has_a_share_too(
        self, row: Session
    ) -> None:
        for number in range(10):
            self.silent(row, 3, f"@mallory{number}:elsewhere.example")
        self.invite(row, *((f"!good{n}", f"@alice{n}:localhost") for n in range(3)))
        homeserver = Homeserver()
        self.work(row, homeserver, lambda: len(homeserver.joined) == 3)

        assert homeserver.most == membership.MAX_OF_SERVER

    def test_one_that_waits_is_given_up_once_the_inviter_is_deactivated(self, row: Session) -> None:
        self.invite(row, ("!hers", ALICE), ("!his", BOB))
        alice = User.objects.of_matrix_id(ALICE)
        alice.is_active = False
        alice.save()
        homeserver = Homeserver()
        self.work(row, homeserver, lambda: "!his" in homeserver.joined)

        assert homeserver.tried == ["!his"]
        room = Room.objects.get(room_id="!hers")
        assert (room.membership, room.join_due_at) == (Room.Membership.REFUSED, None)
        assert room.error == "The inviter's account is deactivated."

    def test_one_that_is_never_answered_is_given_up(self, row: Session) -> None:
        self.silent(row, 1)
        error = MatrixTimeout("UNREACHABLE", "No answer.")
        pauses = []
        homeserver = Homeserver(fails=error)
        while (room := Room.objects.get(inviter=MALLORY)).membership == "invited":
            Room.objects.update(join_due_at=timezone.now())
            tried = Room.objects.filter(inviter=MALLORY, join_attempts__gt=room.join_attempts)
            self.work(row, homeserver, tried.all().exists)
            if due := Room.objects.get(inviter=MALLORY).join_due_at:
                pauses.append((due - timezone.now()).total_seconds())

        assert (room.membership, room.join_due_at) == (Room.Membership.REFUSED, None)
        assert room.error.startswith("Given up after 16 attempts: UNREACHABLE")
        assert len(homeserver.tried) == 16
        assert pauses[0] < 5
        assert 3600 < sum(pauses) < 24 * 3600

        # An invitation that comes then is followed anew.
        self.invite(row, (room.room_id, MALLORY))
        room.refresh_from_db()
        assert (room.membership, room.join_attempts, room.error) == ("invited", 0, "")

    @pytest.mark.parametrize("code", ["UNREACHABLE", "M_UNKNOWN_TOKEN"])
    def test_that_the_homeserver_is_away_costs_no_try(self, row: Session, code: str) -> None:
        self.invite(row, ("!good", ALICE))
        homeserver = Homeserver(fails=MatrixError(code, status=401 if "TOKEN" in code else 0))
        with pytest.raises(MatrixError):
            self.work(row, homeserver, lambda: False)
        assert Room.objects.get(room_id="!good").join_attempts == 0

    def test_nor_that_it_answers_nothing_at_all(self, row: Session) -> None:
        row.connected_since = None
        self.invite(row, ("!good", ALICE))
        homeserver = Homeserver(fails=MatrixTimeout("UNREACHABLE"))

        def is_put_off() -> bool:
            due = Room.objects.get(room_id="!good").join_due_at
            return due is not None and due > timezone.now()

        self.work(row, homeserver, is_put_off)
        assert Room.objects.get(room_id="!good").join_attempts == 0

    def test_another_process_goes_on_with_them(self, row: Session) -> None:
        self.silent(row, 2)
        Room.objects.filter(inviter=MALLORY).update(join_attempts=3)
        self.invite(row, ("!good", ALICE))
        first, second = Homeserver(), Homeserver()
        self.work(row, first, lambda: len(first.waiting) == 2)
        self.work(row, second, lambda: len(second.waiting) == 2)
        assert set(
            Room.objects.filter(inviter=MALLORY).values_list("join_attempts", flat=True)
        ) == {3}


@pytest.mark.django_db
class TestHowManyMayWait:
    def invite(self, row: Session, *invitations: Invitation) -> set[str]:
        batch = Batch(f"{row.since}+", invitations=list(invitations))
        recording.record_sync(row, HOLDER, batch)
        row.since = batch.next_batch
        return set(Room.objects.filter(membership="invited").values_list("room_id", flat=True))

    def test_of_an_inviter(self, caplog: pytest.LogCaptureFixture) -> None:
        row = session()
        most = invitations.MAX_INVITATIONS
        kept = self.invite(row, *(Invitation(f"!r{n}", MALLORY) for n in range(most + 10)))
        assert kept == {f"!r{n}" for n in range(most)}
        assert "Ignored 10 invitations from @mallory:elsewhere.example" in caplog.text
        assert "!new" not in self.invite(row, Invitation("!new", MALLORY))
        assert "!other" in self.invite(row, Invitation("!other", ALICE))

        Room.objects.filter(room_id="!r0").update(membership="joined")
        assert "!new" in self.invite(row, Invitation("!new", MALLORY))

    def test_of_another_server(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(invitations, "MAX_INVITATIONS_SERVER", 5)
        row = session()
        for server, kept in (("elsewhere.example", 5), ("localhost", 8)):
            found = self.invite(
                row, *(Invitation(f"!{n}:{server}", f"@{n}:{server}") for n in range(8))
            )
            assert sum(server in room_id for room_id in found) == kept

    def test_of_those_that_are_refused(self, settings: Any) -> None:
        settings.BOT_RUNNER_ALLOWED_INVITERS = ["@*:localhost"]
        row = session()
        self.invite(
            row, *(Invitation(f"!{n}", MALLORY) for n in range(invitations.MAX_INVITATIONS + 10))
        )
        assert Room.objects.filter(membership="refused").count() == invitations.MAX_INVITATIONS

    def test_of_those_of_another_server_that_are_refused(
        self, settings: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It may make up as many names as it likes, and each is a row."""
        settings.BOT_RUNNER_ALLOWED_INVITERS = ["@*:localhost", "@good:elsewhere.example"]
        monkeypatch.setattr(invitations, "MAX_INVITATIONS_SERVER", 5)
        row = session()
        for part in "ab":
            self.invite(
                row, *(Invitation(f"!{part}{n}", f"@{part}{n}:elsewhere.example") for n in range(8))
            )
        assert Room.objects.filter(membership="refused").count() == 5
        assert self.invite(row, Invitation("!new", "@good:elsewhere.example")) == {"!new"}

    def test_one_that_is_repeated_counts_once_and_keeps_its_tries(self) -> None:
        row = session()
        for _ in range(3):
            self.invite(row, Invitation("!a", ALICE))
            Room.objects.filter(room_id="!a").update(join_attempts=F("join_attempts") + 1)
        room = Room.objects.get(room_id="!a")
        assert room.join_attempts == 3
        assert room.join_due_at is not None
        assert room.join_due_at <= timezone.now()

    def test_many_take_few_queries_beyond_their_own(
        self, django_assert_max_num_queries: Any
    ) -> None:
        row = session()
        self.invite(
            row, *(Invitation(f"!r{n}", MALLORY) for n in range(invitations.MAX_INVITATIONS))
        )
        with django_assert_max_num_queries(8):
            self.invite(row, *(Invitation(f"!x{n}", MALLORY) for n in range(1000)))
