"""An encrypted room as a person with matrix-js-sdk sees it, which is in Element and many other clients.
In `make nightly`; here: `MATRIX_JS_SDK=1 make test ARGS=tests/botrunner/test_matrix_js_sdk.py`."""

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agents.models import Run
from tests import nodepackages
from tests.botrunner.world import World, register
from tests.fakes.llm import Call, FakeLLM, held
from tests.fakes.llm import Reply as Answer
from tests.synapse import Account

FOLDER = Path(__file__).parent / "matrix_js"

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(not os.environ.get("MATRIX_JS_SDK"), reason="A part of make nightly"),
]


class Client:
    """A process with the person's client."""

    def __init__(self, world: World, account: Account, folder: Path) -> None:
        packages = nodepackages.installed(FOLDER)
        (folder / "node_modules").symlink_to(packages / "node_modules")
        for name in ("package.json", "person.js"):
            shutil.copy(FOLDER / name, folder)
        self._process = subprocess.Popen(
            [nodepackages.NODE, "person.js"],
            cwd=folder,
            env=nodepackages.environment()
            | {
                "MATRIX_URL": world.synapse.url,
                "MATRIX_USER": account.user_id,
                "MATRIX_TOKEN": account.token,
                "MATRIX_DEVICE": account.device_id,
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def do(self, command: str, **details: Any) -> Any:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps({"command": command, **details}) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline() or '{"error": "It has ended."}')
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def client(world: World, alice: Account, tmp_path: Path) -> Iterator[Client]:
    folder = tmp_path / "client"
    folder.mkdir()
    client = Client(world, alice, folder)
    yield client
    client.close()


def pill(bot: str, text: str, name: str = "Helper Bot", **extra: Any) -> dict[str, Any]:
    """A message that mentions the bot as the composer of Element writes it."""
    link = f'<a href="https://matrix.to/#/{bot}">{name}</a>'
    return {
        "msgtype": "m.text",
        "body": f"{name}: {text}",
        "format": "org.matrix.custom.html",
        "formatted_body": f"{link}: {text}",
        "m.mentions": {"user_ids": [bot]},
        **extra,
    }


def test_a_conversation_in_an_encrypted_room(
    world: World,
    alice: Account,
    client: Client,
    model: FakeLLM,
    request: pytest.FixtureRequest,
) -> None:
    path = f"/_matrix/client/v3/profile/{world.bot_id}/displayname"
    world.synapse.call("PUT", path, world.bot.token, {"displayname": "Helper Bot"})
    may_end = threading.Event()
    slow = held(Answer(("Slowly, ", "very ", "slowly."), delta_latency=0.1), may_end, 3)
    request.addfinalizer(may_end.set)
    questions: list[Call] = []
    fast = (Answer(f"Answer {number}") for number in range(1, 5))

    def behave(call: Call) -> Any:
        if "memory of a conversation" in call.last_user:
            return Answer("They talk.")
        questions.append(call)
        return next(fast, slow)

    model.reset(behave)
    world.env |= {"OPENAI_BASE_URL": model.url, "OPENAI_API_KEY": "sk-test"}
    world.env |= {"BOT_STREAM_EDITS": "1", "BOT_RUNNER_MENTION_AFTER": "0"}
    register(alice, mention=True)
    world.start("worker", "bot")
    assert "Rust SDK" in client.do("start")
    room = client.do("create", invite=world.bot_id, name="Office")

    def send(content: dict[str, Any], **details: Any) -> str:
        return str(client.do("send", room=room, content=content, **details))

    def answer(event: str, ends: str = "") -> Any:
        found = client.do("answer", room=room, event=event, ends=ends)
        assert found["encrypted"]
        return found

    def asked() -> str:
        return questions[-1].last_user

    # A pill, which is no part of what the model is sent. The answer notifies the person.
    first = answer(send(pill(world.bot_id, "hello")), "Answer 1")
    assert asked() == "hello"
    assert first["content"]["m.mentions"] == {"user_ids": [alice.user_id]}

    # A reply to a message that was not for the bot quotes it.
    meeting = "The meeting is at noon in room 4711."
    said = send({"msgtype": "m.text", "body": meeting})
    replies = {"m.relates_to": {"m.in_reply_to": {"event_id": said}}}
    answer(send(pill(world.bot_id, "translate this", **replies)), "Answer 2")
    assert "translate this" in asked()
    assert meeting in asked()

    # A thread on the first answer goes on with it, and is answered in it.
    third = answer(send(pill(world.bot_id, "and why?"), thread=first["id"]), "Answer 3")
    assert third["thread"] == first["id"]
    sent = json.dumps(questions[-1].messages)
    assert "Answer 1" in sent
    assert "and why?" in sent

    # An edit after the answer: the next message goes with the new words.
    edited = send(pill(world.bot_id, "the code is 4711"))
    answer(edited, "Answer 4")
    new = pill(world.bot_id, "the code is 0815")
    relation = {"rel_type": "m.replace", "event_id": edited}
    send({**new, "body": f"* {new['body']}", "m.new_content": new, "m.relates_to": relation})
    world.wait("the edit", lambda: "was edited" in world.log())

    # A redaction cancels the run, `!cancel` with a pill too.
    count = len(questions)
    redacted = send(pill(world.bot_id, "what is the code?"))
    world.wait("the model", lambda: len(questions) > count)
    assert "0815" in json.dumps(questions[-1].messages)
    client.do("redact", room=room, event=redacted)
    cancelled_runs = Run.objects.filter(status=Run.Status.CANCELLED)
    world.wait("the cancel", cancelled_runs.exists)
    cancelled = send(pill(world.bot_id, "and the other code?"))
    world.wait("the model", lambda: len(questions) > count + 1)
    send(pill(world.bot_id, "!cancel"))
    answer(cancelled, "This was cancelled.")
    client.do("stop")
