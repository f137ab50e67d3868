"""Loops of two bots that answer each other: a sender that reacts to answers faster than a person, many
times in a row, gets no more answers in that room.

The reactions are counted in the process that answers. A restart forgets them: a loop that goes on then
gets as many answers as before."""

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum

from django.conf import settings

# A person types no faster. Longer messages may be pasted, so that this counts up to a limit only.
CHARACTERS_PER_SECOND = 20
MAX_FACTOR = 5
# A message that does not wait for the answer to the one before: people write so, few bots do.
IMPATIENCE = 0.5
# Silence ends once the sender has written nothing for this long.
PAUSE_SECONDS = 600.0
MAX_SENDERS = 10_000


class Judgement(Enum):
    ANSWER = "answer"
    LOOP = "loop"  # found with this message
    SILENCE = "silence"


@dataclass
class _Reactions:
    """The answers to a sender in a room, and how fast the sender reacts to them."""

    # Of the last answer that the sender has not reacted to.
    answered_at: float | None = None
    reactions: float = 0.0
    is_silent: bool = False
    seen_at: float = 0.0
    # A message may be handled again after a failure.
    event_id: str = ""
    verdict: Judgement = Judgement.ANSWER

    def react(self, event_id: str, length: int, now: float) -> Judgement:
        if event_id == self.event_id:
            return self.verdict
        if self.is_silent and now - self.seen_at <= PAUSE_SECONDS:
            verdict = Judgement.SILENCE
        else:
            self._count(length, now)
            verdict = Judgement.LOOP if self.is_silent else Judgement.ANSWER
        self.event_id, self.verdict, self.seen_at = event_id, verdict, now
        return verdict

    def _count(self, length: int, now: float) -> None:
        if self.is_silent:
            self.is_silent, self.reactions = False, 0.0
        if self.answered_at is None:
            self.reactions = max(0.0, self.reactions - IMPATIENCE)
        elif now - self.answered_at > _patience(length):
            self.reactions = 0.0
        else:
            self.reactions += 1
        self.answered_at = None
        self.is_silent = self.reactions >= settings.BOT_RUNNER_LOOP_ANSWERS


def _patience(length: int) -> float:
    """Return the time in which a person does not write a message of this length after an answer."""
    shortest: float = settings.BOT_RUNNER_LOOP_SECONDS
    return min(max(shortest, length / CHARACTERS_PER_SECOND), shortest * MAX_FACTOR)


class LoopBreaker:
    """The exchanges with the latest senders, by room. Thread-safe."""

    def __init__(self) -> None:
        self._exchanges: OrderedDict[tuple[str, str], _Reactions] = OrderedDict()
        self._lock = threading.Lock()

    def answered(self, room_id: str, sender: str) -> None:
        """Note that an answer to a sender, or a draft of it, is in the room."""
        if not settings.BOT_RUNNER_LOOP_ANSWERS:
            return
        with self._lock:
            exchange = self._exchanges.setdefault((room_id, sender), _Reactions())
            exchange.answered_at = time.monotonic()
            self._exchanges.move_to_end((room_id, sender))
            while len(self._exchanges) > MAX_SENDERS:
                self._exchanges.popitem(last=False)

    def judge(self, room_id: str, sender: str, event_id: str, length: int) -> Judgement:
        """Decide on a message that would be answered. `length`: that of its text."""
        with self._lock:
            exchange = self._exchanges.get((room_id, sender))
            if exchange is None or not settings.BOT_RUNNER_LOOP_ANSWERS:
                return Judgement.ANSWER
            return exchange.react(event_id, length, time.monotonic())

    def resume(self, room_id: str) -> bool:
        """Answer everybody in a room again; return False if nobody was silenced."""
        with self._lock:
            silent = [
                key
                for key, exchange in self._exchanges.items()
                if key[0] == room_id and exchange.is_silent
            ]
            for key in silent:
                del self._exchanges[key]
        return bool(silent)

    def clear(self) -> None:
        with self._lock:
            self._exchanges.clear()


breaker = LoopBreaker()


def sentence() -> str:
    """Return what a silenced sender is answered."""
    count = settings.BOT_RUNNER_LOOP_ANSWERS
    return (
        f"You have reacted to {count} answers in a row within seconds, as bots do that answer each "
        "other. I no longer answer you in this room until someone writes !resume here, or you have "
        f"written nothing for {PAUSE_SECONDS / 60:g} minutes."
    )
