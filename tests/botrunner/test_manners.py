"""How the bot behaves while it works, in rooms of a real homeserver."""

import threading
from typing import Any

import pytest

from agents.models import Run
from botrunner.models import Reply
from tests.botrunner.test_client import Scripted, server  # noqa: F401  (a fixture)
from tests.botrunner.world import World, register
from tests.fakes.llm import Failure, held
from tests.fakes.llm import Reply as Answer
from tests.synapse import CLIENT, Account

pytestmark = pytest.mark.system


@pytest.fixture
def talking(world: World, model: Any) -> Any:
    """The world's model, scripted."""
    world.env |= {"OPENAI_BASE_URL": model.url, "OPENAI_API_KEY": "sk-test"}
    return model


def test_typing_shows_and_questions_that_wait_can_be_changed_and_taken_back(
    world: World, alice: Account, talking: Any
) -> None:
    may_answer = threading.Event()
    talking.script(held(Answer("**one**"), may_answer), Answer("two"))
    register(alice)
    world.start("worker", "bot")
    room = world.invite(alice)
    first = world.synapse.send(alice, room, "first")
    second = world.synapse.send(alice, room, "secnod")
    third = world.synapse.send(alice, room, "third")
    # What is redacted before the bot has seen it was never asked.
    world.wait("all to be asked", lambda: Run.objects.count() == 3)
    new = {"msgtype": "m.text", "body": "second"}
    relation = {"rel_type": "m.replace", "event_id": second}
    edit = {**new, "m.new_content": new, "m.relates_to": relation}
    world.synapse.send(alice, room, edit)
    world.synapse.call("PUT", f"{CLIENT}/rooms/{room}/redact/{third}/t1", alice.token, {})

    world.wait("typing to show", lambda: world.bot_id in typing(world, alice, room))
    cancelled = Run.objects.filter(correlation_id=third, status=Run.Status.CANCELLED)
    world.wait("the third to be taken back", cancelled.exists)
    changed = Run.objects.filter(correlation_id=second, message__content="second")
    world.wait("the second to be changed", changed.exists)
    may_answer.set()
    assert world.answer(alice, room, first)["formatted_body"] == "<p><strong>one</strong></p>"
    assert world.answer(alice, room, second)["body"] == "two"
    world.wait("typing to end", lambda: not typing(world, alice, room))
    assert [request.last_user for request in talking.requests] == ["first", "second"]
    assert world.answers(alice, room, third) == []
    assert Run.objects.get(correlation_id=third).status == Run.Status.CANCELLED


def typing(world: World, account: Account, room_id: str) -> list[str]:
    answer = world.synapse.call("GET", f"{CLIENT}/sync?timeout=0", account.token)
    events = answer["rooms"]["join"][room_id]["ephemeral"]["events"]
    return [
        user
        for event in events
        if event["type"] == "m.typing"
        for user in event["content"]["user_ids"]
    ]


def test_a_failure_and_a_long_answer_reach_the_room(
    world: World, alice: Account, talking: Any
) -> None:
    talking.script(Failure(401), Answer("line\n\n" * 15_000))
    register(alice)
    world.start("worker", "bot")
    room = world.invite(alice)
    failed = world.answer(alice, room, world.synapse.send(alice, room, "fail"))
    assert failed["msgtype"] == "m.notice"
    assert failed["body"] == "Sorry, something went wrong. The model refused the server's key."

    world.synapse.send(alice, room, "long")
    world.wait("the whole answer", lambda: Reply.objects.filter(status="sent").count() == 2)
    beginning, file = (event["content"] for event in world.said_by_bot(alice, room)[1:])
    assert beginning["body"].startswith("line")
    assert "All of it is in the file below." in beginning["body"]
    assert (file["msgtype"], file["info"]["size"]) == ("m.file", len("line\n\n" * 15_000))


@pytest.mark.parametrize(
    "broken",
    [(502, b"<html>"), (200, {}), (401, {"errcode": "M_UNKNOWN_TOKEN", "soft_logout": True})],
    ids=["gateway", "nonsense", "soft logout"],
)
def test_a_broken_homeserver_is_not_hammered(
    world: World,
    server: Scripted,  # noqa: F811
    broken: Any,
) -> None:
    """It logs in, and then every sync fails."""
    server.answers |= {
        "/login": (200, {"user_id": world.bot_id, "device_id": "D", "access_token": "token"}),
        "/keys/upload": (200, {"one_time_key_counts": {"signed_curve25519": 50, "curve25519": 0}}),
        "/sync": broken,
    }
    world.env["MATRIX_URL"] = server.url

    def asked_for(path: str) -> list[Any]:
        return [body for _, asked, body in server.asked if path in asked]

    world.start("bot")
    world.wait("three tries", lambda: len(asked_for("/sync")) >= 3)
    assert len(server.asked) < 20
    assert world.log().count("Sync failed, retrying") == 1
    assert len(world.log().splitlines()) < 40

    server.answers["/sync"] = (200, {"next_batch": "s1", "rooms": {}})
    world.wait("it to work again", lambda: "Sync recovered" in world.log(), seconds=180)
    # The name of the device is its own, and stays.
    first, *again = asked_for("/login")
    assert {each["device_id"] for each in again} <= {"D"}
    assert first["device_id"]


def test_a_slow_answer_holds_up_no_other_room(world: World, alice: Account, talking: Any) -> None:
    may_answer = threading.Event()
    talking.script(held(Answer("slow"), may_answer), Answer("fast"))
    register(alice)
    world.start("worker", "bot")
    room, other = world.invite(alice), world.invite(alice)
    slow = world.synapse.send(alice, room, "slow")
    world.wait("the model to be asked", lambda: talking.requests)
    world.answer(alice, other, world.synapse.send(alice, other, "fast"))
    assert world.answers(alice, room, slow) == []
    may_answer.set()
    world.answer(alice, room, slow)


def test_it_waits_for_a_homeserver_that_is_not_up_yet(world: World, alice: Account) -> None:
    world.synapse.stop()
    world.start("bot")
    world.wait("it to say so", lambda: "Waiting for the homeserver" in world.log())
    world.synapse.start()
    world.wait("it to connect", lambda: "Connected" in world.log(), seconds=180)
    assert world.log().count("Waiting for the homeserver") == 1
