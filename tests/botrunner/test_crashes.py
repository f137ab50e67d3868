"""Whatever is killed, each question has exactly one answer."""

import asyncio
import os
import random
import signal
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal

from agents.models import Run
from botrunner.models import Reply
from scripts import homeserver
from tests.botrunner.person import Person
from tests.botrunner.world import ENCRYPTION, World, register
from tests.fakes.llm import Reply as Answer
from tests.fakes.llm import held
from tests.ports import free_port
from tests.redisserver import redis_executable
from tests.synapse import Account, Synapse, wait_for

pytestmark = pytest.mark.system

KILLS_OF_EACH = 3
SEED = int(os.environ.get("CRASH_SEED", 20_261_121))


class Redis:
    """One that can be killed, and forgets everything then."""

    def __init__(self, directory: Path, port: int) -> None:
        self.directory, self.port = directory, port
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        options = f"--port {self.port} --bind 127.0.0.1 --appendonly no".split()
        self.process = subprocess.Popen(
            [redis_executable(), *options, "--save", ""],
            cwd=self.directory,
            stdout=subprocess.DEVNULL,
        )

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(60)


def test_kills_of_everything_lose_nothing_and_repeat_nothing(
    world: World, alice: Account, tmp_path: Path
) -> None:
    """Twelve kills while questions keep coming, in plain rooms and in encrypted ones."""
    config = homeserver.written(world.synapse.directory)
    assert config["caches"] == {"sync_response_cache_duration": "0s"}, "It would hide faults."
    redis = Redis(tmp_path, free_port())
    redis.start()
    world.env["REDIS_URL"] = f"redis://127.0.0.1:{redis.port}/0"
    register(alice)
    world.start("worker", "bot")
    try:
        plain = [world.invite(alice) for _ in range(2)]
        encrypted = [world.invite(alice, initial_state=[ENCRYPTION]) for _ in range(2)]
        with start_blocking_portal() as portal:
            _kill_and_count(world, alice, plain, encrypted, redis, portal)
    except BaseException as error:
        error.add_note(f"The seed of its faults: CRASH_SEED={SEED}")
        raise
    finally:
        redis.kill()


def _kill_and_count(
    world: World,
    alice: Account,
    plain: list[str],
    encrypted: list[str],
    redis: Redis,
    portal: BlockingPortal,
) -> None:
    chance = random.Random(SEED)
    faults = ["bot", "worker", "redis", "synapse"] * KILLS_OF_EACH
    chance.shuffle(faults)
    person = Person(world.synapse, alice, world.directory)
    rooms = [*plain, *encrypted]
    done = threading.Event()
    with portal.wrap_async_context_manager(person):
        talks = [
            portal.start_task_soon(_talk, person, of_a_kind, random.Random(chance.random()), done)
            for of_a_kind in (plain, encrypted)
        ]
        for fault in faults:
            if chance.random() < 0.7:  # or else what was killed before is still coming up
                _wait_for_replies(world, 3)
            time.sleep(chance.uniform(0, 0.5))  # the moment of the fault is the point
            _kill(world, fault, redis)
        _wait_for_replies(world, 3)
        world.kill("bot")
        done.set()
        asked = [question for talk in talks for question in talk.result(180)]
        asked += [
            portal.call(person.say, rooms[number % len(rooms)], f"stopped {number}")
            for number in range(30)
        ]
        world.start("bot")
        while missing := _missing(world, alice, rooms, asked):
            # A busy machine takes its time, but goes on.
            world.wait(
                "another answer",
                lambda missing=missing: _missing(world, alice, rooms, asked) < missing,
            )
        # Whoever would answer twice has had the time to do so.
        world.wait("the queues to be empty", lambda: not _open())
        assert _answered(world, alice, rooms) == Counter(asked)
        assert Run.objects.count() == len(asked)
        for room in encrypted:
            portal.call(person.read_all, room)


def _missing(world: World, alice: Account, rooms: list[str], asked: list[str]) -> set[str]:
    return set(asked) - _answered(world, alice, rooms).keys()


async def _talk(
    person: Person, rooms: list[str], chance: random.Random, done: threading.Event
) -> list[str]:
    """Ask now here, now there, whatever happens meanwhile; the questions."""
    asked: list[str] = []
    while not done.is_set():
        asked.append(await person.say(chance.choice(rooms), f"question {len(asked)}"))
        await asyncio.sleep(chance.uniform(0.1, 0.4))
    return asked


def _wait_for_replies(world: World, count: int) -> None:
    """Until so many more are sent: what is killed next is at work."""
    before = Reply.objects.filter(status=Reply.Status.SENT).count()
    world.wait(
        "replies",
        lambda: Reply.objects.filter(status=Reply.Status.SENT).count() >= before + count,
        seconds=240,
    )


def _kill(world: World, fault: str, redis: Redis) -> None:
    """And start it again."""
    if fault == "redis":
        redis.kill()
        redis.start()
    elif fault == "synapse":
        world.synapse.stop(signal.SIGKILL)
        world.synapse.start()
    else:
        world.kill(fault)
        world.start(fault)


def _answered(world: World, alice: Account, rooms: list[str]) -> Counter[str]:
    """How many answers each question has. What is encrypted tells in clear text what it relates to."""
    return Counter(
        event["content"]["m.relates_to"]["m.in_reply_to"]["event_id"]
        for room in rooms
        for event in world.synapse.messages(alice, room)
        if event["sender"] == world.bot_id
        and event["type"] in ("m.room.message", "m.room.encrypted")
    )


def _open() -> bool:
    return Reply.objects.exclude(status=Reply.Status.SENT).exists()


def test_replies_wait_for_a_homeserver_that_is_away(
    world: World, alice: Account, model: Any
) -> None:
    """A run may end while the homeserver is down: its reply is kept and sent later, in order."""
    world.env |= {"OPENAI_BASE_URL": model.url, "OPENAI_API_KEY": "sk-test"}
    register(alice)
    world.start("worker", "bot")
    room = world.invite(alice)
    may_answer = threading.Event()
    model.script(held(Answer("one"), may_answer), Answer("two"))
    questions = [world.synapse.send(alice, room, f"{n}") for n in range(2)]
    world.wait("the runs to begin", lambda: Run.objects.count() == 2)
    world.synapse.stop()
    may_answer.set()
    world.wait(
        "the runs to end", lambda: Reply.objects.filter(run__status="completed").count() == 2
    )
    world.synapse.start()
    for question in questions:
        world.answer(alice, room, question)
    told = [event["content"]["m.relates_to"] for event in world.said_by_bot(alice, room)]
    assert [each["m.in_reply_to"]["event_id"] for each in told] == questions


def test_the_rate_limits_of_a_usual_homeserver_are_respected(
    transactional_db: None, redis: Any, redis_server: str, tmp_path: Path
) -> None:
    (tmp_path / "synapse").mkdir()
    with Synapse(tmp_path / "synapse", default_limits=True) as synapse:
        bot, alice = synapse.register("bot-runner"), synapse.register("alice")
        with World(synapse, redis_server, tmp_path, bot) as world:
            register(alice)
            world.start("worker", "bot")
            room = world.invite(alice)
            # Alice may send some ten at once, then the server slows her down; so it does the bot.
            asked = [synapse.send(alice, room, f"{number}") for number in range(8)]
            world.synapse.override_limit(alice)
            asked += [synapse.send(alice, room, f"{number}") for number in range(8, 14)]
            wait_for(
                "all answers",
                lambda: set(_answered(world, alice, [room])) == set(asked),
                240,
            )
            assert _answered(world, alice, [room]) == Counter(asked)
            assert "Sending a reply failed, retrying" in world.log()
