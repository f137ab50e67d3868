"""Many at once: messages, invitations, and bot runners for the one account."""

import itertools
import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from agents.models import Run
from botrunner.models import Reply, Room, Session
from tests.botrunner.world import World, freeze, register
from tests.synapse import Account

pytestmark = pytest.mark.system

AT_ONCE = 8  # requests to the homeserver


def test_two_hundred_messages_in_twenty_rooms_are_answered_in_order(
    world: World, alice: Account
) -> None:
    register(alice)
    world.start("worker", "bot")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        rooms = list(pool.map(lambda _: world.invite(alice), range(20)))

        def say(room: str) -> list[str]:
            return [world.synapse.send(alice, room, f"{number}") for number in range(10)]

        asked = dict(zip(rooms, pool.map(say, rooms), strict=True))
    world.wait("all replies", lambda: _sent() >= 200, seconds=360)
    assert {room: _answered(world, alice, room) for room in rooms} == asked
    assert Run.objects.count() == 200


def test_a_storm_of_invitations_is_followed_whatever_happens_meanwhile(
    world: World, alice: Account
) -> None:
    """An invitation is shown once: killed between hearing of it and joining, the bot still knows."""
    register(alice)
    world.start("worker", "bot")
    world.invite(alice)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        invite = [world.bot_id]
        made = [pool.submit(world.synapse.create_room, alice, invite) for _ in range(30)]
        world.wait("some invitations", lambda: Room.objects.count() > 8)
        world.kill("bot")
        world.start("bot")
        rooms = [each.result() for each in made]

        def ask(room: str) -> str:
            world.wait_joined(alice, room)
            return world.synapse.send(alice, room, "Hello")

        asked = dict(zip(rooms, pool.map(ask, rooms), strict=True))
    world.wait("all replies", lambda: _sent() >= 30, seconds=120)
    answered = {room: _answered(world, alice, room) for room in rooms}
    assert answered == {room: [question] for room, question in asked.items()}
    joined = Room.objects.filter(membership=Room.Membership.JOINED)
    assert set(rooms) <= set(joined.values_list("room_id", flat=True))


def test_of_two_bot_runners_one_works_and_the_other_takes_over_under_load(
    world: World, alice: Account
) -> None:
    register(alice)
    world.start("worker", "bot")
    rooms = [world.invite(alice) for _ in range(3)]
    world.start("bot2")
    world.wait("it to stand by", lambda: "standing by" in world.log("bot2"))
    names = itertools.cycle([("bot", "bot2"), ("bot2", "bot")])
    with _talking(world, alice, rooms) as asked:
        for _ in range(3):
            active, other = next(names)
            before = _replied(world, other)
            _wait_for_more(world, active, 3)
            assert _replied(world, other) == before, "Both work."
            world.kill(active)
            _wait_to_lead(world, other)
            _wait_for_more(world, other, 1)
            world.start(active)
        # Not dead but frozen: it comes back and believes that it still leads.
        active, other = next(names)
        _wait_for_more(world, active, 3)
        world.wait("it to be frozen", lambda: freeze(world.processes[active].pid))
        _wait_for_more(world, other, 3)
        os.kill(world.processes[active].pid, signal.SIGCONT)
        _wait_for_more(world, other, 3)
    world.wait("all replies", lambda: _sent() >= len(asked), seconds=360)
    answered = Counter(q for room in rooms for q in _answered(world, alice, room))
    assert answered == Counter(asked)
    assert Run.objects.count() == len(asked)


@contextmanager
def _talking(world: World, account: Account, rooms: list[str]) -> Iterator[list[str]]:
    """Meanwhile questions are asked; the list of them."""
    asked: list[str] = []
    done = threading.Event()

    def talk() -> None:
        for room in itertools.cycle(rooms):
            if done.wait(0.15):
                return
            asked.append(world.synapse.send(account, room, f"question {len(asked)}"))

    with ThreadPoolExecutor(1) as pool:
        talker = pool.submit(talk)
        try:
            yield asked
        finally:
            done.set()
        talker.result()


def _replied(world: World, name: str) -> int:
    return len(re.findall(r'"Replied"', world.log(name)))


def _wait_to_lead(world: World, name: str) -> None:
    mark = f":{world.processes[name].pid}:"
    world.wait(f"{name} to take over", lambda: mark in Session.objects.get().holder)


def _wait_for_more(world: World, name: str, count: int) -> None:
    """Replies of one bot runner."""
    before = _replied(world, name)
    world.wait(f"replies of {name}", lambda: _replied(world, name) >= before + count)


def _sent() -> int:
    return Reply.objects.filter(status=Reply.Status.SENT).count()


def _answered(world: World, account: Account, room: str) -> list[str]:
    """The questions that have an answer in the room, in the order of the answers."""
    return [
        event["content"]["m.relates_to"]["m.in_reply_to"]["event_id"]
        for event in world.said_by_bot(account, room)
    ]
