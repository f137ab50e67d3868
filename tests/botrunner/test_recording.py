"""What is said in a room, up to the run that answers it. Without a homeserver."""

import json
from typing import Any

import pytest
from django.db import IntegrityError
from django.utils import timezone

from agents.models import Run
from agents.runs import execution
from botrunner.incoming import decryption, handling, recording, submission
from botrunner.incoming.batch import Batch, Invitation, RoomUpdate
from botrunner.matrix.events import REPLY_FIELD, TimelineEvent, since_own_join
from botrunner.models import Conversation, LeaseLost, Reply, Room, RoomEvent, Session
from botrunner.outgoing import queue
from chat.models import Message
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
from tests.fakes.llm import FakeLLM
from tests.fakes.llm import Reply as Reply_

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True, params=[recording.MAX_SUBMITTED, 0], ids=["at once", "one by one"])
def _at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is told here holds however the questions are asked."""
    monkeypatch.setattr(recording, "MAX_SUBMITTED", request.param)


def questions() -> list[str]:
    return list(Message.objects.order_by("created_at").values_list("content", flat=True))


def test_a_message_that_passes_a_filter_becomes_a_run() -> None:
    command()
    said = event("How are you?")
    assert take_in(session(), said) == 1

    run = Run.objects.get()
    assert (run.source, run.command, run.correlation_id) == (
        "matrix",
        "chat.reply",
        said["event_id"],
    )
    assert run.input["sender"] == ALICE
    assert run.input["roomId"] == ROOM
    assert run.message.content == "How are you?"
    assert run.replies.get().status == Reply.Status.WAITING
    assert (run.thread.owner, run.thread.room_id, run.requester) == (None, ROOM, ALICE)


def test_the_same_event_is_taken_in_once() -> None:
    command()
    said = event()
    row = session()
    take_in(row, said)
    take_in(row, said)
    assert Run.objects.count() == 1


def test_what_is_known_keeps_nothing_new_from_being_asked() -> None:
    command()
    said = event("known")
    row = session()
    take_in(row, said)
    take_in(row, said, event("new"))
    assert questions() == ["known", "new"]


def test_what_is_redacted_in_the_same_breath_is_not_answered() -> None:
    command()
    said = event("rash")
    take_in(session(), said, event({"redacts": said["event_id"]}, type="m.room.redaction"))
    assert Run.objects.get().status == Run.Status.CANCELLED


def test_events_and_position_are_written_together(monkeypatch: pytest.MonkeyPatch) -> None:
    command()
    row = session()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise IntegrityError

    monkeypatch.setattr(RoomEvent.objects, "bulk_create", fail)
    with pytest.raises(IntegrityError):
        take_in(row, event())
    assert Session.objects.get().since == "s0"


def test_whoever_lost_the_lease_writes_nothing() -> None:
    command()
    row = session()
    Session.objects.update(holder="another")
    with pytest.raises(LeaseLost):
        take_in(row, event())
    assert not RoomEvent.objects.exists()


def test_whoever_is_behind_writes_nothing() -> None:
    command()
    row = session()
    Session.objects.update(since="s5")
    with pytest.raises(LeaseLost):
        take_in(row, event())


@pytest.mark.parametrize(
    "said",
    [
        event(sender=ME),
        event(sender=BOB),
        event({"msgtype": "m.notice", "body": "notice"}),
        event({"msgtype": "m.image", "body": "image.png"}),
        event({"body": "no msgtype"}),
        event({"msgtype": "m.text", "body": "a bot", REPLY_FIELD: {}}),
        event("a piece of state", state_key=""),
        event("no sender", sender=None),  # type: ignore[arg-type]
        event("no time", origin_server_ts="yesterday"),
        event("time out of range", origin_server_ts=10**18),
        event() | {"content": None},
        event(
            {
                "msgtype": "m.text",
                "body": "edit of another message",
                "m.relates_to": {"rel_type": "m.replace", "event_id": "$x"},
            }
        ),
        event({"redacts": "$x"}, type="m.room.redaction"),
        {"type": "m.room.message"},
        "nonsense",
    ],
)
def test_what_is_not_for_the_bot_leaves_nothing_to_do(said: Any) -> None:
    registration = command().registration
    registration.created_at = registration.created_at.replace(year=2000)
    registration.save()
    assert take_in(session(), said) == 0
    assert not RoomEvent.objects.exclude(state=RoomEvent.State.IGNORED, source=None).exists()
    assert not Run.objects.exists()


def test_what_is_older_than_the_registration_fires_nothing() -> None:
    command()
    assert take_in(session(), event(age=5)) == 0


def test_what_is_too_old_is_left_unanswered(settings: Any) -> None:
    found = command()
    found.registration.created_at = found.created_at.replace(year=2000)
    found.registration.save()
    settings.BOT_RUNNER_MAX_EVENT_AGE = 60
    row = session()
    take_in(row, event("old", age=120), event("young", age=30))
    assert questions() == ["young"]


def test_ignored_senders_are_ignored(settings: Any) -> None:
    command("@other-bot:localhost")
    settings.BOT_RUNNER_IGNORED_SENDERS = ["@*-bot:localhost"]
    assert take_in(session(), event(sender="@other-bot:localhost")) == 0


def test_the_bots_own_registration_counts_for_everybody_once() -> None:
    command(ME)
    command(ALICE)
    command(ALICE)
    take_in(session(), event(sender=ALICE), event(sender=BOB))
    owners = Run.objects.order_by("position").values_list(
        "replies__registration__username", flat=True
    )
    assert list(owners) == [ALICE, ME]


def test_a_user_who_is_not_active_fires_nothing() -> None:
    found = command()
    found.registration.user.is_active = False
    found.registration.user.save()
    assert take_in(session(), event()) == 0


@pytest.mark.parametrize(
    ("wanted", "content", "question"),
    [
        ({"prefix": "!bot"}, "!bot  what?", "what?"),
        ({"prefix": "!bot"}, "what?", None),
        ({"mention": True}, {"m.mentions": {"user_ids": [ME]}, "body": f"{ME}: what?"}, "what?"),
        ({"mention": True}, {"m.mentions": {"user_ids": [ME]}, "body": "what, bot?"}, "what, bot?"),
        ({"mention": True}, {"m.mentions": {}, "body": f"{ME}: what?"}, None),
        ({"mention": True}, "bot-runner: from a bridge", "from a bridge"),
        ({"mention": True}, "bot-runner2: another one", None),
        ({}, {"m.relates_to": {"m.in_reply_to": {}}, "body": "> <@a:b> old\n> more\n\nnew"}, "new"),
    ],
)
def test_prefix_and_mention(wanted: Any, content: Any, question: str | None) -> None:
    command(**wanted)
    if isinstance(content, dict):
        content = {"msgtype": "m.text", **content}
    take_in(session(), event(content))
    assert questions() == ([question] if question else [])


@pytest.mark.parametrize(
    ("content", "question"),
    [
        ({"type": "ping", "input": "x", "realm": "r", "userId": ALICE}, "x"),
        ({"type": "ping", "input": {"prompt": "p"}, "realm": "r", "userId": ALICE}, "p"),
        ({"type": "ping", "input": {"a": 1}, "realm": "r", "userId": ALICE}, '{"a":1}'),
        ({"type": "ping", "input": None, "realm": "r", "userId": ALICE}, "ping"),
        ({"type": "pong", "input": "x", "realm": "r", "userId": ALICE}, None),
        ({"type": "ping", "realm": "r", "userId": ALICE}, None),
        ({"type": "ping", "input": "x", "realm": 1, "userId": ALICE}, None),
        ({"type": "ping", "input": "x", "realm": "r"}, None),
    ],
)
def test_triggers(content: Any, question: str | None) -> None:
    command(fires="ping", **TRIGGER)
    take_in(session(), event(content, type="app.boxel.bot-trigger"))
    assert questions() == ([question] if question else [])


def test_a_message_of_a_kind_of_its_own_passes_a_filter_for_that() -> None:
    command(content_type="com.example.order")
    take_in(session(), event("text"), event({"msgtype": "com.example.order", "body": "two teas"}))
    assert questions() == ["two teas"]


def test_two_commands_make_two_runs() -> None:
    command(fires="ping")
    command(fires="chat.reply")
    take_in(session(), event())
    assert set(Run.objects.values_list("command", flat=True)) == {"ping", "chat.reply"}


def test_an_empty_question_is_refused_in_plain_words() -> None:
    command(prefix="!bot")
    take_in(session(), event("!bot"))
    reply = Reply.objects.get()
    assert (reply.run, reply.status) == (None, Reply.Status.WAITING)
    assert reply.error == "Write your message after !bot, for example: !bot What can you do?"


def test_a_matrix_thread_has_a_thread_of_its_own() -> None:
    command()
    row = session()
    relation = {"m.relates_to": {"rel_type": "m.thread", "event_id": "$root"}}
    take_in(row, event("1"), event("2"), event({"msgtype": "m.text", "body": "3", **relation}))
    found = dict(Conversation.objects.values_list("root", "thread__turns"))
    assert found == {"": 2, "$root": 1}


def test_what_no_database_can_hold_is_left_out() -> None:
    command()
    take_in(session(), event({"msgtype": "m.text", "body": "a\0b", "x\0": ["\ud800"]}))
    assert questions() == ["ab"]
    assert RoomEvent.objects.get().source["content"]["body"] == "ab"


def edit(target: dict[str, Any], text: str, sender: str = ALICE) -> dict[str, Any]:
    new = {"msgtype": "m.text", "body": text}
    relation = {"rel_type": "m.replace", "event_id": target["event_id"]}
    return event(
        {**new, "body": f"* {text}", "m.new_content": new, "m.relates_to": relation}, sender
    )


def test_an_edit_changes_a_question_that_waits() -> None:
    command(prefix="!bot")
    row = session()
    said = event("!bot wrogn")
    take_in(row, said, edit(said, "!bot wrong"))
    take_in(row, edit(said, "!bot right"))
    assert questions() == ["right"]
    assert Run.objects.count() == 1


class TestAnEditThatMakesAQuestion:
    def test_of_what_was_none_is_answered_once(self) -> None:
        command(prefix="!ask ")
        row = session()
        said = event("!aks what?")
        take_in(row, said)
        take_in(row, edit(said, "!ask what?"))
        assert questions() == ["what?"]
        assert Reply.objects.get().message.event_id == said["event_id"]
        take_in(row, edit(said, "!ask what now?"))
        assert questions() == ["what now?"]
        assert Run.objects.count() == 1

    def test_in_the_same_sync(self) -> None:
        command(prefix="!ask ")
        said = event("!aks what?")
        take_in(session(), said, edit(said, "!ask what?"))
        assert questions() == ["what?"]

    def test_of_a_prefix_alone(self) -> None:
        command(prefix="!ask ")
        row = session()
        said = event("!ask")
        take_in(row, said)
        take_in(row, edit(said, "!ask what?"))
        assert questions() == ["what?"]

    def test_not_by_another(self) -> None:
        command(ALICE, prefix="!ask ")
        command(BOB, prefix="!ask ")
        row = session()
        said = event("!aks what?")
        take_in(row, said)
        take_in(row, edit(said, "!ask what?", BOB))
        assert questions() == []

    def test_not_of_what_is_old(self, settings: Any) -> None:
        settings.BOT_RUNNER_MAX_EVENT_AGE = 3600
        command(prefix="!ask ")
        row = session()
        said = event("!aks what?", age=7200)
        take_in(row, said)
        take_in(row, edit(said, "!ask what?"))
        assert questions() == []

    def test_not_of_what_was_never_recorded(self) -> None:
        command(prefix="!ask ")
        take_in(session(), edit(event("!aks what?"), "!ask what?"))
        assert questions() == []

    def test_that_is_none_after_all_leaves_no_words(self) -> None:
        command(prefix="!ask ")
        said = event("!aks what?")
        take_in(session(), said, edit(said, "never mind"))
        assert set(RoomEvent.objects.values_list("source", flat=True)) == {None}


def test_an_edit_by_somebody_else_changes_nothing() -> None:
    command()
    row = session()
    said = event("mine")
    take_in(row, said, edit(said, "yours", BOB))
    assert questions() == ["mine"]


def test_an_edit_of_a_message_whose_run_has_begun_changes_the_thread(model: FakeLLM) -> None:
    command()
    row = session()
    said = event("first")
    take_in(row, said)
    execution.execute(Run.objects.get().pk)
    take_in(row, edit(said, "second"), event("third"))
    execution.execute(Run.objects.latest("position").pk)
    sent = [each["content"] for each in model.requests[-1].messages]
    assert sent == ["second", "Answer to: first", "third"]


def test_a_redacted_message_leaves_the_thread_and_the_record_of_its_event(model: FakeLLM) -> None:
    command()
    row = session()
    said = event("The code is 4711")
    take_in(row, said)
    execution.execute(Run.objects.get().pk)
    take_in(row, event({}, type="m.room.redaction", redacts=said["event_id"]), event("And?"))
    execution.execute(Run.objects.latest("position").pk)

    assert [each["content"] for each in model.requests[-1].messages] == ["And?"]
    assert questions()[:3] == ["", "", "And?"]
    recorded = RoomEvent.objects.get(event_id=said["event_id"])
    assert recorded.source
    assert recorded.source["content"] == {}
    take_in(row, edit(said, "4711 again"))
    assert questions()[:3] == ["", "", "And?"]


def test_a_redaction_cancels() -> None:
    command()
    row = session()
    said = event()
    take_in(row, said)
    redaction = event({}, type="m.room.redaction", redacts=said["event_id"])
    take_in(row, redaction)
    assert Run.objects.get().status == Run.Status.CANCELLED
    assert Reply.objects.get().status == Reply.Status.DROPPED


def test_an_answer_that_is_redacted_leaves_the_thread(model: FakeLLM) -> None:
    command()
    row = session()
    model.script(Reply_("4711"))
    take_in(row, event("Which code?"))
    execution.execute(Run.objects.get().pk)
    Reply.objects.update(event_ids=["$part1", "$part2"], status=Reply.Status.SENT)
    redaction = event({}, BOB, type="m.room.redaction", redacts="$part2")
    assert take_in(row, event({}, BOB, type="m.room.redaction", redacts="$x"), redaction) == 1
    assert questions() == ["Which code?", ""]
    take_in(row, event("And?"))
    execution.execute(Run.objects.latest("position").pk)
    assert "4711" not in str(model.requests[-1].messages)


def test_a_redaction_counts_late_and_without_the_record_of_the_message(settings: Any) -> None:
    settings.BOT_RUNNER_MAX_EVENT_AGE = 60
    command()
    row = session()
    said = event("4711")
    take_in(row, said)
    execution.execute(Run.objects.get().pk)
    RoomEvent.objects.all().delete()
    take_in(row, event({}, type="m.room.redaction", redacts=said["event_id"], age=120))
    assert questions() == ["", ""]


def test_a_redaction_in_newer_rooms_names_its_event_in_the_content() -> None:
    command()
    row = session()
    said = event()
    take_in(row, said, event({"redacts": said["event_id"]}, type="m.room.redaction"))
    assert Run.objects.get().status == Run.Status.CANCELLED


def test_what_is_said_in_another_room_changes_nothing() -> None:
    """Neither its words, which the room of the question does not see, nor its redactions, which the
    power in that other room has allowed."""
    command()
    row = session()
    said = event("mine")
    take_in(row, said)
    redaction = event({}, BOB, type="m.room.redaction", redacts=said["event_id"])
    for each in (edit(said, "unseen"), redaction):
        batch = Batch(f"{row.since}+", [RoomUpdate("!other", [each], False)])
        recording.record_sync(row, HOLDER, batch)
        row.since = batch.next_batch
        for pk in handling.pending():
            handling.handle(pk, ME)
    assert questions() == ["mine"]
    assert Run.objects.get().status == Run.Status.QUEUED


class TestCancelling:
    """`!cancel`, said in a room."""

    THREAD = {"m.relates_to": {"rel_type": "m.thread", "event_id": "$root"}}

    def states(self, *said: Any) -> list[str]:
        """Of the runs, after Alice and Bob may ask anything."""
        command(ALICE)
        command(BOB)
        take_in(session(), *said)
        return list(Run.objects.order_by("pk").values_list("status", flat=True))

    @pytest.mark.parametrize(
        "words", ["!cancel", " !Cancel ", f"{ME}: !cancel", "bot-runner !cancel"]
    )
    def test_whoever_asked_may(self, words: str) -> None:
        assert self.states(event(), event(words)) == ["cancelled"]
        assert Reply.objects.get().status == Reply.Status.WAITING

    def test_all_that_they_asked_there(self) -> None:
        assert self.states(event("1"), event("2"), event("!cancel")) == ["cancelled", "cancelled"]

    def test_nobody_else_may(self) -> None:
        assert self.states(event(), event("!cancel", BOB)) == ["queued"]

    @pytest.mark.parametrize("by", ["!cancel", "redaction"])
    @pytest.mark.parametrize("between", [[], ["between"]])
    def test_not_what_answers_somebody_else_too(
        self, settings: Any, by: str, between: list[str]
    ) -> None:
        settings.CHAT_WHEN_BUSY = "merge"
        asked = event("last", BOB)
        said = [event("Hello"), *(event(words, BOB) for words in between), asked]
        self.states(*said)
        redaction = event({"redacts": asked["event_id"]}, BOB, type="m.room.redaction")
        end = event("!cancel", BOB) if by == "!cancel" else redaction
        take_in(Session.objects.get(), end)

        answers = Run.objects.latest("position")
        assert answers.status == "queued"
        assert answers.replies.get().status == Reply.Status.WAITING

    def test_a_thread_is_a_place_of_its_own(self) -> None:
        there = {"msgtype": "m.text", "body": "Hello", **self.THREAD}
        assert self.states(event(there), event("!cancel")) == ["queued"]
        take_in(Session.objects.get(), event({**there, "body": "!cancel"}))
        assert Run.objects.get().status == "cancelled"

    def cancelled_by(self, *, draft: str = "", **relation: Any) -> list[str]:
        """The messages whose runs a `!cancel` with a relation ends, of `one` and `two`."""
        one, two = event("one"), event("two")
        self.states(one, two)
        if draft:
            written = Reply.objects.filter(message__event_id=two["event_id"])
            written.update(draft_id=draft, drafted_at=timezone.now())
        target = {"one": one["event_id"], "two": two["event_id"]}
        content = json.dumps({"m.relates_to": relation})
        for name, event_id in target.items():
            content = content.replace(f'"${name}"', f'"{event_id}"')
        command = {"msgtype": "m.text", "body": "!cancel", **json.loads(content)}
        take_in(Session.objects.get(), event(command))
        ended = Run.objects.filter(status="cancelled", merged_into=None)
        return list(ended.order_by("position").values_list("message__content", flat=True))

    def test_in_a_thread_begun_on_a_question_that_question(self) -> None:
        assert self.cancelled_by(rel_type="m.thread", event_id="$one") == ["one"]

    def test_in_a_thread_with_a_fallback_that_question(self) -> None:
        fallback = {"is_falling_back": True, "m.in_reply_to": {"event_id": "$one"}}
        assert self.cancelled_by(rel_type="m.thread", event_id="$one", **fallback) == ["one"]

    def test_in_a_reply_the_question_replied_to(self) -> None:
        assert self.cancelled_by(**{"m.in_reply_to": {"event_id": "$two"}}) == ["two"]

    def test_in_a_reply_to_something_else_all(self) -> None:
        assert self.cancelled_by(**{"m.in_reply_to": {"event_id": "$x"}}) == ["one", "two"]

    def test_in_a_thread_on_or_a_reply_to_an_unfinished_answer_that(self) -> None:
        relation = {"rel_type": "m.thread", "event_id": "$draft"}
        assert self.cancelled_by(draft="$draft", **relation) == ["two"]

    def test_in_a_thread_on_a_merged_question_the_run_that_answers_it(self, settings: Any) -> None:
        settings.CHAT_WHEN_BUSY = "merge"
        assert self.cancelled_by(rel_type="m.thread", event_id="$one") == ["two"]

    def test_in_a_thread_on_the_question_of_another_nothing(self) -> None:
        question = event("Hello")
        there = {"rel_type": "m.thread", "event_id": question["event_id"]}
        content = {"msgtype": "m.text", "body": "!cancel", "m.relates_to": there}
        assert self.states(question, event(content, BOB)) == ["queued"]

    def test_who_has_nothing_to_cancel_is_told(self) -> None:
        assert self.states(event("!cancel")) == []
        queue.compose(Session.objects.get())
        body = Reply.objects.get().parts[0]["body"]
        assert body == "Sorry, I cannot do this. You have nothing running here."

    def test_what_another_bot_may_be_meant_by_is_let_be(self) -> None:
        take_in(session(), event("!cancel"))
        said = RoomEvent.objects.get()
        assert (said.state, said.note) == ("ignored", "There was nothing to cancel.")
        assert not Reply.objects.exists()

    def test_words_that_only_hold_it_are_a_question(self) -> None:
        assert self.states(event("What does !cancel do?")) == ["queued"]


@pytest.mark.parametrize("root", ["$" * 256, "", 5, None])
def test_a_thread_of_a_root_that_is_no_event_is_none(root: Any) -> None:
    command()
    take_in(
        session(),
        event(
            {
                "msgtype": "m.text",
                "body": "Hi",
                "m.relates_to": {"rel_type": "m.thread", "event_id": root},
            }
        ),
    )
    assert Conversation.objects.get().root == ""
    assert RoomEvent.objects.get().state == "handled"


def test_a_sealed_event_waits_for_its_key() -> None:
    command()
    row = session()
    sealed = event({"ciphertext": "..."}, type="m.room.encrypted")
    take_in(row, sealed)
    [(pk, room_id, source)] = decryption.undecrypted()
    assert (room_id, source["event_id"]) == (ROOM, sealed["event_id"])

    opened = {**event("at last"), "event_id": sealed["event_id"]}
    decryption.record_decrypted(pk, opened, ME)
    take_in(row)
    assert questions() == ["at last"]


@pytest.mark.parametrize(
    "odd",
    ["NaN", "1e999", "-Infinity", "[" * 500 + "]" * 500, '{"a":' * 500 + "1" + "}" * 500],
    ids=["NaN", "large", "infinite", "deep list", "deep object"],
)
def test_what_no_database_holds_is_left_out(odd: str) -> None:
    command()
    content = json.loads(f'{{"msgtype": "m.text", "body": "Hello", "odd": {odd}, "even": [1.5]}}')
    take_in(session(), event(content))
    run = Run.objects.get()
    assert run.input["content"]["even"] == [1.5]
    assert len(json.dumps(run.input)) < 1500
    assert RoomEvent.objects.get().state == "handled"


def test_whoever_opens_a_sealed_event_too_late_changes_nothing() -> None:
    command()
    row = session()
    sealed = event({"ciphertext": "..."}, type="m.room.encrypted")
    take_in(row, sealed)
    pk = decryption.undecrypted()[0][0]
    opened = {**event("once"), "event_id": sealed["event_id"]}
    decryption.record_decrypted(pk, opened, ME)
    take_in(row)
    decryption.record_decrypted(pk, opened, ME)
    take_in(row)
    assert questions() == ["once"]
    assert RoomEvent.objects.get().state == "handled"


def test_a_sealed_event_that_fires_nothing_is_forgotten() -> None:
    row = session()
    sealed = event({"ciphertext": "..."}, type="m.room.encrypted")
    take_in(row, sealed)
    decryption.record_decrypted(decryption.undecrypted()[0][0], event(), ME)
    assert decryption.undecrypted() == []


def test_membership_follows_the_sync(settings: Any) -> None:
    settings.BOT_RUNNER_ALLOWED_INVITERS = ["@*:localhost"]
    row = session()
    batch = Batch(
        "s1",
        [RoomUpdate("!new", [], True)],
        [Invitation("!a", ALICE), Invitation("!b", "@eve:evil.example")],
        [ROOM],
    )
    recording.record_sync(row, HOLDER, batch)
    found = dict(Room.objects.values_list("room_id", "membership"))
    assert found == {"!new": "joined", "!a": "invited", "!b": "refused", ROOM: "left"}
    assert Room.objects.get(room_id="!new").is_encrypted


def test_encryption_is_never_switched_off() -> None:
    row = session()
    Room.objects.update(is_encrypted=True)
    take_in(row)
    assert Room.objects.get().is_encrypted


def test_only_what_follows_the_own_join_counts() -> None:
    def member(user_id: str, membership: str, before: str = "") -> dict[str, Any]:
        unsigned = {"prev_content": {"membership": before}} if before else {}
        content = {"membership": membership}
        return event(content, user_id, type="m.room.member", state_key=user_id, unsigned=unsigned)

    join, renamed = member(ME, "join", "invite"), member(ME, "join", "join")
    old, new, newer = event("old"), event("new"), event("newer")
    kept = list(since_own_join([old, join, new, renamed, newer], ME))
    assert kept == [new, renamed, newer]
    assert list(since_own_join([old, member(ALICE, "join"), new], ME)) == []


@pytest.mark.parametrize("target", ["$a\0b", "$" + "x" * 300, "", 7])
def test_what_changes_an_event_that_can_be_none_changes_nothing(target: Any) -> None:
    """PostgreSQL takes no such id, even to look for it: the sync would come again for ever."""
    edit = {"body": "x", "m.relates_to": {"rel_type": "m.replace", "event_id": target}}
    said = [
        TimelineEvent.parse(event(edit)),
        TimelineEvent.parse(event({"redacts": target}, type="m.room.redaction")),
        TimelineEvent.parse(event({}, type="m.room.redaction", redacts=target)),
    ]
    assert [(each.edits, each.redacts) for each in said if each] == [(None, None)] * 3


def test_what_is_refused_is_answered_once_for_an_event_and_a_few_times_a_minute() -> None:
    for _ in range(5):
        command(prefix="!bot")
    row = session()
    for _ in range(3 * submission.NOTICES):
        take_in(row, event("!bot"))
    # Two minutes may meet.
    assert submission.NOTICES <= Reply.objects.count() <= 2 * submission.NOTICES
    how = "Write your message after !bot, for example: !bot What can you do?"
    assert set(Reply.objects.values_list("error", flat=True)) == {how}
    silent = RoomEvent.objects.filter(replies=None)
    assert set(silent.values_list("state", "note")) == {("ignored", f"Refused: {how}")}
    # Nobody else's are fewer for it.
    command(BOB, prefix="!bot")
    before = Reply.objects.count()
    take_in(row, event("!bot", sender=BOB))
    assert Reply.objects.count() == before + 1


def test_so_is_a_cancel_that_has_nothing_to_end() -> None:
    command()
    row = session()
    for _ in range(3 * submission.NOTICES):
        take_in(row, event("!cancel"))
    assert submission.NOTICES <= Reply.objects.count() <= 2 * submission.NOTICES


def test_masses_that_nobody_can_read_keep_nobody_elses_words_sealed() -> None:
    row = session()
    sealed = [
        event({"ciphertext": "..."}, type="m.room.encrypted", sender="@mallory:localhost")
        for _ in range(600)
    ]
    alices = event({"ciphertext": "..."}, type="m.room.encrypted")
    take_in(row, *sealed, alices, *sealed[:1])
    found = [source["event_id"] for _, _, source in decryption.undecrypted()]
    assert alices["event_id"] in found
    assert len(found) == decryption.MAX_OF_SENDER + 1

    # What one of them could read of her masses, it does not leave at that.
    for pk, _, source in decryption.undecrypted():
        decryption.record_decrypted(pk, {**event("once"), "event_id": source["event_id"]}, ME)
    again = [source["event_id"] for _, _, source in decryption.undecrypted()]
    assert len(again) == decryption.MAX_OF_SENDER
    assert not {*again} & {*found}
