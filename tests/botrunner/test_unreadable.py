"""Images, files, voice messages, stickers, polls and locations, which the bot does not read."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.utils import timezone

from agents.models import Run
from agents.runs import execution
from botrunner.incoming import unreadable
from botrunner.models import Reply, RoomEvent, Session
from botrunner.outgoing import queue
from realm.models import BotCommand
from tests.botrunner.person import Person, run
from tests.botrunner.scenes import ALICE, BOB, ME, command, event, let_in, session, take_in
from tests.botrunner.world import ENCRYPTION, World, register
from tests.synapse import Account

pytestmark = pytest.mark.django_db

POLL = "org.matrix.msc3381.poll.start"
IMAGE = {"msgtype": "m.image", "body": "cat.png", "url": "mxc://localhost/cat"}
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("m.room.message", IMAGE),
    ("m.room.message", {"msgtype": "m.file", "body": "a.pdf", "filename": "a.pdf"}),
    ("m.room.message", {"msgtype": "m.audio", "body": "Voice", "org.matrix.msc3245.voice": {}}),
    ("m.room.message", {"msgtype": "m.video", "body": "a.mp4"}),
    ("m.room.message", {"msgtype": "m.location", "body": "Here", "geo_uri": "geo:1,2"}),
    ("m.room.message", {**IMAGE, "body": "What is this?", "filename": "cat.png"}),
    ("m.sticker", {"body": "A cat", "url": "mxc://localhost/cat"}),
    (POLL, {POLL: {"question": {"org.matrix.msc1767.text": "Lunch?"}}}),
    ("m.poll.start", {"m.poll": {"question": {"m.text": [{"body": "Lunch?"}]}}}),
]


def direct(**filter_: Any) -> Session:
    """A room of Alice and the bot, which answers her."""
    command(**filter_)
    row = session()
    let_in(row, ALICE, ME)
    return row


def group(**filter_: Any) -> Session:
    row = direct(**filter_)
    let_in(row, BOB)
    return row


def notices() -> list[str]:
    return [reply.error for reply in Reply.objects.filter(run=None).order_by("id")]


@pytest.mark.parametrize(("type_", "content"), KINDS)
def test_in_a_direct_chat_it_is_answered_with_a_sentence(
    type_: str, content: dict[str, Any]
) -> None:
    row = direct()
    take_in(row, event(content, type=type_))
    assert notices() == [unreadable.SENTENCE]
    assert not Run.objects.exists()
    queue.compose(row)
    [part] = Reply.objects.get().parts
    assert part["msgtype"] == "m.notice"
    assert part["body"] == f"Sorry, I cannot do this. {unreadable.SENTENCE}"


def test_a_row_of_images_is_answered_once() -> None:
    row = direct()
    take_in(row, *(event(IMAGE) for _ in range(5)))
    for _ in range(5):
        take_in(row, event(IMAGE))
    assert notices() == [unreadable.SENTENCE]
    states = RoomEvent.objects.filter(content_type="m.image").order_by("id")
    assert [each.state for each in states] == ["handled"] + ["ignored"] * 9
    assert {each.note for each in states[1:]} == {unreadable.NOTE}

    Reply.objects.update(created_at=timezone.now() - 2 * unreadable.NOTICE_PAUSE)
    take_in(row, event(IMAGE))
    assert len(notices()) == 2


def test_texts_are_answered_before_and_after_images() -> None:
    row = direct()
    take_in(row, event("one"), event(IMAGE), event("two"))
    assert Run.objects.count() == 2


@pytest.mark.parametrize(("type_", "content"), KINDS)
def test_in_a_group_it_is_none_of_the_bots_business(type_: str, content: dict[str, Any]) -> None:
    row = group()
    take_in(row, event(content, type=type_))
    assert not Reply.objects.exists()
    assert RoomEvent.objects.filter(sender=ALICE).get().state == RoomEvent.State.IGNORED


@pytest.mark.parametrize("name", ["bot-runner.png", "!ask.png", ME])
def test_a_name_of_a_file_addresses_nobody(name: str) -> None:
    take_in(group(prefix="!ask"), event({**IMAGE, "body": name}))
    assert not Reply.objects.exists()


def reply_to(event_id: str) -> dict[str, Any]:
    return {"m.relates_to": {"m.in_reply_to": {"event_id": event_id}}}


def test_in_a_group_it_is_answered_where_it_addresses_the_bot() -> None:
    row = group()
    take_in(row, event("Hello"), event(in_thread("$root", msgtype="m.text", body="Hello")))
    for each in Run.objects.all():
        execution.execute(each.pk)
    reply = Reply.objects.earliest("id")
    Reply.objects.filter(pk=reply.pk).update(event_ids=["$answer"], status="sent")
    for content in (
        {**IMAGE, "m.mentions": {"user_ids": [ME]}},
        {**IMAGE, **reply_to("$answer")},
        in_thread("$root"),
        {**IMAGE, "filename": "cat.png", "body": "bot-runner: what is this?"},
    ):
        take_in(row, event(content))
        assert notices() == [unreadable.SENTENCE], content
        Reply.objects.filter(run=None).delete()
    for content in (
        {**IMAGE, "m.mentions": {"user_ids": [BOB]}},
        {**IMAGE, **reply_to("$other")},
        in_thread("$other"),
    ):
        take_in(row, event(content))
        assert notices() == [], content


def in_thread(root: str, **content: Any) -> dict[str, Any]:
    return {**IMAGE, **content, "m.relates_to": {"rel_type": "m.thread", "event_id": root}}


def test_a_caption_with_the_prefix_addresses_the_bot() -> None:
    row = group(prefix="!ask ")
    take_in(row, event({**IMAGE, "filename": "cat.png", "body": "!ask what is this?"}))
    assert notices() == [unreadable.SENTENCE]


def test_whoever_is_not_answered_gets_no_sentence() -> None:
    row = direct()
    take_in(row, event(IMAGE, BOB))
    BotCommand.objects.update(filter={**BotCommand.objects.get().filter, "content_type": "m.emote"})
    take_in(row, event(IMAGE))
    assert notices() == []


def test_notices_and_other_types_stay_unanswered() -> None:
    row = direct()
    take_in(
        row,
        event({"msgtype": "m.notice", "body": "x"}),
        event({}, type="m.reaction"),
        event({"body": "no type"}),
        event({"msgtype": "org.example.thing", "body": "x"}),
    )
    assert not Reply.objects.exists()


def test_a_command_for_images_from_before_gets_the_sentence_not_the_name() -> None:
    row = group(content_type="m.image")
    take_in(row, event(IMAGE))
    assert notices() == [unreadable.SENTENCE]
    assert not Run.objects.exists()


def test_an_old_image_is_not_answered(settings: Any) -> None:
    row = direct()
    take_in(row, event(IMAGE, age=timedelta(days=2).total_seconds()))
    assert notices() == []


@pytest.mark.system
def test_an_encrypted_image_and_a_poll_are_answered(
    world: World, alice: Account, tmp_path: Path
) -> None:
    register(alice)
    world.start("worker", "bot")
    room = world.invite(alice, initial_state=[ENCRYPTION])

    async def scene() -> None:
        async with Person(world.synapse, alice, tmp_path) as person:
            answer = await person.answer(await person.say(room, IMAGE))
            assert answer.decrypted
            assert unreadable.SENTENCE in answer.body

    run(scene())
    plain = world.invite(alice)
    poll = world.synapse.send(alice, plain, dict(KINDS[-2][1]), POLL)
    assert unreadable.SENTENCE in world.answer(alice, plain, poll)["body"]
