"""What of an answer of /sync is worth writing down."""

from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import async_to_sync

from botrunner.incoming.backfill import batch_of
from botrunner.incoming.batch import Batch
from botrunner.matrix import responses
from botrunner.matrix.client import Homeserver, SyncUpdate
from tests.botrunner.scenes import ALICE, ME, ROOM, event, membership


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


class TestANewRoom:
    """Which messages of a room that the bot has just joined are for it."""

    @pytest.fixture
    def bodies(self, tmp_path: Path) -> Any:
        """Of the messages that are for the bot. `pages` are what the room has before its timeline."""

        @async_to_sync
        async def found(*events: dict[str, Any], pages: tuple[list[Any], ...] = ()) -> list[str]:
            homeserver = Homeserver("http://homeserver.invalid", "bot-runner", tmp_path)
            homeserver.nio.user_id = ME

            async def messages(room_id: str, start: str, end: str | None) -> Any:
                number = int(start)
                return pages[number][::-1], str(number + 1) if number + 1 < len(pages) else ""

            homeserver.messages = messages  # type: ignore[method-assign]
            timeline = {"events": list(events), "limited": bool(pages), "prev_batch": "0"}
            joined = {ROOM: {"timeline": timeline}}
            news = SyncUpdate(responses.sync({"next_batch": "s2", "rooms": {"join": joined}}), {})
            try:
                batch = await batch_of(news, "s1", homeserver, set())
            finally:
                await homeserver.close()
            return [e["content"]["body"] for e in batch.joined[0].events if "state_key" not in e]

        return found

    def invite(self, before: str = "") -> dict[str, Any]:
        unsigned = {"prev_content": {"membership": before}} if before else {}
        return {**membership(ALICE, "invite"), "state_key": ME, "unsigned": unsigned}

    def join(self, before: str = "invite") -> dict[str, Any]:
        unsigned = {"prev_content": {"membership": before}} if before else {}
        return membership(ME, "join", unsigned=unsigned)

    def test_those_since_the_invite(self, bodies: Any) -> None:
        early, since, later = event("early"), event("since"), event("later")
        assert bodies(early, self.invite(), since, self.join(), later) == ["since", "later"]

    def test_those_since_the_first_of_several_invites(self, bodies: Any) -> None:
        again = self.invite("invite")
        assert bodies(
            event("early"), self.invite("leave"), event("1"), again, event("2"), self.join()
        ) == ["1", "2"]

    def test_those_since_the_last_stay(self, bodies: Any) -> None:
        assert bodies(
            self.invite(),
            self.join(),
            event("before it left"),
            membership(ME, "leave", unsigned={"prev_content": {"membership": "join"}}),
            event("without it"),
            self.invite("leave"),
            event("since"),
            self.join(),
        ) == ["since"]

    def test_a_refused_invite_is_none(self, bodies: Any) -> None:
        refused = membership(ME, "leave", unsigned={"prev_content": {"membership": "invite"}})
        assert bodies(
            self.invite(), event("early"), refused, self.invite("leave"), event("1"), self.join()
        ) == ["1"]

    def test_a_new_name_of_the_bot_is_no_join(self, bodies: Any) -> None:
        renamed = self.join("join")
        assert bodies(
            event("early"), self.invite(), event("1"), self.join(), event("2"), renamed, event("3")
        ) == ["1", "2", "3"]

    def test_those_since_the_join_where_no_invite_was_needed(self, bodies: Any) -> None:
        assert bodies(event("early"), self.join(""), event("later")) == ["later"]

    def test_those_since_the_join_where_the_invite_is_hidden(self, bodies: Any) -> None:
        assert bodies(event("early"), self.join(), event("later")) == ["later"]
        assert bodies(event("1"), self.join(), event("2"), pages=([event("0")],)) == ["2"]

    def test_those_since_an_invite_further_back_than_the_timeline(self, bodies: Any) -> None:
        pages = ([event("2")], [event("early"), self.invite(), event("1")])
        assert bodies(event("3"), self.join(), event("4"), pages=pages) == ["1", "2", "3", "4"]

    def test_those_since_an_invite_further_back_than_the_join(self, bodies: Any) -> None:
        pages = ([event("2"), self.join(), event("3")], [event("0"), self.invite(), event("1")])
        assert bodies(event("4"), pages=pages) == ["1", "2", "3", "4"]

    def test_none_that_is_too_old(self, bodies: Any, settings: Any) -> None:
        pages = ([self.invite(), event("old", age=7200), event("1")],)
        settings.BOT_RUNNER_MAX_EVENT_AGE = 3600
        assert bodies(event("2"), self.join(), pages=pages) == ["1", "2"]
