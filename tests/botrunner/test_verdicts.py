"""Why an event fired nothing: what is kept of it, and what is not."""

from datetime import UTC, datetime
from typing import Any

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext

from agents.models import Run
from botrunner.incoming import decryption, handling, recording, submission
from botrunner.incoming.batch import Batch, RoomUpdate
from botrunner.matrix.events import REPLY_FIELD
from botrunner.models import Reply, Room, RoomEvent
from botrunner.outgoing import queue
from botrunner.verdicts import MAX_VERDICTS
from realm.models import BotCommand, BotRegistration, User
from tests.botrunner.scenes import (
    ALICE,
    BOB,
    HOLDER,
    ME,
    ROOM,
    TRIGGER,
    command,
    event,
    session,
    take_in,
)

pytestmark = pytest.mark.django_db

SECRET = "my secret words"


def only() -> RoomEvent:
    return RoomEvent.objects.get()


def words() -> list[str]:
    return [verdict.reason for verdict in only().command_verdicts]


def test_what_fires_nothing_is_kept_without_its_words() -> None:
    found = command(prefix="!ask ")
    said = event(SECRET)
    assert take_in(session(), said) == 0

    row = only()
    assert (row.event_id, row.sender, row.room.room_id) == (said["event_id"], ALICE, ROOM)
    assert (row.type, row.content_type) == ("m.room.message", "m.text")
    assert (row.kind, row.state) == (RoomEvent.Kind.OTHER, RoomEvent.State.IGNORED)
    assert row.note == "The only command did not match."
    [verdict] = row.command_verdicts
    assert verdict.registration_id == str(found.registration_id)
    assert verdict.command_id == str(found.pk)
    assert verdict.command == "chat.reply"
    assert verdict.filter == "a message of type 'm.text' that begins with '!ask '"
    assert verdict.reason == "Its body does not begin with '!ask '."
    assert not verdict.fired
    stored = RoomEvent.objects.values_list().get()
    assert SECRET not in str(stored)


def test_what_fires_says_so_too() -> None:
    command(fires="ping", prefix="!ping")
    command(prefix="!ask ")
    take_in(session(), event("!ask what?"))
    row = only()
    assert row.state == RoomEvent.State.HANDLED
    assert [(each.command, each.fired, each.reason) for each in row.command_verdicts] == [
        ("chat.reply", True, "It fires."),
        ("ping", False, "Its body does not begin with '!ping'."),
    ]


@pytest.mark.parametrize(
    ("wanted", "said", "verdict"),
    [
        (
            TRIGGER,
            event(),
            "Its type is m.room.message, not app.boxel.bot-trigger.",
        ),
        (
            {},
            event({"msgtype": "m.image", "body": SECRET}),
            "Its content is of type 'm.image', not 'm.text'.",
        ),
        ({}, event({"body": SECRET}), "Its content is of type '', not 'm.text'."),
        ({"mention": True}, event(), "It does not mention the bot."),
        (
            TRIGGER,
            event({"type": "ping", "input": SECRET, "realm": "r"}, type="app.boxel.bot-trigger"),
            "The trigger has no 'userId' that is a string.",
        ),
        (
            TRIGGER,
            event({"type": "ping", "realm": "r", "userId": "u"}, type="app.boxel.bot-trigger"),
            "The trigger has no 'input'.",
        ),
    ],
)
def test_a_filter_says_what_it_missed(wanted: Any, said: Any, verdict: str) -> None:
    command(**wanted)
    BotRegistration.objects.update(created_at=datetime(2020, 1, 1, tzinfo=UTC))
    take_in(session(), said)
    assert words() == [verdict]
    assert SECRET not in str(RoomEvent.objects.values_list().get())


def test_an_event_from_before_the_registration_is_told_both_times() -> None:
    registration = command().registration
    BotRegistration.objects.update(created_at=datetime(2100, 1, 2, 3, 4, 5, 678900, tzinfo=UTC))
    said = event(origin_server_ts=4_000_000_000_123)
    take_in(session(), said)
    assert words() == [
        "Registered at 2100-01-02 03:04:05.678 UTC, after the event was sent at "
        "2096-10-02 07:06:40.123 UTC."
    ]
    assert registration.commands.count() == 1


def test_whoever_has_no_registration_is_told_so() -> None:
    command(BOB)
    take_in(session(), event(SECRET))
    assert only().note == f"Neither {ALICE} nor the bot has a registration."
    assert only().verdicts == []


def test_a_registration_without_commands_is_told() -> None:
    registration = command().registration
    registration.commands.all().delete()
    take_in(session(), event())
    [verdict] = only().command_verdicts
    assert (verdict.registration_id, verdict.command_id) == (str(registration.pk), "")
    assert verdict.reason == "The registration has no command."


def test_a_user_who_is_not_active_is_told() -> None:
    command()
    User.objects.update(is_active=False)
    take_in(session(), event())
    assert words() == ["The user of the registration is not active."]


def test_a_filter_that_makes_no_sense_is_told() -> None:
    found = command()
    BotCommand.objects.update(filter=found.filter | {"prefix": 7})
    take_in(session(), event())
    [verdict] = only().command_verdicts
    assert verdict.reason == "The filter is invalid."
    assert verdict.filter.startswith("never: prefix: It must be")


def test_the_same_command_of_the_bot_is_told_to_have_fired_already() -> None:
    command(ALICE)
    command(ME)
    take_in(session(), event())
    assert words() == ["It fires.", "The same command has fired already."]
    assert Run.objects.count() == 1


def test_what_is_too_old_is_told(settings: Any) -> None:
    settings.BOT_RUNNER_MAX_EVENT_AGE = 60
    command()
    assert take_in(session(), event(SECRET, age=120)) == 0
    assert only().note.startswith("Too old: sent at ")
    assert only().source is None


@pytest.mark.parametrize(
    ("said", "note"),
    [
        (
            event(
                {
                    "msgtype": "m.text",
                    "body": SECRET,
                    "m.relates_to": {"rel_type": "m.replace", "event_id": "$unknown"},
                }
            ),
            "It edits no message that fired a command.",
        ),
        (
            event({"redacts": "$unknown"}, type="m.room.redaction"),
            "It redacts no message that fired a command.",
        ),
        (
            event({}, type="m.room.redaction"),
            "It redacts no message that fired a command.",
        ),
    ],
)
def test_an_edit_or_redaction_of_nothing_is_told(said: Any, note: str) -> None:
    command()
    assert take_in(session(), said) == 0
    assert (only().note, only().source) == (note, None)


def test_an_edit_that_makes_no_question_of_a_remark_is_none() -> None:
    command(prefix="!ask ")
    row = session()
    remark = event(SECRET)
    new = {"msgtype": "m.text", "body": "another remark"}
    relation = {"rel_type": "m.replace", "event_id": remark["event_id"]}
    take_in(row, remark)
    edit = event({**new, "m.new_content": new, "m.relates_to": relation})
    assert take_in(row, edit) == 0
    assert not Run.objects.exists()


def test_an_edit_of_what_is_gone_is_told_without_its_words() -> None:
    command()
    row = session()
    said = event("first")
    take_in(row, said, event({}, type="m.room.redaction", redacts=said["event_id"]))
    new = {"msgtype": "m.text", "body": SECRET}
    relation = {"rel_type": "m.replace", "event_id": said["event_id"]}
    take_in(row, event({**new, "m.new_content": new, "m.relates_to": relation}))
    edit = RoomEvent.objects.get(kind=RoomEvent.Kind.EDIT)
    assert (edit.note, edit.source) == (
        "It edits no message that is still there, or leaves nothing of it.",
        None,
    )


def test_what_cannot_be_read_is_told_until_and_after_its_key_comes() -> None:
    command(prefix="!ask ")
    sealed = event({"ciphertext": "..."}, type="m.room.encrypted")
    assert take_in(session(), sealed) == 1
    assert only().note == "Waiting for its key."

    opened = {**event(SECRET), "event_id": sealed["event_id"]}
    decryption.record_decrypted(only().pk, opened, ME)
    assert words() == ["Its body does not begin with '!ask '."]
    row = only()
    assert (row.kind, row.state) == (RoomEvent.Kind.OTHER, RoomEvent.State.IGNORED)
    assert (row.type, row.content_type, row.source) == ("m.room.message", "m.text", None)
    assert decryption.undecrypted() == []


def test_the_key_of_a_notice_makes_it_no_question() -> None:
    command()
    sealed = event({"ciphertext": "..."}, type="m.room.encrypted")
    take_in(session(), sealed)
    decryption.record_decrypted(only().pk, event({"msgtype": "m.notice", "body": SECRET}), ME)
    row = only()
    assert (row.state, row.source) == (RoomEvent.State.IGNORED, None)


def test_a_key_that_never_came_is_told(settings: Any) -> None:
    settings.BOT_RUNNER_MAX_EVENT_AGE = 600
    take_in(session(), event({"ciphertext": "..."}, type="m.room.encrypted"))
    RoomEvent.objects.update(sent_at=datetime(2020, 1, 1, tzinfo=UTC))
    assert decryption.undecrypted() == []
    assert (only().note, only().source) == ("Its key was never received.", None)


def test_what_was_said_before_the_bot_came_is_told() -> None:
    command()
    row = session()
    earlier = [event(SECRET), event(sender=ME), event({"msgtype": "m.notice", "body": "n"})]
    news = RoomUpdate("!new", [event("now")], False, earlier)
    assert recording.record_sync(row, HOLDER, Batch("s1", [news])) == 1
    before = RoomEvent.objects.get(state=RoomEvent.State.IGNORED)
    assert before.note == "Sent before the bot joined the room."
    assert (before.event_id, before.source) == (earlier[0]["event_id"], None)


@pytest.mark.parametrize(
    "said",
    [
        event(sender=ME),
        event({"msgtype": "m.notice", "body": "notice"}),
        event({"msgtype": "m.text", "body": "a bot", REPLY_FIELD: {}}),
        event({"m.relates_to": {}}, type="m.reaction"),
        event() | {"sender": "@nul\x00:localhost"},
        event() | {"event_id": "$\ud800"},
    ],
)
def test_bots_and_what_nobody_says_leave_no_trace(said: Any) -> None:
    command()
    take_in(session(), said)
    assert not RoomEvent.objects.exists()


def test_very_many_commands_do_not_fill_the_database() -> None:
    for number in range(MAX_VERDICTS + 10):
        command(prefix=f"!{number:02}")
    take_in(session(), event("!29"))
    verdicts = only().command_verdicts
    assert len(verdicts) == MAX_VERDICTS
    assert [each.fired for each in verdicts] == [True] + [False] * (MAX_VERDICTS - 1)


def test_what_a_disabled_registration_would_fire_is_not_fired() -> None:
    registration = command().registration
    BotRegistration.objects.filter(pk=registration.pk).disable()
    take_in(session(), event())
    assert words() == ["The registration is disabled."]
    assert not Run.objects.exists()


def test_what_waits_when_a_registration_is_disabled_is_not_fired() -> None:
    command()
    row = session()
    batch = Batch("s1", [RoomUpdate(ROOM, [event(SECRET)], False)])
    assert recording.record_sync(row, HOLDER, batch) == 1
    BotRegistration.objects.all().disable()
    [pk] = handling.pending()
    handling.handle(pk, ME)

    assert not Run.objects.exists()
    assert words() == ["The registration is disabled."]
    assert only().state == RoomEvent.State.IGNORED
    assert only().note.startswith("Its command no longer matches.")
    assert only().source is None


def test_another_registration_fires_in_place_of_the_disabled_one() -> None:
    first = command(ALICE)
    BotRegistration.objects.all().disable()
    second = command(ME)
    take_in(session(), event())
    assert Reply.objects.get().bot_command == second
    assert [each.command_id for each in only().command_verdicts if each.fired] == [str(second.pk)]
    assert first.replies.count() == 0


def test_an_enabled_registration_fires_again() -> None:
    command()
    row = session()
    BotRegistration.objects.all().disable()
    take_in(row, event("unheard"))
    BotRegistration.objects.all().enable()
    take_in(row, event("match"))
    assert Run.objects.get().message.content == "match"


def test_what_cannot_be_handled_stands_apart() -> None:
    command()
    row = session()
    batch = Batch("s1", [RoomUpdate(ROOM, [event()], False)])
    recording.record_sync(row, HOLDER, batch)
    handling.give_up(only().pk)
    assert (only().state, handling.pending()) == (RoomEvent.State.FAILED, [])
    assert only().source is not None


@pytest.mark.parametrize(("rooms", "events"), [(1, 1), (5, 20)])
def test_a_batch_costs_the_same_however_long(rooms: int, events: int) -> None:
    command(prefix="!ask ")
    command(ME, prefix="!bot")
    row = session()
    names = [f"!room{number}" for number in range(rooms)]
    Room.objects.bulk_create(
        Room(session=row, room_id=name, membership=Room.Membership.JOINED) for name in names
    )
    said = [RoomUpdate(name, [event("other") for _ in range(events)], False) for name in names]
    with CaptureQueriesContext(
        connection,
    ) as queries:
        recording.record_sync(row, HOLDER, Batch("s1", said))
    told = [query["sql"] for query in queries if query["sql"].startswith(("SELECT", "UPDATE"))]
    assert len(told) == 3  # the position, the rooms, registrations with users and commands
    assert RoomEvent.objects.count() == rooms * events


class TestLimits:
    def test_a_refusal_is_the_events_outcome_and_said_in_the_room(self, settings: Any) -> None:
        settings.LIMIT_USER_MESSAGES_PER_MINUTE = 1
        command()
        take_in(row := session(), event("one"))
        take_in(row, refused := event("two"))
        assert Run.objects.count() == 1
        found = RoomEvent.objects.get(event_id=refused["event_id"])
        assert found.state == RoomEvent.State.HANDLED
        assert found.note.startswith("Refused (rate_limited): You may send 1 message a minute.")
        reply = Reply.objects.get(message=found)
        assert (reply.run, reply.status) == (None, Reply.Status.WAITING)
        [part] = queue.contents(reply)
        assert part["msgtype"] == "m.notice"
        assert "You may send 1 message a minute." in part["body"]

    def test_a_flood_is_answered_with_one_sentence_for_each_person(
        self, settings: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(submission.NOTICE_SECONDS, "rate_limited", 10**9)
        settings.LIMIT_ROOM_MESSAGES_PER_MINUTE = 1
        command()
        command(BOB)
        row = session()
        for number in range(10):
            take_in(row, event(f"{number}"), event(f"{number}", sender=BOB))
        assert Run.objects.count() == 1
        told = Reply.objects.filter(run=None).values_list("message__sender", flat=True)
        assert sorted(told) == [ALICE, BOB]
        assert RoomEvent.objects.filter(note__startswith="Refused (rate_limited)").count() == 19
        unsaid = RoomEvent.objects.filter(state="ignored", source__isnull=True)
        assert unsaid.count() == 17

    def test_limits_hold_for_who_speaks_and_not_for_whose_the_command_is(
        self, settings: Any
    ) -> None:
        settings.LIMIT_USER_MESSAGES_PER_MINUTE = 1
        command(ME)
        take_in(session(), event("one"), event("two", sender=BOB))
        assert set(Run.objects.values_list("requester", flat=True)) == {ALICE, BOB}
