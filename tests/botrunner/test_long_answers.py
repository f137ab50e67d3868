"""Answers that a room gets in parts or as a file, and whom they notify."""

import urllib.request
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.db import connections
from django.utils import timezone
from nio.crypto.attachments import decrypt_attachment

from agents.models import Run
from agents.runs import execution
from botrunner.matrix.errors import MatrixError
from botrunner.models import LeaseLost, Reply
from botrunner.outgoing import content as rendering
from botrunner.outgoing import queue
from botrunner.outgoing.sender import ReplySender
from chat.models import Message
from tests.botrunner.person import Person, run
from tests.botrunner.scenes import ALICE, ME, command, event, session, take_in
from tests.botrunner.world import ENCRYPTION, World, register
from tests.fakes.llm import FakeLLM
from tests.fakes.llm import Reply as Answer
from tests.synapse import Account

pytestmark = pytest.mark.django_db(transaction=True)

LONG = "".join(f"Paragraph {number}. {'It goes on. ' * 40}\n\n" for number in range(400))


class Homeserver:
    """Takes a transaction once. `fate` has what happens to the next uploads."""

    user_id = ME
    device_id = "DEVICE"

    def __init__(self) -> None:
        self.sent: dict[str, dict[str, Any]] = {}
        self.uploads: list[bytes] = []
        self.fate: list[Exception | None] = []

    async def send(self, room_id: str, content: dict[str, Any], transaction: str) -> str:
        assert not rendering.is_upload(content)
        if transaction in self.sent:
            assert self.sent[transaction] == content
        self.sent[transaction] = content
        return f"${transaction}"

    async def upload(
        self, room_id: str, data: bytes, name: str, content_type: str
    ) -> dict[str, Any]:
        assert (name, content_type) == ("answer.md", "text/markdown")
        if error := self.fate.pop(0) if self.fate else None:
            raise error
        self.uploads.append(data)
        return {"url": f"mxc://localhost/{len(self.uploads)}"}


def answered(text: str, *, after: float = 0, **content: Any) -> Reply:
    """A reply whose run was completed with this text, `after` seconds after the message."""
    command()
    row = session()
    take_in(row, event({"msgtype": "m.text", "body": "Hello", **content}))
    execution.execute(Run.objects.get().pk)
    run = Run.objects.get()
    Message.objects.filter(pk=run.answer_id).update(content=text)
    reply = Reply.objects.select_related("message", "room__session").get()
    Run.objects.update(finished_at=reply.message.created_at + timedelta(seconds=after))
    return reply


def send(homeserver: Homeserver, reply: Reply) -> Reply:
    Reply.objects.update(due_at=None)
    sender: Any = ReplySender(homeserver, reply.room.session)  # type: ignore[arg-type]

    async def work() -> None:
        await sender.compose()
        await sender.close()
        if sender._error:
            raise sender._error

    try:
        async_to_sync(work)()
    finally:
        connections.close_all()
    reply.refresh_from_db()
    return reply


def test_a_very_long_answer_is_its_first_part_and_a_file() -> None:
    homeserver = Homeserver()
    reply = send(homeserver, answered(LONG))

    text, file = homeserver.sent.values()
    assert text["body"].startswith("Paragraph 0.")
    assert text["body"].endswith(rendering.FILE_NOTE)
    assert "<em>" in text["formatted_body"]
    assert homeserver.uploads == [LONG.encode()]
    assert file == {
        **{name: text[name] for name in ("m.relates_to", "m.mentions")},
        "msgtype": "m.file",
        "body": "answer.md",
        "filename": "answer.md",
        "info": {"mimetype": "text/markdown", "size": len(LONG)},
        "url": "mxc://localhost/1",
        "app.botrealm.reply": {"key": reply.key, "part": 1},
    }
    assert reply.status == Reply.Status.SENT
    assert len(str(reply.parts)) < 2 * rendering.MAX_CONTENT_BYTES  # no second copy is kept


def test_an_answer_of_a_few_parts_has_no_file() -> None:
    homeserver = Homeserver()
    text = "One long line of an answer. " * 1_100
    send(homeserver, answered(text))
    bodies = [content["body"] for content in homeserver.sent.values()]
    assert len(bodies) == 2
    assert " ".join(bodies).split() == text.split()
    assert not homeserver.uploads


def test_the_number_of_parts_is_a_setting(settings: Any) -> None:
    settings.BOT_RUNNER_MAX_PARTS = 1
    homeserver = Homeserver()
    send(homeserver, answered("word " * 6_000))
    assert [content["msgtype"] for content in homeserver.sent.values()] == ["m.text", "m.file"]


@pytest.mark.parametrize("place", ["upload", "record", "send"])
def test_a_kill_during_an_upload_sends_nothing_twice(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    homeserver = Homeserver()
    reply = answered(LONG)

    def kill(*_: Any) -> None:
        raise LeaseLost

    with monkeypatch.context() as patch:
        if place == "upload":
            homeserver.fate = [LeaseLost()]
        elif place == "record":
            patch.setattr(queue, "record_parts", kill)
        else:
            patch.setattr(queue, "record_part", kill)
        with pytest.raises(LeaseLost):
            send(homeserver, reply)
    reply = send(homeserver, reply)

    assert list(homeserver.sent) == [f"{reply.key}.0", f"{reply.key}.1"]
    assert len(homeserver.uploads) == (2 if place == "record" else 1)
    assert homeserver.sent[f"{reply.key}.1"]["url"] == f"mxc://localhost/{len(homeserver.uploads)}"
    assert reply.event_ids == [f"${reply.key}.0", f"${reply.key}.1"]


@pytest.mark.parametrize(
    "error",
    [
        MatrixError("M_UNRECOGNIZED", status=404),
        MatrixError("M_TOO_LARGE", status=413),
        MatrixError("M_FORBIDDEN", status=403),
    ],
)
def test_a_homeserver_without_files_gets_the_text(error: MatrixError) -> None:
    homeserver = Homeserver()
    homeserver.fate = [error]
    reply = send(homeserver, answered(LONG))
    contents = list(homeserver.sent.values())
    assert {content["msgtype"] for content in contents} == {"m.text"}
    assert [content["app.botrealm.reply"]["part"] for content in contents] == list(
        range(len(contents))
    )
    body = "\n\n".join(content["body"] for content in contents)
    assert body.split() == LONG.split()
    assert rendering.FILE_NOTE not in body
    assert reply.status == Reply.Status.SENT


def test_an_upload_that_fails_for_now_is_repeated() -> None:
    homeserver = Homeserver()
    homeserver.fate = [MatrixError("UNREACHABLE"), MatrixError("M_UNKNOWN", status=502)]
    reply = answered(LONG)
    for _ in range(2):
        assert send(homeserver, reply).status == Reply.Status.READY
        assert not homeserver.sent
    assert send(homeserver, reply).status == Reply.Status.SENT
    assert len(homeserver.uploads) == 1


def test_a_draft_shows_what_the_first_part_will_be() -> None:
    reply = answered(LONG)
    [first, *_] = rendering.parts_of(reply, LONG[:60_000], "m.text")
    with_file, _ = rendering.parts_of(reply, LONG, "m.text")
    assert with_file["body"] == f"{first['body']}\n\n{rendering.FILE_NOTE}"
    for length in (25_000, 30_000, 50_000, len(LONG)):
        assert rendering.first_part_of(reply, LONG[:length]) == first
    assert rendering.first_part_of(reply, LONG[:5_000])["body"] == LONG[:5_000]


@pytest.mark.parametrize(
    ("after", "elapsed", "is_mentioned"),
    [(30, 29, False), (30, 31, True), (0, 0, True), (None, 9_999, False), (5, 6, True)],
)
def test_an_answer_that_took_long_mentions_the_person(
    after: float | None, elapsed: float, is_mentioned: bool, settings: Any
) -> None:
    settings.BOT_RUNNER_MENTION_AFTER = after
    homeserver = Homeserver()
    send(homeserver, answered("Done. " * 6_000, after=elapsed))
    mentions = [content["m.mentions"] for content in homeserver.sent.values()]
    assert mentions == [{"user_ids": [ALICE]} if is_mentioned else {}, {}]


def test_the_last_edit_of_a_draft_mentions_the_person() -> None:
    homeserver = Homeserver()
    reply = answered("Done.", after=60)
    now = timezone.now()
    Reply.objects.update(drafted_at=now, draft_id="$draft", device_id="DEVICE")
    assert rendering.first_part_of(reply, "Do")["m.mentions"] == {}
    send(homeserver, reply)
    [edit] = homeserver.sent.values()
    # The mentions beside the new content are those that the edit adds.
    assert edit["m.mentions"] == edit["m.new_content"]["m.mentions"] == {"user_ids": [ALICE]}


@pytest.mark.system
@pytest.mark.parametrize("encryption", [[], [ENCRYPTION]], ids=["plain", "encrypted"])
def test_a_file_can_be_read_in_the_room(
    encryption: list[Any], world: World, alice: Account, tmp_path: Path, model: FakeLLM
) -> None:
    model.script(Answer(LONG))
    world.env |= {"OPENAI_BASE_URL": model.url, "OPENAI_API_KEY": "sk-test"}
    world.env["BOT_RUNNER_MENTION_AFTER"] = "0"
    register(alice)
    world.start("worker", "bot")
    room = world.invite(alice, initial_state=encryption)

    async def scene() -> list[Any]:
        async with Person(world.synapse, alice, tmp_path) as person:
            question = await person.say(room, "Everything, please")
            await person.until(lambda: len(person.answers(question)) == 2)
            return person.answers(question)

    text, file = (answer.source["content"] for answer in run(scene()))
    assert text["body"].endswith(rendering.FILE_NOTE)
    assert text["m.mentions"] == {"user_ids": [alice.user_id]}
    assert ("file" in file, "url" in file) == (bool(encryption), not encryption)
    keys = file.get("file", file)
    data = _download(world, alice, keys["url"])
    if encryption:
        assert b"Paragraph" not in data
        data = decrypt_attachment(data, keys["key"]["k"], keys["hashes"]["sha256"], keys["iv"])
    assert data.decode() == LONG


@pytest.mark.system
def test_the_person_is_notified_of_a_slow_answer(
    world: World, alice: Account, model: FakeLLM
) -> None:
    """By a homeserver's push rules for a room that is set to mentions, with drafts too."""
    model.script(Answer("Here it is."), Answer("Here it is."))
    world.env |= {"OPENAI_BASE_URL": model.url, "OPENAI_API_KEY": "sk-test"}
    register(alice)
    rooms = []
    for env in ({"BOT_RUNNER_MENTION_AFTER": "0"}, {"BOT_RUNNER_MENTION_AFTER": "never"}):
        world.start("worker", "bot", BOT_STREAM_EDITS="1", **env)
        room = world.invite(alice)
        rooms.append(room)
        path = f"/_matrix/client/v3/pushrules/global/room/{room}"
        world.synapse.call("PUT", path, alice.token, {"actions": []})
        world.answer(alice, room, world.synapse.send(alice, room, "Where is it?"))
        world.wait("the reply", lambda: not Reply.objects.unfinished().exists())
        for name in ("worker", "bot"):
            world.kill(name)
    path = "/_matrix/client/v3/notifications"
    notified = world.synapse.call("GET", path, alice.token)["notifications"]
    assert [each["room_id"] for each in notified if each["room_id"] in rooms] == rooms[:1]


def _download(world: World, account: Account, url: str) -> bytes:
    path = url.removeprefix("mxc://")
    request = urllib.request.Request(
        f"{world.synapse.url}/_matrix/client/v1/media/download/{path}",
        headers={"Authorization": f"Bearer {account.token}"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        data: bytes = answer.read()
    return data
