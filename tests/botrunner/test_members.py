"""A room's thread over HTTP: its members read it, from their own join on, for as long as the bot knows
who they are."""

import asyncio
import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from django.utils import timezone
from rest_framework.test import APIClient

from agents.models import Run
from agents.runs import execution
from botrunner.bot import Bot
from botrunner.incoming import controls, decryption, handling, recording, submission
from botrunner.incoming.batch import Batch, RoomUpdate
from botrunner.matrix import rooms
from botrunner.matrix.client import Homeserver
from botrunner.models import Conversation, LeaseLost, Reply, Room, RoomEvent, RoomMember, Session
from chat.models import Message, Thread
from realm import tokens
from realm.models import User
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
from tests.chat.asgi_client import go, request

pytestmark = pytest.mark.django_db
CAROL = "@carol:localhost"


@pytest.fixture(autouse=True)
def _closed(settings: Any) -> None:
    settings.CHAT_ALLOW_ANONYMOUS = False


@pytest.fixture
def row() -> Session:
    """Alice and Bob are in the room, and whatever anybody says there is a question."""
    command(ME)
    found = session()
    let_in(found, ALICE, BOB)
    return found


def client(user_id: str) -> APIClient:
    found = APIClient()
    found.force_authenticate(User.objects.of_matrix_id(user_id))
    return found


def asked(row: Session, words: str, sender: str = ALICE) -> Run:
    """A question that is answered."""
    take_in(row, event(words, sender))
    run = Run.objects.select_related("thread").get(message__content=words)
    execution.execute(run.pk)
    return run


def thread() -> Thread:
    return Thread.objects.exclude(room_id="").get()


def words_for(user_id: str) -> Any:
    """What somebody reads of the thread; the status where that is nothing."""
    response = client(user_id).get(f"/api/chat/threads/{thread().pk}/messages")
    if response.status_code != 200:
        return response.status_code
    told = response.json()["messages"]
    return [each["content"] for each in told if each["role"] == "user"]


class TestWhoReads:
    def test_every_member_and_no_one_else(self, row: Session) -> None:
        asked(row, "one")

        assert (thread().owner, thread().room_id) == (None, ROOM)
        assert [words_for(each) for each in (ALICE, BOB, CAROL)] == [["one"], ["one"], 404]

    def test_not_who_asked_but_is_no_member(self, row: Session) -> None:
        asked(row, "one")
        take_in(row, membership(ALICE, "leave"))

        assert words_for(ALICE) == 404

    @pytest.mark.parametrize("end", ["leave", "ban", "knock", "invite"])
    def test_not_who_has_left_and_after_that_from_the_new_join_on(
        self, row: Session, end: str
    ) -> None:
        asked(row, "one")
        take_in(row, membership(BOB, end))
        assert words_for(BOB) == 404
        asked(row, "two")
        let_in(row, BOB)
        asked(row, "three")

        assert words_for(BOB) == ["three"]
        assert words_for(ALICE) == ["one", "two", "three"]

    def test_from_the_join_on_within_one_sync(self, row: Session) -> None:
        take_in(row, event("one"), membership(CAROL, "join"), event("two"))

        assert words_for(CAROL) == ["two"]

    def test_a_question_that_is_read_late_was_asked_when_it_came(self, row: Session) -> None:
        sealed = event({"algorithm": "m.megolm.v1.aes-sha2"}, type="m.room.encrypted")
        take_in(row, sealed)
        let_in(row, CAROL)
        opened = {**sealed, "type": "m.room.message", "content": event("one")["content"]}
        decryption.record_decrypted(
            RoomEvent.objects.get(event_id=sealed["event_id"]).pk, opened, ME
        )
        for pk in handling.pending():
            handling.handle(pk, ME)
        asked(row, "two")

        assert words_for(CAROL) == ["two"]
        assert words_for(BOB) == ["one", "two"]

    def test_a_time_that_another_homeserver_made_up_opens_nothing(self, row: Session) -> None:
        asked(row, "one")
        take_in(row, membership(CAROL, "join", age=3600) | {"sender": CAROL})

        assert words_for(CAROL) == []

    def test_a_new_name_is_no_new_join(self, row: Session) -> None:
        asked(row, "one")
        renamed = membership(BOB, "join", unsigned={"prev_content": {"membership": "join"}})
        take_in(row, renamed)

        assert words_for(BOB) == ["one"]
        assert RoomMember.objects.get(user_id=BOB).event_id == renamed["event_id"]

    def test_no_one_while_the_bot_is_away_or_out_of_the_room(self, row: Session) -> None:
        asked(row, "one")
        Session.objects.update(last_sync_at=timezone.now() - timedelta(minutes=6))
        assert words_for(BOB) == 404
        Session.objects.update(last_sync_at=timezone.now())
        assert words_for(BOB) == ["one"]
        Room.objects.update(membership=Room.Membership.LEFT)
        assert words_for(BOB) == 404

    def test_a_person_without_a_matrix_account_is_in_no_room(self, row: Session) -> None:
        asked(row, "one")
        user = User.objects.create_superuser("root")
        found = APIClient()
        found.force_authenticate(user)

        assert found.get(f"/api/chat/threads/{thread().pk}").status_code == 404

    def test_anonymous_callers_read_no_room(self, row: Session, settings: Any) -> None:
        settings.CHAT_ALLOW_ANONYMOUS = True
        run = asked(row, "one")
        for path in (f"threads/{thread().pk}", f"runs/{run.pk}"):
            assert APIClient().get(f"/api/chat/{path}").status_code == 404
        assert APIClient().get("/api/chat/threads").json()["threads"] == []
        assert APIClient().get("/api/messages").json()["data"] == []


class TestWhatALaterMemberSees:
    """Carol came between the first question and the second."""

    @pytest.fixture
    def turns(self, row: Session) -> list[Run]:
        first = asked(row, "A canary sings")
        let_in(row, CAROL)
        return [first, asked(row, "two")]

    def test_neither_the_words_nor_the_answers_before(self, turns: list[Run]) -> None:
        carol, thread_id = client(CAROL), thread().pk
        messages = carol.get(f"/api/chat/threads/{thread_id}/messages?limit=2").json()

        assert [each["role"] for each in messages["messages"]] == ["user", "assistant"]
        assert messages["next"] is None
        for run, status in zip(turns, (404, 200), strict=True):
            answer = Run.objects.get(pk=run.pk).answer_id
            for path in (
                f"/api/chat/runs/{run.pk}",
                f"/api/runs/{run.pk}",
                f"/api/runs/{run.pk}/answer",
                f"/api/messages/{run.message_id}",
                f"/api/messages/{answer}",
                f"/runs/{run.pk}",
                f"/api/chat/threads/{thread_id}/messages?before={run.message_id}",
            ):
                carol.force_login(User.objects.get(matrix_user_id=CAROL))
                assert carol.get(path).status_code == status, path

    def test_nothing_of_it_in_documents_and_on_the_page(self, turns: list[Run]) -> None:
        carol, thread_id = client(CAROL), thread().pk
        carol.force_login(User.objects.get(matrix_user_id=CAROL))
        hidden, shown = turns
        for path in (
            f"/threads/{thread_id}",
            f"/threads/{thread_id}?before=1",
            f"/api/chat/threads/{thread_id}",
            f"/api/threads/{thread_id}?include=messages,runs,runs.answer",
            f"/api/threads/{thread_id}/messages?include=run",
            f"/api/threads/{thread_id}/relationships/runs",
            f"/api/messages?filter[thread]={thread_id}&include=run.answer",
            f"/api/runs?filter[thread]={thread_id}&include=thread.messages",
        ):
            body = carol.get(path).content.decode()
            assert "canary" not in body, path
            assert hidden.pk not in body, path
        page = carol.get(f"/api/runs?filter[thread]={thread_id}").json()
        assert [each["id"] for each in page["data"]] == [shown.pk]
        shown_page = carol.get(f"/threads/{thread_id}").content.decode()
        assert "Earlier" not in shown_page
        assert f"<h1>{ROOM}</h1>" in shown_page

    def test_it_is_in_no_list_of_their_own(self, turns: list[Run]) -> None:
        for user_id in (ALICE, CAROL):
            for path in ("/api/threads", "/api/messages", "/api/runs"):
                assert client(user_id).get(path).json()["data"] == []
            assert client(user_id).get("/api/chat/threads").json()["threads"] == []


@pytest.mark.django_db(transaction=True)
def test_a_stream_tells_a_member_what_is_asked_while_they_are_one(redis: Any) -> None:
    command(ME)
    row = session()
    for user_id, words in ((ALICE, "one"), (CAROL, "two")):
        User.objects.of_matrix_id(user_id)
        let_in(row, user_id)
        asked(row, words)

    async def told(user_id: str, count: int) -> list[tuple[str, str]]:
        token = tokens.issue(user_id)
        path = f"/api/chat/threads/{await asyncio.to_thread(lambda: thread().pk)}/events"
        async with request(path, authorization=f"Bearer {token}") as response:
            return [_told(await response.event()) for _ in range(count)]

    def _told(event: Any) -> tuple[str, str]:
        return event.type, event.data.get("message", {}).get("content", "")

    async def scene() -> None:
        assert (await told(ALICE, 1))[0] == ("message.created", "one")
        gap, *events = await told(CAROL, 3)
        assert gap[0] == "gap"
        assert [kind for kind, _ in events] == ["message.created", "run.completed"]
        assert events[0][1] == "two"

    go(scene())


class TestWriting:
    def test_no_member_asks_renames_or_deletes_over_http(self, row: Session) -> None:
        asked(row, "one")
        for user_id, status in ((ALICE, 403), (BOB, 403), (CAROL, 404)):
            caller, path = client(user_id), f"/api/chat/threads/{thread().pk}"
            question = {"content": "planted", "threadId": thread().pk}
            assert caller.post("/api/chat/messages", question, "json").status_code == status
            assert caller.patch(path, {"title": "x"}, "json").status_code == status
            assert caller.delete(path).status_code == status
            document = {
                "data": {
                    "type": "messages",
                    "attributes": {"content": "planted"},
                    "relationships": {"thread": {"data": {"type": "threads", "id": thread().pk}}},
                }
            }
            kind = "application/vnd.api+json"
            answer = caller.generic("POST", "/api/messages", json.dumps(document), kind)
            assert answer.status_code == status
            caller.force_login(User.objects.get(matrix_user_id=user_id))
            for form in ("", "/change", "/delete"):
                page = f"/threads/{thread().pk}{form}"
                assert caller.post(page, {"content": "planted"}).status_code == status
        assert Message.objects.filter(role="user").count() == 1

    def test_each_cancels_and_retries_only_what_they_asked(self, row: Session) -> None:
        take_in(row, event("one"))
        run = Run.objects.get()
        for action in ("cancel", "retry"):
            path = f"/api/chat/runs/{run.pk}/{action}"
            assert client(CAROL).post(path).status_code == 404
            assert client(BOB).post(path).status_code == 403
            assert client(ALICE).post(path).status_code == 202

    def test_not_what_answers_somebody_else_too(self, row: Session, settings: Any) -> None:
        settings.CHAT_WHEN_BUSY = "merge"
        take_in(row, event("one", BOB), event("two", ALICE))
        run = Run.objects.get(message__content="two")

        assert client(ALICE).post(f"/api/chat/runs/{run.pk}/cancel").status_code == 403

    def test_a_person_who_takes_the_id_of_a_deleted_thread_gets_no_question(
        self, row: Session, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked(row, "one")
        taken = thread().pk
        Conversation.objects.all().delete()
        Thread.objects.all().delete()
        mallory = User.objects.of_matrix_id("@mallory:localhost")
        Thread.objects.create(id=taken, owner=mallory)
        # As it was looked up before it was deleted.
        monkeypatch.setattr(submission, "_thread_of", lambda row, event: taken)
        run = asked(row, "two")

        assert run.thread_id != taken
        assert run.thread.room_id == ROOM
        assert not Thread.objects.get(pk=taken).messages.exists()


class TestGaps:
    """What a sync did not bring."""

    def write(
        self,
        row: Session,
        *events: Any,
        members: dict[str, str] | None = None,
        is_complete: bool = True,
    ) -> None:
        news = [RoomUpdate(ROOM, list(events), False, is_complete=is_complete)]
        lost = set() if is_complete else {ROOM}
        batch = Batch(f"{row.since}+", news, members_lost=lost)
        batch.members = {} if members is None else {ROOM: members}
        recording.record_sync(row, HOLDER, batch)
        row.since = batch.next_batch
        for pk in handling.pending():
            handling.handle(pk, ME)

    def event_of(self, user_id: str) -> str:
        return RoomMember.objects.get(user_id=user_id).event_id

    def test_close_the_room_until_the_members_are_known(self, row: Session) -> None:
        asked(row, "one")
        self.write(row, is_complete=False)
        assert words_for(BOB) == 404
        self.write(row, members={BOB: self.event_of(BOB)})
        assert words_for(BOB) == ["one"]
        assert words_for(ALICE) == 404

    def test_another_membership_event_may_hide_a_leave(self, row: Session) -> None:
        asked(row, "one")
        members = {BOB: "$other", ALICE: self.event_of(ALICE)}
        self.write(row, event("two"), members=members, is_complete=False)
        asked(row, "three")

        assert words_for(BOB) == ["three"]
        assert words_for(ALICE) == ["one", "two", "three"]

    def test_who_is_there_when_the_bot_comes_has_been_there_for_all_that_it_hears(self) -> None:
        command(ME)
        row = session()
        self.write(
            row,
            event("one"),
            carol := membership(CAROL, "join"),
            event("two"),
            members={BOB: "$bob", CAROL: carol["event_id"]},
        )

        assert words_for(BOB) == ["one", "two"]
        assert words_for(CAROL) == ["two"]

    def test_members_are_written_with_the_position(self, row: Session) -> None:
        stale = Session.objects.get(pk=row.pk)
        self.write(row)
        batch = Batch("s9", [RoomUpdate(ROOM, [membership(CAROL, "join")], False)])
        with pytest.raises(LeaseLost):
            recording.record_sync(stale, HOLDER, batch)
        assert not RoomMember.objects.filter(user_id=CAROL).exists()


class TestOrders:
    """What moderates a room: words said there, by the sender's power."""

    def say(self, row: Session, words: str, sender: str, *, moderates: bool) -> None:
        batch = Batch(f"{row.since}+", [RoomUpdate(ROOM, [event(words, sender)], False)])
        recording.record_sync(row, HOLDER, batch)
        row.since = batch.next_batch
        (pk,) = handling.pending()
        with pytest.raises(controls.PowerNeeded) as needed:
            handling.handle(pk, ME)
        assert (needed.value.room_id, needed.value.user_id) == (ROOM, sender)
        assert handling.pending() == [pk]
        handling.handle(pk, ME, moderates=moderates)

    def replied(self) -> str:
        reply = Reply.objects.filter(
            message__kind__in=[RoomEvent.Kind.CANCEL, RoomEvent.Kind.FORGET]
        ).latest("pk")
        return reply.error or str(reply.parts[0]["body"])

    @pytest.mark.parametrize("words", ["!cancel all", f"{ME}: !Cancel  All"])
    def test_a_moderator_cancels_what_others_asked(self, row: Session, words: str) -> None:
        take_in(row, event("one"), event("two", CAROL))
        self.say(row, words, BOB, moderates=True)

        assert set(Run.objects.values_list("status", flat=True)) == {"cancelled"}

    def test_others_do_not(self, row: Session) -> None:
        take_in(row, event("one"))
        self.say(row, "!cancel all", BOB, moderates=False)

        assert Run.objects.get().status == "queued"
        assert "power level" in self.replied()

    def test_a_moderator_deletes_what_was_asked(self, row: Session) -> None:
        asked(row, "one")
        self.say(row, "!forget", BOB, moderates=True)

        assert not Thread.objects.exists()
        assert self.replied() == "The conversation was deleted."
        reply = Reply.objects.latest("pk")
        assert (reply.status, reply.device_id) == (Reply.Status.READY, "DEVICE")
        again = asked(row, "two")
        assert words_for(BOB) == ["two"]
        assert Conversation.objects.get().thread_id == again.thread_id

    def test_others_keep_their_memory(self, row: Session) -> None:
        asked(row, "one")
        self.say(row, "!forget", ALICE, moderates=False)

        assert words_for(ALICE) == ["one"]
        assert "power level" in self.replied()

    def test_a_matrix_thread_is_forgotten_by_itself(self, row: Session) -> None:
        asked(row, "one")
        there = {"m.relates_to": {"rel_type": "m.thread", "event_id": "$root"}}
        take_in(row, event({"msgtype": "m.text", "body": "two", **there}))
        words = {"msgtype": "m.text", "body": "!forget", **there}
        self.say(row, words, BOB, moderates=True)  # type: ignore[arg-type]

        assert list(Conversation.objects.values_list("root", flat=True)) == [""]
        assert words_for(BOB) == ["one"]


BROKEN = "broken"
LEVELS = {"users": {BOB: 50, CAROL: 49}, "users_default": 0}


@pytest.mark.parametrize(
    ("levels", "create", "user_id", "moderates"),
    [
        (LEVELS, {}, BOB, True),
        (LEVELS, {}, CAROL, False),
        (LEVELS, {}, ALICE, False),
        ({"users_default": 50}, {}, ALICE, True),
        ({"users": {BOB: 99}, "redact": 100}, {}, BOB, False),
        ({"users": {BOB: "75"}, "redact": "50"}, {}, BOB, True),
        ({"users": [BOB], "redact": {}}, {}, BOB, False),
        (None, {"room_version": "10"}, ALICE, True),
        (None, {"room_version": "10"}, BOB, False),
        # Its creators have more power than any level.
        ({}, {"room_version": "12"}, ALICE, True),
        ({}, {"room_version": "12", "additional_creators": [BOB]}, BOB, True),
        ({}, {"room_version": "12", "additional_creators": "@"}, BOB, False),
        ({}, {"room_version": "11"}, ALICE, False),
        (BROKEN, {"room_version": "12"}, ALICE, False),
    ],
)
def test_power_is_that_to_redact(
    tmp_path: Path, levels: Any, create: Any, user_id: str, moderates: bool
) -> None:
    async def state(request: web.Request) -> web.Response:
        assert request.query["format"] == "event"
        kind = request.match_info["kind"]
        content = levels if kind == "m.room.power_levels" else create
        if content is None:
            return web.json_response({"errcode": "M_NOT_FOUND"}, status=404)
        if content == BROKEN:
            return web.json_response({"errcode": "M_UNKNOWN"}, status=500)
        return web.json_response({"type": kind, "sender": ALICE, "content": content})

    async def scene() -> bool:
        app = web.Application()
        app.router.add_get("/_matrix/client/v3/rooms/{room}/state/{kind}/", state)
        async with TestServer(app) as server:
            homeserver = Homeserver(str(server.make_url("/")).rstrip("/"), "bot", tmp_path)
            try:
                return await rooms.may_moderate(homeserver, ROOM, user_id)
            finally:
                await homeserver.close()

    assert asyncio.run(scene()) == moderates


@pytest.mark.django_db(transaction=True)
def test_a_room_is_open_once_the_homeserver_has_named_its_members(
    settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An installation that knew no members before asks for them; what fails is asked for again."""
    settings.BOT_RUNNER_STORE = tmp_path
    monkeypatch.setattr(rooms, "MAX_PAUSE_SECONDS", 0.01)
    row = session()
    asked_for: list[str] = []
    bob = membership(BOB, "join")

    async def members(request: web.Request) -> web.Response:
        asked_for.append(request.query["at"])
        if len(asked_for) == 1:
            return web.json_response({"errcode": "M_UNKNOWN"}, status=500)
        odd = [None, {}, bob | {"state_key": 7}, membership(CAROL, "leave")]
        return web.json_response({"chunk": [bob, *odd]})

    async def sync(request: web.Request) -> web.Response:
        return web.json_response({"next_batch": f"s{len(asked_for) + 1}"})

    async def keys(request: web.Request) -> web.Response:
        return web.json_response({"one_time_key_counts": {"signed_curve25519": 50}})

    async def scene() -> None:
        app = web.Application()
        app.router.add_get("/_matrix/client/v3/rooms/{room}/members", members)
        app.router.add_get("/_matrix/client/v3/sync", sync)
        app.router.add_post("/_matrix/client/v3/keys/upload", keys)
        async with TestServer(app) as server:
            settings.MATRIX_URL = str(server.make_url("/")).rstrip("/")
            bot = Bot(row, HOLDER, asyncio.Event())
            bot.homeserver.nio.restore_login(ME, "DEVICE", "token")
            bot._lookup.add([ROOM])
            try:
                async with asyncio.timeout(30):
                    while len(asked_for) < 2:
                        await bot.sync()
                    await bot.sync()
            finally:
                await bot.homeserver.close()

    asyncio.run(scene())
    assert asked_for == ["s1", "s2"]
    assert Room.objects.get().members_known
    assert list(RoomMember.objects.values_list("user_id", "event_id")) == [(BOB, bob["event_id"])]
