"""What a message quotes: the one that it replies to, and the root of its Matrix thread. Without a
homeserver: a test says which events it would show."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from django.utils import timezone

from agents.models import Run
from agents.runs import execution
from botrunner.incoming import handling, quotations, recording, submission
from botrunner.incoming.batch import Batch, RoomUpdate
from botrunner.matrix.events import TimelineEvent
from botrunner.matrix.lookup import FoundEvent
from botrunner.models import QuotedEvent, RoomEvent, RoomMember, Session
from chat.models import Message
from tests.botrunner.scenes import ALICE, BOB, HOLDER, ME, ROOM, command, event, let_in, session

pytestmark = pytest.mark.django_db
NOON = "The meeting is at noon in room 4711."


def reply(body: str, to: str, **extra: Any) -> dict[str, Any]:
    return {
        "msgtype": "m.text",
        "body": body,
        "m.relates_to": {"m.in_reply_to": {"event_id": to}, **extra},
    }


def within(body: str, root: str, *, fallback: str = "") -> dict[str, Any]:
    relation = {"rel_type": "m.thread", "event_id": root}
    if fallback:
        relation |= {"is_falling_back": True, "m.in_reply_to": {"event_id": fallback}}  # type: ignore[dict-item]
    return {"msgtype": "m.text", "body": body, "m.relates_to": relation}


@pytest.fixture
def row() -> Session:
    command(ALICE)
    found = session()
    let_in(found, ALICE, BOB)
    return found


@pytest.fixture
def take(row: Session) -> Callable[..., list[dict[str, Any]]]:
    """Take in an event, with those that the homeserver shows; return what the message quotes."""

    def taken(
        source: dict[str, Any], *shown: dict[str, Any], visibility: str = "shared"
    ) -> list[dict[str, Any]]:
        batch = Batch(f"{row.since}+", [RoomUpdate(ROOM, [source], False)])
        submit = lambda each: submission.submit_recorded(each, me=ME)  # noqa: E731
        recording.record_sync(row, HOLDER, batch, submit)
        row.since = batch.next_batch
        found = {}
        for each in shown:
            parsed = TimelineEvent.parse(each)
            assert parsed
            found[parsed.event_id] = FoundEvent(parsed, visibility)
        for pk in handling.pending():
            try:
                handling.handle(pk, ME, found=None)
            except quotations.EventsNeeded as needed:
                known = {key: value for key, value in found.items() if key in needed.event_ids}
                handling.handle(pk, ME, found=known)
        message = Message.objects.filter(run__correlation_id=source["event_id"]).first()
        return [dict(each) for each in message.quotations] if message else []

    return taken


@pytest.fixture
def answered(take: Any) -> Callable[[str], tuple[dict[str, Any], dict[str, Any]]]:
    """A question and the event of its answer."""

    def asked(body: str) -> tuple[dict[str, Any], dict[str, Any]]:
        question = event(body)
        take(question)
        execution.execute(Run.objects.get(correlation_id=question["event_id"]).pk)
        return question, event(reply(f"Handled prompt: {body}", question["event_id"]), ME)

    return asked


def test_the_message_replied_to(take: Any) -> None:
    noon = event(NOON, BOB)
    assert take(event(reply("translate this", noon["event_id"])), noon) == [
        {"kind": "reply", "author": "other", "text": NOON, "source": noon["event_id"]}
    ]
    assert Message.objects.get().content == "translate this"


def test_with_the_fallback_of_a_client(take: Any) -> None:
    noon = event(NOON, BOB)
    body = f"> <{BOB}> {NOON}\n\ntranslate this"
    assert [each["text"] for each in take(event(reply(body, noon["event_id"])), noon)] == [NOON]
    assert Message.objects.get().content == "translate this"


def test_an_own_message_replied_to(take: Any) -> None:
    noon = event(NOON)
    assert take(event(reply("translate this", noon["event_id"])), noon)[0]["author"] == "user"


def test_nothing_that_the_homeserver_does_not_show(take: Any) -> None:
    assert take(event(reply("translate this", "$unknown"))) == []
    assert Message.objects.get().content == "translate this"


def test_a_bounded_part_of_a_long_one(take: Any) -> None:
    long = event("x" * 50_000, BOB)
    [quoted] = take(event(reply("shorten", long["event_id"])), long)
    assert len(quoted["text"]) < quotations.MAX_CHARACTERS + 10


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"msgtype": "m.image", "body": "cat.jpg"}, ["[image: cat.jpg]"]),
        ({"msgtype": "m.notice", "body": "done"}, ["done"]),
        ({"msgtype": "m.text", "body": "  "}, []),
        ({"msgtype": "m.location", "body": "here"}, []),
        (reply("> <@a:b> older\n\nnew", "$older"), ["new"]),
    ],
)
def test_of_what_kind(take: Any, content: Any, text: list[str]) -> None:
    target = event(content, BOB)
    found = take(event(reply("what?", target["event_id"])), target)
    assert [each["text"] for each in found] == text


def test_a_thread_on_a_message_of_another_person_begins_with_it(take: Any) -> None:
    noon = event(NOON, BOB)
    root = noon["event_id"]
    assert take(event(within("and why?", root, fallback=root)), noon) == [
        {"kind": "root", "author": "other", "text": NOON, "source": root}
    ]
    assert take(event(within("and now?", root, fallback=root)), noon) == []


def test_a_thread_on_an_answer_begins_with_its_question_and_the_answer(
    take: Any, answered: Any
) -> None:
    question, answer = answered("one")
    root = answer["event_id"]
    assert take(event(within("and why?", root, fallback=root)), answer) == [
        {"kind": "root", "author": "user", "text": "one", "source": question["event_id"]},
        {"kind": "root", "author": "assistant", "text": "Handled prompt: one", "source": root},
    ]


def test_a_thread_on_a_question_begins_with_it_and_its_answer(take: Any, answered: Any) -> None:
    question, _ = answered("one")
    found = take(event(within("and why?", question["event_id"])))
    assert [each["text"] for each in found] == ["one", "Handled prompt: one"]


def test_a_reply_to_the_latest_answer_needs_no_quotation(take: Any, answered: Any) -> None:
    question, answer = answered("one")
    assert take(event(reply("and why?", answer["event_id"])), answer) == []
    assert take(event(reply("and why?", question["event_id"]))) != []


def test_a_reply_to_an_earlier_answer_quotes_it(take: Any, answered: Any) -> None:
    _, first = answered("one")
    answered("two")
    [quoted] = take(event(reply("translate this", first["event_id"])), first)
    assert (quoted["author"], quoted["text"]) == ("assistant", "Handled prompt: one")


def test_a_reply_within_a_thread_and_the_root(take: Any) -> None:
    root, other = event("root", BOB), event("other", BOB)
    content = reply("which?", other["event_id"], rel_type="m.thread", event_id=root["event_id"])
    found = take(event(content), root, other)
    assert [(each["kind"], each["text"]) for each in found] == [
        ("root", "root"),
        ("reply", "other"),
    ]


class TestRights:
    @pytest.mark.parametrize("visibility", ["joined", "invited", "", "odd"])
    def test_nothing_from_before_the_join_where_the_room_hides_it(
        self, take: Any, visibility: str
    ) -> None:
        noon = event(NOON, BOB)
        take(noon)
        RoomMember.objects.filter(user_id=ALICE).update(joined_at=timezone.now())
        assert RoomEvent.objects.filter(event_id=noon["event_id"]).exists()
        asks = event(reply("translate this", noon["event_id"]))
        assert take(asks, noon, visibility=visibility) == []

    def test_what_was_written_since_the_join(self, take: Any) -> None:
        noon = event(NOON, BOB)
        take(noon)
        asks = event(reply("translate this", noon["event_id"]))
        assert len(take(asks, noon, visibility="joined")) == 1

    @pytest.mark.parametrize("visibility", ["shared", "world_readable"])
    def test_what_a_room_shows_to_new_members(self, take: Any, visibility: str) -> None:
        noon = event(NOON, BOB)
        take(noon)
        RoomMember.objects.filter(user_id=ALICE).update(joined_at=timezone.now())
        asks = event(reply("translate this", noon["event_id"]))
        assert len(take(asks, noon, visibility=visibility)) == 1

    def test_no_question_of_another_from_before_the_join(self, take: Any, answered: Any) -> None:
        command(BOB)
        _, answer = answered("one")
        late = timezone.now() + timedelta(seconds=1)
        RoomMember.objects.filter(user_id=BOB).update(joined_at=late)
        root = answer["event_id"]
        asks = event(within("and why?", root, fallback=root), BOB)
        assert take(asks, answer, visibility="joined") == []


class TestRedactions:
    def redaction(self, event_id: str) -> dict[str, Any]:
        return event({"redacts": event_id}, BOB, type="m.room.redaction", redacts=event_id)

    def test_a_quotation_goes_with_the_quoted_message(self, take: Any) -> None:
        noon = event(NOON, BOB)
        take(event(reply("translate this", noon["event_id"])), noon)
        take(self.redaction(noon["event_id"]))
        message = Message.objects.get()
        assert (message.content, message.quotations) == ("translate this", [])
        assert not QuotedEvent.objects.exists()

    def test_what_was_redacted_before_is_not_quoted(self, take: Any, answered: Any) -> None:
        question, answer = answered("one")
        take(self.redaction(question["event_id"]))
        root = answer["event_id"]
        assert take(event(within("and why?", root, fallback=root)), answer) == []
        assert take(event(reply("what?", question["event_id"]))) == []
