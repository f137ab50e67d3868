"""From the outcome of a run to the contents that tell it. Without a homeserver."""

import json
from typing import Any

import pytest
from django.utils import timezone

from agents import retention
from agents.models import Run
from agents.runs import actions, execution
from botrunner.matrix.errors import MatrixError
from botrunner.matrix.events import REPLY_FIELD
from botrunner.models import Reply, Room
from botrunner.outgoing import content as rendering
from botrunner.outgoing import queue
from botrunner.outgoing.content import MAX_CONTENT_BYTES
from botrunner.outgoing.splitting import split
from chat.markdown import to_html
from tests.botrunner.scenes import ROOM, command, event, session, take_in
from tests.factories import conversation
from tests.fakes.llm import FakeLLM
from tests.fakes.llm import Reply as Answer
from tests.plans import explain

pytestmark = pytest.mark.django_db


def ready(*texts: str, content: Any = "Hello") -> list[Reply]:
    """Replies in the order of their outcomes."""
    command()
    row = session()
    for text in texts:
        take_in(row, event(content if content != "Hello" else text))
        execution.execute(Run.objects.latest("position").pk)
    queue.compose(row)
    return list(Reply.objects.order_by("id"))


def test_a_reply_relates_to_its_question_and_names_nobody() -> None:
    [reply] = ready("Hi")
    [content] = reply.parts
    assert content["body"] == "Handled prompt: Hi"
    assert content["m.relates_to"] == {"m.in_reply_to": {"event_id": reply.message.event_id}}
    assert content["m.mentions"] == {}


def test_an_answer_that_was_cut_off_says_so_outside_its_code(model: FakeLLM) -> None:
    model.script(Answer("Run:\n```sh\nmake", finish_reason="length"))
    [reply] = ready("How?")
    [content] = reply.parts
    assert content["body"].endswith("\nmake\n```\n\nThe answer was cut off at the output limit.")
    assert "<p>The answer was cut off at the output limit.</p>" in content["formatted_body"]


def test_reasoning_does_not_reach_a_room(model: FakeLLM) -> None:
    model.script(Answer("<think>Depots rarely sleep.</think>\nIt is open."))
    [reply] = ready("Is it?")
    [content] = reply.parts
    assert content["body"] == "It is open."
    assert "sleep" not in str(content)


def test_a_failure_is_said_in_plain_words() -> None:
    command()
    row = session()
    take_in(row, event())
    now = timezone.now()
    error = "The model is overloaded."
    Run.objects.update(status="failed", safe_error=error, finished_at=now, due_at=None)
    queue.compose(row)
    [content] = Reply.objects.get().parts
    assert content["body"] == "Sorry, something went wrong. The model is overloaded."
    assert content["msgtype"] == "m.notice"


def test_what_was_cancelled_elsewhere_is_said() -> None:
    command()
    row = session()
    take_in(row, event())
    actions.cancel(Run.objects.get())
    queue.compose(row)
    assert Reply.objects.get().parts[0]["body"] == "This was cancelled."


@pytest.mark.parametrize("composed", [True, False])
def test_the_room_is_told_although_the_thread_was_deleted(composed: bool) -> None:
    command()
    row = session()
    take_in(row, event())
    run = Run.objects.get()
    if composed:
        execution.execute(run.pk)
        queue.compose(row)
    retention.delete_thread(run.thread)
    queue.compose(row)

    reply = Reply.objects.get()
    said = "Handled prompt: Hello"
    if not composed:
        said = "Sorry, I cannot do this. The conversation was deleted."
    assert (reply.status, reply.parts[0]["body"]) == (Reply.Status.READY, said)
    # And goes on to listen.
    take_in(row, event("Again"))
    assert Run.objects.get().thread_id != run.thread_id


def test_questions_that_are_answered_together_get_one_reply(settings: Any) -> None:
    settings.CHAT_WHEN_BUSY = "merge"
    command()
    row = session()
    take_in(row, event("one"))
    take_in(row, event("two"))
    queue.compose(row)
    assert [reply.status for reply in Reply.objects.order_by("id")] == ["dropped", "waiting"]

    execution.execute(Run.objects.latest("position").pk)
    queue.compose(row)
    first, second = Reply.objects.order_by("id")
    assert (first.status, second.status) == (Reply.Status.DROPPED, Reply.Status.READY)
    assert second.parts[0]["body"] == "Handled prompt: one\n\ntwo"


def test_a_draft_whose_question_is_answered_with_a_later_one_says_so(settings: Any) -> None:
    settings.CHAT_WHEN_BUSY = "merge"
    command()
    row = session()
    take_in(row, event("one"))
    Reply.objects.update(drafted_at=timezone.now(), draft_id="$draft", device_id="DEVICE")
    take_in(row, event("two"))
    queue.compose(row, drafts={Reply.objects.earliest("pk").pk: "Well, one"})

    first, second = Reply.objects.order_by("id")
    assert (first.status, second.status) == (Reply.Status.READY, Reply.Status.WAITING)
    assert first.parts[0]["body"] == "Well, one\n\nAnswered together with a later message."


def test_a_refused_question_is_answered() -> None:
    command(prefix="!bot")
    row = session()
    take_in(row, event("!bot"))
    queue.compose(row)
    body = Reply.objects.get().parts[0]["body"]
    how = "Write your message after !bot, for example: !bot What can you do?"
    assert body == f"Sorry, I cannot do this. {how}"


def test_a_reply_waits_for_the_one_before_it_in_the_room() -> None:
    first, second = ready("1", "2")
    room = first.room_id
    queue.record_failure(first, MatrixError("M_LIMIT_EXCEEDED", status=429, retry_after=30))
    assert queue.next_of(room, "DEVICE") is None
    assert queue.rooms_to_serve(first.room.session) == [room]  # asked, and found to wait

    Reply.objects.update(due_at=None)
    outgoing = queue.next_of(room, "DEVICE")
    assert outgoing is not None
    assert outgoing.reply == first
    assert not outgoing.moved
    queue.record_part(outgoing.reply, "$sent")
    following = queue.next_of(room, "DEVICE")
    assert following is not None
    assert following.reply == second


def test_another_device_has_to_look_what_was_sent() -> None:
    [reply] = ready("1")
    queue.next_of(reply.room_id, "OLD")
    outgoing = queue.next_of(reply.room_id, "NEW")
    assert outgoing is not None
    assert outgoing.moved
    queue.adopt_parts(outgoing.reply, ["$there"], "NEW")
    assert Reply.objects.get().status == Reply.Status.SENT


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MatrixError("UNREACHABLE"), Reply.Status.READY),
        (MatrixError("M_UNKNOWN", status=502), Reply.Status.READY),
        (MatrixError("M_FORBIDDEN", status=403), Reply.Status.DROPPED),
        (MatrixError("M_UNKNOWN", status=400), Reply.Status.READY),
    ],
)
def test_what_can_be_tried_again_is(error: MatrixError, status: str) -> None:
    [reply] = ready("1")
    queue.record_failure(reply, error)
    reply.refresh_from_db()
    assert (reply.status, reply.error) == (status, str(error))


def test_an_answer_that_the_server_finds_too_large_is_said_to_be() -> None:
    [reply] = ready("1")
    queue.record_failure(reply, MatrixError("M_TOO_LARGE", status=413))
    reply.refresh_from_db()
    assert reply.status == Reply.Status.READY
    assert reply.parts[0]["body"] == "Sorry, this answer is too long for the room."


def test_a_long_answer_that_the_server_finds_too_large_comes_in_smaller_parts() -> None:
    text = "\n".join(f"line {number}" for number in range(3_000))
    [reply] = ready(text)
    before = len(reply.parts)
    queue.record_part(reply, "$first")
    queue.record_failure(reply, MatrixError("M_TOO_LARGE", status=413))
    reply.refresh_from_db()

    assert reply.status == Reply.Status.READY
    assert len(reply.parts) > before
    assert [part[REPLY_FIELD]["part"] for part in reply.parts] == list(range(len(reply.parts)))
    said = "\n".join(part["body"] for part in reply.parts)
    assert said == f"Handled prompt: {text}"
    assert all("formatted_body" not in part for part in reply.parts[1:])


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MatrixError("M_UNKNOWN", status=500), Reply.Status.DROPPED),
        (MatrixError("CRYPTO"), Reply.Status.DROPPED),
        (MatrixError("UNREACHABLE"), Reply.Status.READY),
        (MatrixError("UNREADABLE", status=502), Reply.Status.READY),
        (MatrixError("M_LIMIT_EXCEEDED", status=429), Reply.Status.READY),
    ],
)
def test_what_the_homeserver_never_takes_does_not_hold_up_the_room_for_good(
    error: MatrixError, status: str
) -> None:
    first, second = ready("1", "2")
    Reply.objects.filter(pk=first.pk).update(
        attempts=20, ready_at=timezone.now() - 2 * queue.PATIENCE
    )
    first.refresh_from_db()
    queue.record_failure(first, error)
    first.refresh_from_db()
    assert first.status == status
    following = queue.next_of(first.room_id, "DEVICE")
    assert (following.reply if following else None) == (second if status == "dropped" else None)


def test_a_room_that_was_left_hears_nothing() -> None:
    [reply] = ready("1")
    Room.objects.filter(room_id=ROOM).update(membership=Room.Membership.LEFT)
    assert queue.next_of(reply.room_id, "DEVICE") is None
    reply.refresh_from_db()
    assert reply.status == Reply.Status.DROPPED


def test_a_room_that_was_left_may_have_been_owed_any_number() -> None:
    [reply] = ready("1")
    Reply.objects.bulk_create(
        Reply(
            message=reply.message,
            room=reply.room,
            key=f"refused.{number}",
            status=Reply.Status.READY,
            ready_at=timezone.now(),
        )
        for number in range(1000)
    )
    Room.objects.update(membership=Room.Membership.LEFT)
    assert queue.next_of(reply.room_id, "DEVICE") is None
    assert not Reply.objects.unfinished().exists()


def test_typing_shows_only_while_a_run_takes_its_time(monkeypatch: Any) -> None:
    command()
    row = session()
    take_in(row, event())
    assert queue.typing_rooms(row) == set()
    Reply.objects.update(created_at=timezone.now() - 2 * queue.TYPING_PATIENCE)
    assert queue.typing_rooms(row) == {ROOM}
    execution.execute(Run.objects.get().pk)
    assert queue.typing_rooms(row) == set()


def test_the_queue_of_replies_is_read_by_its_index() -> None:
    [reply] = ready("1")
    queue = Reply.objects.ready().filter(room=reply.room_id).order_by("ready_at", "id")
    assert "reply_ready" in explain(queue)


@pytest.mark.parametrize(
    "text",
    [
        "word " * 30_000,
        "\n".join(f"line {number}" for number in range(9_000)),
        "ä" * 100_000,
        "Look:\n```python\n" + "\n".join(f"x = {n}" for n in range(9_000)) + "\n```\nThat is it.",
        "<b>&\"'" * 10_000,
    ],
)
def test_long_answers_are_split_below_the_limit_of_an_event(text: str) -> None:
    pieces = list(split(text, MAX_CONTENT_BYTES))
    assert len(pieces) > 1
    for piece in pieces:
        assert len(json.dumps(rendering._message(piece, "m.text"))) <= MAX_CONTENT_BYTES
        assert piece.count("```") % 2 == 0
    kept = "".join("".join(pieces).replace("```python", "").replace("```", "").split())
    assert kept == "".join(text.replace("```python", "").replace("```", "").split())


def table(columns: int, rows: int) -> str:
    return "|a" * columns + "|\n" + "|-" * columns + "|\n" + "|\n" * rows


def encrypted_size(content: dict[str, Any]) -> int:
    """Of an event: as nio writes it, as Megolm and base64 make it longer, and 4 KB for what stands
    beside it."""
    return len(json.dumps(content)) * 4 // 3 + 4_000


@pytest.mark.parametrize(
    "text",
    [
        (table(40, 45) + "\n") * 8,
        f"[a]: https://example.org/{'x' * 900}\n\n" + "[a] " * 100,
        "".join(">" * (n % 19 + 1) + "a\n\n" for n in range(1_000)),
        "😀" * 30_000,
        "\u0001" * 30_000,
        '"' * 60_000,
        "Look:\n```" + "x" * 20_000 + "\n" + "x = 1\n" * 9_000 + "\n```",
        "<a@b>" * 5_000,
    ],
    ids=["tables", "references", "quotes", "emoji", "controls", "marks", "fence", "addresses"],
)
def test_whatever_an_answer_grows_to_no_event_is_too_long(text: str) -> None:
    [reply] = ready("1")
    parts = rendering.parts_of(reply, text, "m.text")
    assert parts
    for part in parts:
        if rendering.is_upload(part):
            assert rendering.file_of(part).decode() == text
            continue
        assert encrypted_size(part) < 65_536
        edit = rendering.edit_of("$draft", part)
        assert encrypted_size(edit) < 65_536
        assert edit["m.new_content"]["body"] == part["body"]


def test_an_answer_of_any_length_is_composed_soon_and_to_a_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rendered = []

    def counted(text: str) -> str:
        rendered.append(len(text))
        return to_html(text)

    monkeypatch.setattr(rendering, "to_html", counted)
    [reply] = ready("1")
    parts = rendering.parts_of(reply, "word " * 1_000_000, "m.text")
    assert [part["msgtype"] for part in parts] == ["m.text", "m.file"]
    assert sum(rendered) < 2 * MAX_CONTENT_BYTES
    texts = rendering.without_file(parts)
    assert len(texts) == rendering.MAX_TEXT_PARTS
    assert sum(rendered) < 2 * rendering.MAX_TEXT_PARTS * MAX_CONTENT_BYTES


def test_a_text_that_cannot_be_rendered_is_sent_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(text: str) -> str:
        raise RecursionError

    with monkeypatch.context() as patch:
        patch.setattr(rendering, "to_html", fail)
        [reply] = ready("**1**")
    [part] = reply.parts
    assert part["body"] == "Handled prompt: **1**"
    assert "formatted_body" not in part
    # And an edit of it is one.
    assert rendering.edit_of("$1", part)["body"] == "* Handled prompt: **1**"


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("**bold** `code`", "<p><strong>bold</strong> <code>code</code></p>"),
        ("a\nb", "<p>a<br>\nb</p>"),
        ("<script>alert(1)</script>", "<p>&lt;script&gt;alert(1)&lt;/script&gt;</p>"),
        ("[x](javascript:alert(1))", "<p>[x](javascript:alert(1))</p>"),
        ("[x](https://e.org)", '<p><a href="https://e.org">x</a></p>'),
        ("```python\nx\n```", '<pre><code class="language-python">x\n</code></pre>'),
        ("![i](https://e.org/i.png)", None),
    ],
)
def test_markdown_becomes_html_that_is_safe(text: str, html: str | None) -> None:
    if html is None:
        assert "<img" not in to_html(text)
    else:
        assert to_html(text) == html


def test_composing_many_takes_few_queries(django_assert_max_num_queries: Any) -> None:
    conversation(1)
    command()
    row = session()
    take_in(row, *(event(f"{n}") for n in range(5)))
    for run in Run.objects.filter(source="matrix").order_by("position"):
        execution.execute(run.pk)
    with django_assert_max_num_queries(7):
        queue.compose(row)
    assert Reply.objects.filter(status="ready").count() == 5


class TestRetries:
    """What becomes of a run that somebody asks for again."""

    def failed(self) -> Reply:
        command()
        row = session()
        take_in(row, event())
        run = Run.objects.get()
        actions.cancel(run)
        return Reply.objects.get()

    def retried(self, reply: Reply) -> None:
        assert reply.run
        assert actions.retry(reply.run)
        execution.execute(reply.run.pk)

    def bodies(self) -> list[str]:
        return [part["body"] for reply in Reply.objects.order_by("cycle") for part in reply.parts]

    def test_the_answer_is_said_after_the_failure_once(self) -> None:
        reply = self.failed()
        account = reply.room.session
        queue.compose(account)
        self.retried(reply)
        for _ in range(3):
            queue.compose(account)

        assert self.bodies() == ["This was cancelled.", "Handled prompt: Hello"]
        first, second = Reply.objects.order_by("cycle")
        assert first.key != second.key
        assert not second.key.startswith(f"{first.key}.0")

    def test_nothing_is_said_of_a_failure_that_was_not_told_yet(self) -> None:
        reply = self.failed()
        self.retried(reply)
        queue.compose(reply.room.session)
        assert self.bodies() == ["Handled prompt: Hello"]

    def test_nothing_is_said_until_it_has_ended_again(self) -> None:
        reply = self.failed()
        account = reply.room.session
        queue.compose(account)
        assert reply.run
        actions.retry(reply.run)
        assert not queue.compose(account)
        execution.execute(reply.run.pk)
        assert len(queue.compose(account, [reply.run.pk])) == 1

    def test_nor_of_a_question_that_was_taken_back(self) -> None:
        reply = self.failed()
        Reply.objects.update(status=Reply.Status.DROPPED)
        self.retried(reply)
        assert not queue.compose(reply.room.session)
        assert Reply.objects.count() == 1

    def test_another_device_does_not_take_the_failure_for_the_answer(self) -> None:
        reply = self.failed()
        account = reply.room.session
        queue.compose(account)
        outgoing = queue.next_of(reply.room_id, "OLD")
        assert outgoing
        queue.record_part(outgoing.reply, "$failure")
        self.retried(reply)
        queue.compose(account)
        queue.next_of(reply.room_id, "OLD")
        moved = queue.next_of(reply.room_id, "NEW")
        assert moved
        assert moved.moved
        queue.adopt_parts(moved.reply, ["$failure"], "NEW")
        assert Reply.objects.get(cycle=1).status == Reply.Status.READY
