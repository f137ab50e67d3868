"""The bot runner in rooms of a real homeserver, with a real worker."""

import signal
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from urllib.parse import quote

import pytest
from django.utils import timezone
from rest_framework.test import APIClient

from botrunner.models import Conversation, Reply, Room, RoomEvent, RoomMember, Session
from chat.models import Message, Thread
from realm.models import User
from tests.botrunner.world import World, register
from tests.synapse import Account

pytestmark = pytest.mark.system


def test_joins_when_invited_and_answers_messages_and_triggers(world: World, alice: Account) -> None:
    register(alice)
    trigger = {"event_type": "app.boxel.bot-trigger", "content_type": "ping"}
    register(alice, "ping", **trigger)
    before = world.synapse.create_room(alice, [world.bot_id])
    world.start("worker", "bot")
    world.wait_joined(alice, before)
    room = world.invite(alice)

    question = world.synapse.send(alice, room, "How are **you**?")
    answer = world.answer(alice, room, question)
    assert answer["body"] == "Handled prompt: How are **you**?"
    assert answer["formatted_body"] == "<p>Handled prompt: How are <strong>you</strong>?</p>"
    assert answer["msgtype"] == "m.text"
    assert answer["m.mentions"] == {}

    content = {"type": "ping", "input": "x", "realm": "http://r/", "userId": alice.user_id}
    pinged = world.synapse.send(alice, room, content, "app.boxel.bot-trigger")
    assert world.answer(alice, room, pinged)["body"] == "pong"

    assert world.kill("bot", signal.SIGTERM) == 0
    session = Session.objects.get()
    assert session.lease_expires_at is None
    assert session.access_token not in world.log()


def test_what_is_no_question_gets_no_answer(
    world: World, alice: Account, account: Callable[[str], Account]
) -> None:
    bob = account("bob")
    room = world.synapse.create_room(alice, [bob.user_id])
    world.synapse.call("POST", f"/_matrix/client/v3/join/{room}", bob.token, {})
    register(alice, prefix="!bot")
    early = world.synapse.send(alice, room, "!bot said before the bot was invited")
    world.synapse.invite(alice, room, world.bot_id)
    world.start("worker", "bot")
    world.wait_joined(alice, room)

    plain = world.synapse.send(alice, room, "no prefix")
    others = world.synapse.send(bob, room, "!bot from somebody without a registration")
    world.synapse.send(alice, room, {"msgtype": "m.notice", "body": "!bot notice"})
    own = "app.botrealm.reply"
    world.synapse.send(alice, room, {"msgtype": "m.text", "body": "!bot other bot", own: {}})
    trigger = world.synapse.send(
        alice, room, {"type": "ping", "input": 1, "realm": 2}, "app.boxel.bot-trigger"
    )
    question = world.synapse.send(alice, room, "!bot the question")

    assert world.answer(alice, room, question)["body"] == "Handled prompt: the question"
    assert len(world.said_by_bot(alice, room)) == 1
    why = {row.event_id: row for row in RoomEvent.objects.all()}
    assert set(why) == {early, plain, others, trigger, question}
    assert {key for key, row in why.items() if row.state != RoomEvent.State.IGNORED} == {question}
    assert why[early].note == "Sent before the bot joined the room."
    assert why[plain].command_verdicts[0].reason == "Its body does not begin with '!bot'."
    assert why[others].note == f"Neither {bob.user_id} nor the bot has a registration."
    assert not any(row.source for key, row in why.items() if key != question)


def test_what_is_asked_since_the_invite_is_answered_once(world: World, alice: Account) -> None:
    register(alice)
    room = world.synapse.create_room(alice)
    world.synapse.send(alice, room, "before the invite")
    world.synapse.invite(alice, room, world.bot_id)
    # More than the sync that shows the join brings.
    asked = [world.synapse.send(alice, room, f"{number}") for number in range(110)]
    world.start("worker", "bot")
    for question in (asked[0], asked[50], asked[-1]):
        world.answer(alice, room, question)
    world.wait("all answers", lambda: len(world.said_by_bot(alice, room)) >= len(asked))

    world.kill("bot")
    world.start("bot")
    last = world.synapse.send(alice, room, "last")
    world.answer(alice, room, last)
    said = world.said_by_bot(alice, room)
    answered = [each["content"]["m.relates_to"]["m.in_reply_to"]["event_id"] for each in said]
    assert sorted(answered) == sorted([*asked, last])


def test_what_is_asked_between_a_kick_and_a_new_invite_is_not_answered(
    world: World, alice: Account
) -> None:
    register(alice)
    world.start("worker", "bot")
    room = world.invite(alice)
    path = f"/_matrix/client/v3/rooms/{room}/kick"
    world.synapse.call("POST", path, alice.token, {"user_id": world.bot_id})
    world.synapse.send(alice, room, "without the bot")
    world.synapse.invite(alice, room, world.bot_id)
    question = world.synapse.send(alice, room, "since the invite")
    world.answer(alice, room, question)
    assert len(world.said_by_bot(alice, room)) == 1


def test_what_has_become_old_is_forgotten_by_the_bot(world: World, alice: Account) -> None:
    register(alice, prefix="!bot")
    world.start("bot")
    room = world.invite(alice)
    world.synapse.send(alice, room, "no prefix")
    world.wait("the event", RoomEvent.objects.exists)
    world.kill("bot")
    ago = timezone.now() - timedelta(days=8)
    RoomEvent.objects.update(sent_at=ago, created_at=ago)
    world.start("bot")
    world.wait("the pruning", lambda: not RoomEvent.objects.exists())


def test_a_matrix_thread_is_a_thread_of_its_own(world: World, alice: Account) -> None:
    register(alice)
    world.start("worker", "bot")
    room = world.invite(alice)
    root = world.synapse.send(alice, room, "root")
    world.answer(alice, room, root)
    relation = {"rel_type": "m.thread", "event_id": root}
    content = {"msgtype": "m.text", "body": "within", "m.relates_to": relation}
    within = world.synapse.send(alice, room, content)

    assert world.answer(alice, room, within)["m.relates_to"] == {
        "rel_type": "m.thread",
        "event_id": root,
        "is_falling_back": False,
        "m.in_reply_to": {"event_id": within},
    }
    assert set(Conversation.objects.values_list("root", flat=True)) == {"", root}


def test_replies_and_threads_quote_what_they_hang_on(
    world: World, alice: Account, account: Callable[[str], Account]
) -> None:
    bob = account("bob")
    register(alice, prefix="!ask ")
    world.start("worker", "bot")
    room = world.invite(alice)
    world.synapse.invite(alice, room, bob.user_id)
    world.synapse.call("POST", f"/_matrix/client/v3/join/{room}", bob.token, {})
    noon = world.synapse.send(bob, room, "The meeting is at noon")
    edited = {"msgtype": "m.text", "body": "The meeting is at one"}
    relation = {"rel_type": "m.replace", "event_id": noon}
    world.synapse.send(bob, room, {**edited, "m.new_content": edited, "m.relates_to": relation})

    def ask(body: str, **relation: Any) -> list[tuple[str, str, str]]:
        content = {"msgtype": "m.text", "body": body, "m.relates_to": relation}
        question = world.synapse.send(alice, room, content)
        world.answer(alice, room, question)
        [found] = Message.objects.filter(run__correlation_id=question)
        return [(each["kind"], each["author"], each["text"]) for each in found.quotations]

    to = {"event_id": noon}
    assert ask("!ask translate", **{"m.in_reply_to": to}) == [
        ("reply", "other", "The meeting is at one")
    ]
    world.wait("the answer", lambda: world.said_by_bot(alice, room))
    [answer] = [each["event_id"] for each in world.said_by_bot(alice, room)]
    thread = {"rel_type": "m.thread", "event_id": answer, "is_falling_back": True}
    asked, answered = ask("!ask and why?", **thread, **{"m.in_reply_to": {"event_id": answer}})
    assert asked == ("root", "user", "translate")
    assert answered[:2] == ("root", "assistant")
    assert answered[2].startswith("Handled prompt: ")
    path = f"/_matrix/client/v3/rooms/{room}/redact/{noon}/1"
    world.synapse.call("PUT", path, bob.token, {})
    world.wait(
        "the removal", lambda: not Message.objects.filter(content="translate").get().quotations
    )
    assert ask("!ask again", **{"m.in_reply_to": to}) == []


def test_an_edit_that_makes_a_question_is_answered_in_its_thread(
    world: World, alice: Account
) -> None:
    register(alice, prefix="!ask ")
    world.start("worker", "bot")
    room = world.invite(alice)
    root = world.synapse.send(alice, room, "The meeting is at noon")
    thread = {"rel_type": "m.thread", "event_id": root}
    content = {"msgtype": "m.text", "body": "!aks translate", "m.relates_to": thread}
    said = world.synapse.send(alice, room, content)
    new = {"msgtype": "m.text", "body": "!ask translate"}
    edit = {
        **new,
        "m.new_content": new,
        "m.relates_to": {"rel_type": "m.replace", "event_id": said},
    }
    world.synapse.send(alice, room, edit)
    assert world.answer(alice, room, said)["m.relates_to"]["event_id"] == root
    message = Message.objects.get(role=Message.Role.USER)
    assert message.content == "translate"
    assert [each["text"] for each in message.quotations] == ["The meeting is at noon"]


def test_what_was_said_while_it_was_down_is_answered_once(world: World, alice: Account) -> None:
    register(alice)
    world.start("worker", "bot")
    room = world.invite(alice)
    first = world.synapse.send(alice, room, "first")
    world.answer(alice, room, first)
    device = Session.objects.get().device_id
    world.kill("bot")

    # More than one sync delivers: the rest has to be asked for.
    missed = [world.synapse.send(alice, room, f"missed {number}") for number in range(120)]
    invited = world.synapse.create_room(alice, [world.bot_id])
    world.start("bot")
    world.wait_joined(alice, invited)
    world.wait(
        "all answers", lambda: len(world.said_by_bot(alice, room)) >= len(missed) + 1, seconds=240
    )

    said = [event["content"]["body"] for event in world.said_by_bot(alice, room)]
    assert said == ["Handled prompt: first", *(f"Handled prompt: missed {n}" for n in range(120))]
    assert Session.objects.get().device_id == device
    assert world.log().count("Logged in as") == 1
    # It stands in the room before the bot has noted that.
    world.wait("all to be noted", lambda: not Reply.objects.exclude(status="sent").exists())


def test_a_second_bot_runner_stands_by_and_takes_over(world: World, alice: Account) -> None:
    register(alice)
    world.start("worker", "bot")
    room = world.invite(alice)
    world.start("bot2")
    world.wait("it to stand by", lambda: "standing by" in world.log("bot2"))
    question = world.synapse.send(alice, room, "one")
    world.answer(alice, room, question)
    assert "Replied" not in world.log("bot2")

    world.kill("bot")
    question = world.synapse.send(alice, room, "two")
    assert world.answer(alice, room, question)["body"] == "Handled prompt: two"
    assert "Connected" in world.log("bot2")


def test_who_is_shown_the_door_says_nothing_and_may_come_back(world: World, alice: Account) -> None:
    register(alice)
    world.start("worker", "bot")
    room, other = world.invite(alice), world.invite(alice)
    world.answer(alice, room, world.synapse.send(alice, room, "one"))

    def call(what: str) -> None:
        path = f"/_matrix/client/v3/rooms/{room}/{what}"
        world.synapse.call("POST", path, alice.token, {"user_id": world.bot_id})

    def membership() -> str:
        return Room.objects.get(room_id=room).membership

    call("kick")
    world.wait("it to notice", lambda: membership() == Room.Membership.LEFT)
    unheard = world.synapse.send(alice, room, "said while it was away")
    call("invite")
    world.wait_joined(alice, room)
    question = world.synapse.send(alice, room, "two")
    assert world.answer(alice, room, question)["body"] == "Handled prompt: two"
    assert world.answers(alice, room, unheard) == []
    assert membership() == Room.Membership.JOINED
    # Elsewhere nothing has changed.
    world.answer(alice, other, world.synapse.send(alice, other, "three"))


def test_members_read_the_rooms_thread_and_its_moderator_has_it_forgotten(
    world: World, alice: Account, account: Callable[[str], Account]
) -> None:
    register(alice)
    bob = account("bob")
    world.start("worker", "bot")
    room = world.invite(alice)
    world.answer(alice, room, world.synapse.send(alice, room, "one"))
    path = f"/_matrix/client/v3/rooms/{quote(room)}"
    world.synapse.call("POST", f"{path}/invite", alice.token, {"user_id": bob.user_id})
    world.synapse.call("POST", f"{path}/join", bob.token, {})
    of_bob = RoomMember.objects.filter(user_id=bob.user_id)
    event_id = world.wait("the join", lambda: of_bob.values_list("event_id", flat=True).first())
    world.answer(alice, room, world.synapse.send(alice, room, "two"))
    assert _questions(alice) == ["one", "two"]
    assert _questions(bob) == ["two"]

    name = f"/_matrix/client/v3/profile/{quote(bob.user_id)}/displayname"
    world.synapse.call("PUT", name, bob.token, {"displayname": "Bobby"})
    world.wait("the new name", lambda: of_bob.exclude(event_id=event_id).exists())
    assert _questions(bob) == ["two"]
    # What it has not seen of the members it asks for.
    world.kill("bot", signal.SIGTERM)
    Room.objects.update(members_known=False)
    assert _questions(bob) == 404
    world.start("bot")
    world.wait("the members", Room.objects.filter(members_known=True).exists)
    assert (_questions(alice), _questions(bob)) == (["one", "two"], ["two"])

    world.synapse.call("POST", f"{path}/leave", bob.token, {})
    world.wait("the leave", lambda: not of_bob.exists())
    assert _questions(bob) == 404
    said = world.answer(alice, room, world.synapse.send(alice, room, "!forget"))
    assert said["body"] == "The conversation was deleted."
    assert not Thread.objects.exists()


def _questions(account: Account) -> Any:
    """What somebody reads over HTTP of the only thread; the status where that is nothing."""
    client = APIClient()
    client.force_authenticate(User.objects.of_matrix_id(account.user_id))
    response = client.get(f"/api/chat/threads/{Thread.objects.get().pk}/messages")
    if response.status_code != 200:
        return response.status_code
    told = response.json()["messages"]
    return [each["content"] for each in told if each["role"] == "user"]


def test_a_wrong_password_stops_it_with_one_clear_line(world: World) -> None:
    world.start("bot", BOT_RUNNER_PASSWORD="wrong")
    assert world.processes["bot"].wait(120) == 1
    lines = [line for line in world.log().splitlines() if "refused" in line]
    assert len(lines) == 1
    assert "BOT_RUNNER_PASSWORD" in lines[0]
    assert "Traceback" not in world.log()


def test_a_revoked_token_is_replaced_on_the_same_device(world: World, alice: Account) -> None:
    register(alice)
    world.start("worker", "bot")
    room = world.invite(alice)
    world.answer(alice, room, world.synapse.send(alice, room, "one"))
    before = Session.objects.get()

    # As an admin of the homeserver does it: every token, but not the devices' names of the bot.
    world.synapse.call("POST", "/_matrix/client/v3/logout", before.access_token, {})
    question = world.synapse.send(alice, room, "two")
    assert world.answer(alice, room, question)["body"] == "Handled prompt: two"
    after = Session.objects.get()
    assert after.access_token != before.access_token
    assert world.log().count("Logged in again") == 1


def test_a_refused_invitation_is_declined_and_may_be_repeated(
    world: World, alice: Account, account: Callable[[str], Account]
) -> None:
    bob = account("bob")
    register(bob)
    world.start("worker", "bot", BOT_RUNNER_ALLOWED_INVITERS=alice.user_id)
    room = world.synapse.create_room(bob, [world.bot_id])
    path = f"/_matrix/client/v3/rooms/{room}/state/m.room.member/{quote(world.bot_id)}"

    def membership() -> str:
        return str(world.synapse.call("GET", path, bob.token)["membership"])

    world.wait("the bot to decline", lambda: membership() == "leave")
    refused = Room.objects.get(room_id=room)
    assert refused.membership == Room.Membership.REFUSED
    assert refused.error == "BOT_RUNNER_ALLOWED_INVITERS does not name the inviter."
    assert world.kill("bot", signal.SIGTERM) == 0

    world.start("bot")
    world.synapse.invite(bob, room, world.bot_id)
    question = world.synapse.send(bob, room, "Hello")
    assert world.answer(bob, room, question)["body"] == "Handled prompt: Hello"


def test_an_empty_room_is_left_and_joined_again_on_an_invitation(
    world: World, alice: Account, account: Callable[[str], Account]
) -> None:
    register(alice)
    world.start("worker", "bot")
    bob = account("bob")
    room = world.invite(alice)
    used = world.invite(alice)
    for each in (room, used):
        world.synapse.invite(alice, each, bob.user_id)
        world.synapse.call("POST", f"/_matrix/client/v3/join/{each}", bob.token, {})
    # The room can be used again by someone who was invited before.
    world.synapse.call("POST", f"/_matrix/client/v3/rooms/{used}/leave", bob.token, {})
    world.synapse.invite(alice, used, bob.user_id)
    for each in (room, used):
        world.synapse.call("POST", f"/_matrix/client/v3/rooms/{each}/leave", alice.token, {})
    world.synapse.call("POST", f"/_matrix/client/v3/rooms/{room}/leave", bob.token, {})
    world.wait("the bot to leave", lambda: Room.objects.get(room_id=room).membership == "left")
    looked_at = Room.objects.filter(room_id=used, leave_due_at=None, membership="joined")
    world.wait("the bot to stay", looked_at.exists)

    world.synapse.call("POST", f"/_matrix/client/v3/join/{used}", bob.token, {})
    world.synapse.invite(bob, used, alice.user_id)
    world.synapse.call("POST", f"/_matrix/client/v3/join/{used}", alice.token, {})
    question = world.synapse.send(alice, used, "Hello")
    assert world.answer(alice, used, question)["body"] == "Handled prompt: Hello"
