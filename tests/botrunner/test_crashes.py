"""Whatever is killed, each question has exactly one answer."""

import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from agents.models import Run
from botrunner.models import Reply
from tests.botrunner.world import World, register
from tests.conftest import redis_executable
from tests.fakes.llm import Reply as Answer
from tests.synapse import Account, Synapse, free_port, wait_for

pytestmark = pytest.mark.system

ROOMS = 3
SEED = 20_261_121


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
        self.process.wait(10)


def test_kills_of_everything_lose_nothing_and_repeat_nothing(
    world: World, alice: Account, tmp_path: Path
) -> None:
    chance = random.Random(SEED)
    redis = Redis(tmp_path, free_port())
    redis.start()
    world.env["REDIS_URL"] = f"redis://127.0.0.1:{redis.port}/0"
    register(alice)
    world.start("worker", "bot")
    rooms = [world.invite(alice) for _ in range(ROOMS)]
    asked: dict[str, str] = {}

    def ask(number: int) -> None:
        room = chance.choice(rooms)
        asked[world.synapse.send(alice, room, f"question {number}")] = room

    try:
        for fault in ["bot", "worker", "redis", "synapse", "bot", "worker", "bot"]:
            for _ in range(6):
                ask(len(asked))
            time.sleep(chance.uniform(0, 0.3))  # the moment of the fault is the point
            if fault == "redis":
                redis.kill()
                redis.start()
            elif fault == "synapse":
                world.synapse.stop(signal.SIGKILL)
                world.synapse.start()
            else:
                world.kill(fault)
                ask(len(asked))
                world.start(fault)
        world.wait(
            "all answers",
            lambda: _answered(world, alice, rooms).keys() >= asked.keys(),
            seconds=90,
        )
        # Whoever would answer twice has had the time to do so.
        world.wait("the queues to be empty", lambda: not _open())
    finally:
        redis.kill()

    answered = _answered(world, alice, rooms)
    assert answered == Counter(asked.keys())
    assert Run.objects.count() == len(asked)


def _answered(world: World, alice: Account, rooms: list[str]) -> Counter[str]:
    return Counter(
        event["content"]["m.relates_to"]["m.in_reply_to"]["event_id"]
        for room in rooms
        for event in world.said_by_bot(alice, room)
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
    model.script(Answer("one", latency=1.5), Answer("two", latency=0.5))
    questions = [world.synapse.send(alice, room, f"{n}") for n in range(2)]
    world.wait("the runs to begin", lambda: Run.objects.count() == 2)
    world.synapse.stop()
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
                60,
            )
            assert _answered(world, alice, [room]) == Counter(asked)
            assert "A reply has to wait" in world.log()
