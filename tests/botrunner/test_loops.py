"""Bots that answer each other."""

import threading
import time
from typing import Any

import pytest

from agents.models import Run
from botrunner import loops
from botrunner.loops import Judgement, LoopBreaker, breaker
from botrunner.models import Reply, RoomEvent
from botrunner.outgoing import queue
from tests.botrunner.scenes import ALICE, BOB, ROOM, command, event, session, take_in
from tests.botrunner.world import World, register
from tests.synapse import Account

LIMIT = 5


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1_000.0
        monkeypatch.setattr(loops.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, settings: Any) -> Clock:
    settings.BOT_RUNNER_LOOP_ANSWERS, settings.BOT_RUNNER_LOOP_SECONDS = LIMIT, 2
    return Clock(monkeypatch)


class Room:
    """Messages of a sender and answers, at times."""

    def __init__(self, clock: Clock, sender: str = ALICE) -> None:
        self.clock, self.sender, self.breaker = clock, sender, LoopBreaker()
        self.count = 0

    def message(self, length: int = 10, *, after: float = 0.0) -> Judgement:
        self.clock.now += after
        self.count += 1
        return self.breaker.judge(ROOM, self.sender, f"${self.count}", length)

    def exchange(self, length: int = 10, *, reaction: float) -> Judgement:
        judgement = self.message(length, after=reaction)
        if judgement == Judgement.ANSWER:
            self.clock.now += 0.3
            self.breaker.answered(ROOM, self.sender)
        return judgement


def test_a_bot_that_answers_at_once_is_silenced(clock: Clock) -> None:
    room = Room(clock)
    judged = [room.exchange(reaction=0.2) for _ in range(LIMIT + 4)]
    assert judged == [Judgement.ANSWER] * LIMIT + [Judgement.LOOP] + [Judgement.SILENCE] * 3


def test_a_bot_whose_long_answers_take_seconds_is_silenced(clock: Clock) -> None:
    room = Room(clock)
    judged = [room.exchange(600, reaction=8) for _ in range(LIMIT + 1)]
    assert judged[-1] == Judgement.LOOP


def test_a_bot_that_sends_two_messages_for_each_answer_is_silenced(clock: Clock) -> None:
    room = Room(clock)
    judged = []
    for _ in range(4 * LIMIT):
        judged += [room.message(after=0.1), room.message(after=0.1)]
        room.breaker.answered(ROOM, ALICE)
    assert Judgement.LOOP in judged


@pytest.mark.parametrize(
    ("length", "reaction"), [(2, 2.5), (10, 3), (60, 5), (400, 25), (5_000, 40)]
)
def test_a_person_who_writes_fast_is_answered(clock: Clock, length: int, reaction: float) -> None:
    room = Room(clock)
    assert {room.exchange(length, reaction=reaction) for _ in range(100)} == {Judgement.ANSWER}


def test_a_person_who_does_not_wait_for_answers_is_answered(clock: Clock) -> None:
    room = Room(clock)
    judged = set()
    for number in range(200):
        judged.add(room.message(after=0.3))
        if number % 3 == 2:
            room.breaker.answered(ROOM, ALICE)
    assert judged == {Judgement.ANSWER}


def test_a_pause_between_quick_messages_starts_the_count_again(clock: Clock) -> None:
    room = Room(clock)
    for _ in range(20):
        judged = [room.exchange(reaction=0.5) for _ in range(LIMIT - 1)]
        judged.append(room.exchange(reaction=30))
        assert set(judged) == {Judgement.ANSWER}


def test_silence_ends_after_a_pause_of_the_sender(clock: Clock) -> None:
    room = Room(clock)
    while room.exchange(reaction=0.2) != Judgement.LOOP:
        pass
    # Messages of a bot that goes on prolong it.
    assert room.message(after=loops.PAUSE_SECONDS - 1) == Judgement.SILENCE
    assert room.message(after=loops.PAUSE_SECONDS - 1) == Judgement.SILENCE
    assert room.message(after=loops.PAUSE_SECONDS + 1) == Judgement.ANSWER


def test_others_and_other_rooms_are_answered(clock: Clock) -> None:
    room = Room(clock)
    while room.exchange(reaction=0.2) != Judgement.LOOP:
        pass
    assert room.breaker.judge(ROOM, BOB, "$b", 1) == Judgement.ANSWER
    assert room.breaker.judge("!other", ALICE, "$c", 1) == Judgement.ANSWER
    assert not room.breaker.resume("!other")
    assert room.breaker.resume(ROOM)
    assert room.message() == Judgement.ANSWER


def test_a_message_that_is_handled_again_counts_once(clock: Clock) -> None:
    room = Room(clock)
    room.breaker.answered(ROOM, ALICE)
    for _ in range(50):
        assert room.breaker.judge(ROOM, ALICE, "$same", 1) == Judgement.ANSWER


def test_only_the_latest_senders_are_remembered(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loops, "MAX_SENDERS", 10)
    known = LoopBreaker()
    for number in range(100):
        known.answered(ROOM, f"@{number}:localhost")
    assert len(known._exchanges) == 10


def test_it_can_be_switched_off(clock: Clock, settings: Any) -> None:
    settings.BOT_RUNNER_LOOP_ANSWERS = 0
    room = Room(clock)
    assert {room.exchange(reaction=0) for _ in range(100)} == {Judgement.ANSWER}


@pytest.mark.django_db
def test_the_room_is_told_once_and_can_end_the_silence(clock: Clock) -> None:
    command()
    row = session()
    for number in range(LIMIT + 4):
        take_in(row, event(in_new_thread(number) if number % 2 else f"{number}"))
        breaker.answered(ROOM, ALICE)
    assert Run.objects.count() == LIMIT
    notice = Reply.objects.get(run=None)
    queue.compose(row)
    notice.refresh_from_db()
    assert notice.parts[0]["msgtype"] == "m.notice"
    assert "in a row within seconds" in notice.parts[0]["body"]
    assert "!resume" in notice.parts[0]["body"]
    silent = RoomEvent.objects.filter(state="ignored")
    assert silent.count() == 3
    assert {each.note for each in silent} == {
        "Not answered because of a loop: write !resume in the room to end this."
    }

    take_in(row, event("!resume", BOB))
    assert Reply.objects.latest("id").parts[0]["body"] == "I answer everyone here again."
    take_in(row, event("And now?"))
    assert Run.objects.count() == LIMIT + 1


def in_new_thread(number: int) -> dict[str, Any]:
    """A message that begins a Matrix thread on an answer, as some bots do."""
    relation = {"rel_type": "m.thread", "event_id": f"$answer{number}"}
    return {"msgtype": "m.text", "body": f"{number}", "m.relates_to": relation}


@pytest.mark.django_db
def test_there_may_be_nothing_to_resume() -> None:
    command()
    row = session()
    take_in(row, event("!resume"))
    assert Reply.objects.get().error == "There is no one whom I do not answer here."
    take_in(row, event("!resume", BOB))  # perhaps meant for another bot
    assert Reply.objects.count() == 1


@pytest.mark.system
def test_two_bots_stop_to_answer_each_other(world: World, alice: Account, account: Any) -> None:
    other = account("other-bot")
    register(alice)
    register(other)
    world.start("worker", "bot")
    room = world.invite(alice)
    world.synapse.call(
        "POST", f"/_matrix/client/v3/rooms/{room}/invite", alice.token, {"user_id": other.user_id}
    )
    world.synapse.call("POST", f"/_matrix/client/v3/join/{room}", other.token, {})
    stopping = threading.Event()
    answered: set[str] = set()

    def echo() -> None:
        """Answer texts with a text, as a simple bot does."""
        while not stopping.is_set():
            for said in world.said_by_bot(alice, room):
                if said["event_id"] not in answered and said["content"]["msgtype"] == "m.text":
                    answered.add(said["event_id"])
                    world.synapse.send(other, room, f"You say: {len(answered)}")
            time.sleep(0.1)

    world.synapse.send(other, room, "Hello")
    bot = threading.Thread(target=echo)
    bot.start()
    try:
        world.wait(
            "the notice",
            lambda: [
                said
                for said in world.said_by_bot(alice, room)
                if "!resume" in said["content"]["body"]
            ],
        )
    finally:
        stopping.set()
        bot.join()
    assert len(answered) == 15
    # Others are answered.
    question = world.synapse.send(alice, room, "What was that?")
    assert world.answer(alice, room, question)["body"] == "Handled prompt: What was that?"
