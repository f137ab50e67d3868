"""Encrypted rooms of a real homeserver."""

import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from nio.store import SqliteStore
from vodozemac import PreKeyMessage, SessionCreationException

from botrunner.matrix.client import Homeserver
from botrunner.models import Reply, RoomEvent, Session
from chat.models import Message
from tests.botrunner.person import Person, run
from tests.botrunner.world import BASE_DIR, ENCRYPTION, World, register
from tests.botrunner.world import freeze as world_freeze
from tests.fakes.llm import Reply as Answer
from tests.fakes.llm import held
from tests.synapse import Account

pytestmark = pytest.mark.system


def test_answers_in_an_encrypted_room_and_after_a_restart(
    world: World, alice: Account, tmp_path: Path
) -> None:
    register(alice)
    world.start("worker", "bot")
    room = world.invite(alice, initial_state=[ENCRYPTION])

    async def scene() -> None:
        async with Person(world.synapse, alice, tmp_path) as person:
            answer = await person.answer(await person.say(room, "one"))
            assert answer.decrypted
            assert answer.body == "Handled prompt: one"

            world.kill("bot")
            missed = await person.say(room, "two")
            world.start("bot")
            assert (await person.answer(missed)).body == "Handled prompt: two"

    run(scene())
    assert all(
        event["type"] == "m.room.encrypted"
        for event in world.synapse.messages(alice, room)
        if event["sender"] == world.bot_id and "state_key" not in event
    )


def test_answers_what_was_asked_since_the_invite_whenever_its_key_comes(
    world: World, alice: Account, tmp_path: Path
) -> None:
    register(alice)
    world.start("worker", "bot")  # it has keys from now on
    world.invite(alice)
    world.kill("bot")

    async def scene() -> None:
        async with Person(world.synapse, alice, tmp_path) as person:
            room = world.synapse.create_room(alice, initial_state=[ENCRYPTION])
            world.synapse.invite(alice, room, world.bot_id)
            await person.until(lambda: room in person.client.rooms)
            first = await person.say(room, "one")
            person.client.invalidate_outbound_session(room)
            kept = person.hold_back_keys()
            second = await person.say(room, "two")
            world.start("bot")
            await person.answer(first)
            await person.release_keys(kept)
            await person.answer(second)

    run(scene())


def test_quotes_what_it_can_decrypt(world: World, alice: Account, tmp_path: Path) -> None:
    register(alice, prefix="!ask ")
    world.start("worker", "bot")
    room = world.invite(alice, initial_state=[ENCRYPTION])

    def reply(to: str) -> dict[str, Any]:
        relation = {"m.in_reply_to": {"event_id": to}}
        return {"msgtype": "m.text", "body": "!ask translate", "m.relates_to": relation}

    async def scene() -> None:
        async with Person(world.synapse, alice, tmp_path) as person:
            await person.until(lambda: room in person.client.rooms)
            kept = person.hold_back_keys()
            sealed = await person.say(room, "The key of this never comes")
            kept.clear()
            person.client.invalidate_outbound_session(room)
            del person.client._send  # the method of the class again
            noon = await person.say(room, "The meeting is at noon")
            for question in (
                await person.say(room, reply(noon)),
                await person.say(room, reply(sealed)),
            ):
                await person.answer(question)

    run(scene())
    texts = [[each["text"] for each in found.quotations] for found in _messages()]
    assert texts == [["The meeting is at noon"], []]


def _messages() -> Any:
    return Message.objects.filter(role=Message.Role.USER).order_by("position")


def test_an_answer_is_written_live_and_goes_on_after_a_kill(
    world: World, alice: Account, tmp_path: Path, model: Any
) -> None:
    words = tuple(f"{number} " for number in range(60))
    spoken = Answer(words, delta_latency=0.15)
    may_end = threading.Event()
    # The second one is not at its end either, until it is cancelled.
    model.script(held(spoken, may_end, 100), held(spoken, threading.Event(), 100))
    world.env |= {"OPENAI_BASE_URL": model.url, "OPENAI_API_KEY": "sk-test"}
    world.env["BOT_STREAM_EDITS"] = "1"
    register(alice)
    world.start("worker", "bot")
    room = world.invite(alice, initial_state=[ENCRYPTION])

    async def scene() -> list[str]:
        async with Person(world.synapse, alice, tmp_path) as person:
            question = await person.say(room, "Count")
            await person.until(lambda: len(person.edits(question)) >= 2)
            world.kill("bot")
            told = len(person.edits(question))
            world.start("bot")
            await person.until(lambda: len(person.edits(question)) > told)
            assert "".join(words) not in person.edits(question)  # the model still speaks
            may_end.set()
            await person.until(lambda: person.edits(question)[-1:] == ["".join(words)])
            draft = await person.answer(question)
            assert draft.decrypted
            assert "".join(words).startswith(draft.body.rstrip())

            second = await person.say(room, "Again")
            await person.until(lambda: person.edits(second))
            await person.say(room, "!cancel")
            last = "This was cancelled."
            await person.until(lambda: person.edits(second)[-1].endswith(last))
            assert person.edits(second)[-1].startswith("0 1 ")
            return [draft.event_id, (await person.answer(second)).event_id]

    answers = run(scene())
    assert [reply.event_ids for reply in Reply.objects.order_by("id")] == [
        [each] for each in answers
    ]


def test_encryption_switched_on_later_is_respected(
    world: World, alice: Account, tmp_path: Path
) -> None:
    register(alice)
    world.start("worker", "bot")
    room = world.invite(alice)
    plain = world.synapse.send(alice, room, "plain")
    world.answer(alice, room, plain)
    world.kill("bot")
    path = f"/_matrix/client/v3/rooms/{room}/state/m.room.encryption"
    world.synapse.call("PUT", path, alice.token, ENCRYPTION["content"])
    last = world.synapse.send(alice, room, "sent in plain after all")
    world.start("bot")

    async def scene() -> None:
        async with Person(world.synapse, alice, tmp_path) as person:
            assert (await person.answer(last)).decrypted

    run(scene())


def test_the_device_is_cross_signed_with_keys_that_stay(world: World, alice: Account) -> None:
    world.start("bot")
    world.wait("it to connect", lambda: "Connected" in world.log())
    path = "/_matrix/client/v3/keys/query"
    body = {"device_keys": {world.bot_id: []}}
    first = world.synapse.call("POST", path, alice.token, body)
    session = Session.objects.get()
    _assert_signed(first, world.bot_id, session.device_id)

    # The keys of the device are lost, those of the account are not.
    world.kill("bot")
    for file in (world.directory / "store").glob("*.db*"):
        file.unlink()
    world.start("bot")
    world.wait("it to connect", lambda: world.log().count("Connected") >= 2)
    second = world.synapse.call("POST", path, alice.token, body)
    device = Session.objects.get().device_id
    assert device != session.device_id
    assert list(second["device_keys"][world.bot_id].keys() - {world.bot.device_id}) == [device]
    _assert_signed(second, world.bot_id, device)
    assert second["master_keys"][world.bot_id]["keys"] == first["master_keys"][world.bot_id]["keys"]

    # All is lost: the password proves that the new identity is the bot's.
    world.kill("bot")
    shutil.rmtree(world.directory / "store")
    world.start("bot")
    world.wait("it to connect", lambda: world.log().count("Connected") >= 3)
    third = world.synapse.call("POST", path, alice.token, body)
    _assert_signed(third, world.bot_id, Session.objects.get().device_id)


def _assert_signed(known: dict, user_id: str, device_id: str) -> None:
    signers = known["self_signing_keys"][user_id]["keys"]
    signatures = known["device_keys"][user_id][device_id]["signatures"][user_id]
    assert signers.keys() <= signatures.keys()


def test_who_was_frozen_and_comes_back_ruins_no_keys_and_says_nothing_twice(
    world: World, alice: Account, account: Any, tmp_path: Path
) -> None:
    bob = account("bob")
    register(alice)
    register(bob)
    world.start("worker", "bot")
    room = world.invite(alice, initial_state=[ENCRYPTION])
    world.start("bot2")
    world.wait("it to stand by", lambda: "standing by" in world.log("bot2"))

    async def ask(person: Person, room: str, words: str) -> None:
        question = await person.say(room, words)
        answer = await person.answer(question)
        assert (answer.decrypted, answer.body) == (True, f"Handled prompt: {words}")

    async def scene() -> None:
        async with (
            Person(world.synapse, alice, tmp_path) as person,
            Person(world.synapse, bob, tmp_path) as other,
        ):
            await ask(person, room, "one")
            freeze(world)
            # It has what comes next on its socket, too.
            await ask(person, room, "two")
            theirs = world.invite(bob, initial_state=[ENCRYPTION])
            await other.sync()
            await ask(other, theirs, "of somebody new")
            world.processes["bot"].send_signal(signal.SIGCONT)
            world.wait("it to notice", lambda: "has taken over" in world.log("bot"))
            await ask(person, room, "three")
            world.kill("bot2")
            for number in range(3):
                await ask(person, room, f"four {number}")
                await ask(other, theirs, f"five {number}")
            assert len(person.answers_in(room)) == 6
            assert len(other.answers_in(theirs)) == 4

    run(scene())


def freeze(world: World) -> None:
    """Stop the bot where it holds no lock of SQLite: of those nobody can relieve it."""
    [store] = (world.directory / "store").glob("*.db")
    bot = world.processes["bot"]
    while not world_freeze(bot.pid) or is_locked(store):
        bot.send_signal(signal.SIGCONT)


def is_locked(path: Path) -> bool:
    """For longer than the others, who are not frozen, need it."""
    with closing(sqlite3.connect(path, timeout=0.5)) as database:
        try:
            database.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError:
            return True
    return False


def test_with_keys_from_a_backup_it_goes_on_as_another_device(
    world: World, alice: Account, tmp_path: Path
) -> None:
    register(alice)
    world.start("worker", "bot")
    room = world.invite(alice, initial_state=[ENCRYPTION])
    store, backup = world.directory / "store", tmp_path / "backup"

    async def scene() -> None:
        async with Person(world.synapse, alice, tmp_path) as person:
            await person.answer(await person.say(room, "before the backup"))
            world.kill("bot", signal.SIGTERM)
            shutil.copytree(store, backup)
            world.start("bot")
            await person.answer(await person.say(room, "after it"))
            world.kill("bot", signal.SIGTERM)
            shutil.rmtree(store)
            shutil.copytree(backup, store)
            world.start("bot")
            world.wait("it to say so", lambda: "restored from a backup" in world.log())
            world.wait("it to connect", lambda: world.log().count("Connected") >= 3)
            await person.sync()  # which tells of the new device
            for words in ("after it came back", "and once more"):
                answer = await person.answer(await person.say(room, words))
                assert answer.body == f"Handled prompt: {words}"

            # It is another device by now, whose keys are as they should be.
            device = world.log().count("Logged in as")
            world.kill("bot", signal.SIGTERM)
            world.start("bot")
            await person.answer(await person.say(room, "after a restart"))
            assert world.log().count("Logged in as") == device == 2

    run(scene())


def test_what_cannot_be_decrypted_is_answered_when_its_key_comes(
    world: World, alice: Account, tmp_path: Path
) -> None:
    register(alice)
    world.start("worker", "bot")
    room = world.invite(alice, initial_state=[ENCRYPTION])

    async def scene() -> None:
        async with Person(world.synapse, alice, tmp_path) as person:
            kept = person.hold_back_keys()
            question = await person.say(room, "sealed")
            await person.until(lambda: "cannot be decrypted yet" in world.log())
            await person.release_keys(kept)
            assert (await person.answer(question)).body == "Handled prompt: sealed"

    run(scene())
    assert RoomEvent.objects.get().kind == RoomEvent.Kind.MESSAGE


def test_a_crash_while_a_key_is_taken_in_does_not_lose_it(
    world: World, alice: Account, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The homeserver shows it once more, as the position was not kept; what it is sealed with must
    not be used up."""
    bot = world.bot
    room = world.synapse.create_room(alice, [bot.user_id], initial_state=[ENCRYPTION])

    def client() -> Homeserver:
        homeserver = Homeserver(world.synapse.url, bot.user_id, tmp_path / "bot")
        homeserver.nio.restore_login(bot.user_id, bot.device_id, bot.token)
        return homeserver

    def crash(*args: Any) -> None:
        raise MemoryError

    async def scene() -> dict[str, Any]:
        killed = client()
        await killed.maintain_keys()
        await killed.join(room)
        since = (await killed.sync("", seconds=0, filter_={})).next_batch
        async with Person(world.synapse, alice, tmp_path) as person:
            question = await person.say(room, "sealed")
        with monkeypatch.context() as patch:
            patch.setattr(SqliteStore, "save_inbound_group_session", crash)
            with pytest.raises(MemoryError):
                await killed.sync(since, seconds=0, filter_={})
        await killed.close()
        restarted = client()
        news = await restarted.sync(since, seconds=0, filter_={})
        await restarted.close()

        # The one-time key is used up for whoever comes next, too.
        [sealed] = news.data["to_device"]["events"]
        content = sealed["content"]
        [(_, ciphertext)] = content["ciphertext"].items()
        message = PreKeyMessage.from_base64(ciphertext["body"])
        last = client()
        with pytest.raises(SessionCreationException):
            last.nio.olm.account.create_inbound_session(content["sender_key"], message)
        await last.close()
        return news.decrypted[question]

    assert run(scene())["content"]["body"] == "sealed"


def test_new_devices_can_talk_to_it_after_all_its_one_time_keys_were_taken(
    world: World, alice: Account, tmp_path: Path
) -> None:
    register(alice)
    world.start("worker", "bot")
    room = world.invite(alice, initial_state=[ENCRYPTION])
    device = Session.objects.get().device_id
    wanted = {"one_time_keys": {world.bot_id: {device: "signed_curve25519"}}}

    def take() -> bool:
        path = "/_matrix/client/v3/keys/claim"
        answer = world.synapse.call("POST", path, alice.token, wanted)
        return bool(answer["one_time_keys"].get(world.bot_id))

    while take():
        pass
    # With what it hears next it is told that none is left.
    world.synapse.send(alice, room, "in plain")
    world.wait("new keys", take)

    async def scene() -> None:
        async with Person(world.synapse, alice, tmp_path) as person:
            answer = await person.answer(await person.say(room, "Is there a key for me?"))
            assert answer.decrypted

    run(scene())


def test_the_key_of_its_secrets_is_changed_and_without_it_the_bot_stops(
    world: World, alice: Account, tmp_path: Path
) -> None:
    old, new = "old-" + "0123456789" * 4, "new-" + "9876543210" * 4
    world.env["SECRETS_KEY"] = old
    register(alice)
    world.start("worker", "bot")
    room = world.invite(alice, initial_state=[ENCRYPTION])

    async def scene() -> None:
        async with Person(world.synapse, alice, tmp_path) as person:

            async def answered(words: str) -> None:
                answer = await person.answer(await person.say(room, words))
                assert answer.body == f"Handled prompt: {words}"

            await answered("one")
            world.kill("bot", signal.SIGTERM)
            world.start("bot", SECRETS_KEY=new)
            assert world.processes.pop("bot").wait(120) == 1
            assert "The bot runner cannot start: A stored secret" in world.log()
            assert "Traceback" not in world.log()

            world.start("bot", SECRETS_KEY=f"{new},{old}")
            await answered("two")
            done = subprocess.run(
                [sys.executable, "manage.py", "rotate_secrets"],
                cwd=BASE_DIR,
                env=world.env | {"SECRETS_KEY": f"{new},{old}"},
                capture_output=True,
                text=True,
                timeout=120,
                check=True,
            )
            assert ", 0 unreadable." in done.stdout
            await answered("three")
            world.kill("bot", signal.SIGTERM)
            world.start("bot", SECRETS_KEY=new)
            await answered("four")

    run(scene())
    assert world.log().count("Logged in as") == 1, "it is the same device"
