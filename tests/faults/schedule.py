"""A random schedule of faults, made up front from a seed: the same seed, the same schedule."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.faults import injections as faults
from tests.faults.client import Load
from tests.faults.plant import WORKERS, Plant

Draw = Callable[[random.Random], dict[str, Any]]
# Of one target, between two faults: in a short run they come thick and fast.
MEAN_QUESTIONS = 40
MEAN_QUESTIONS_OF_MANY = 120
MANY = 1000
MOST_SECONDS = 3.0


def _nothing(chance: random.Random) -> dict[str, Any]:
    return {}


def _worker(chance: random.Random) -> dict[str, Any]:
    return {"program": chance.choice(WORKERS)}


def _program(chance: random.Random) -> dict[str, Any]:
    return {"program": chance.choice(["web", "realm"])}


def _standing_still(chance: random.Random) -> dict[str, Any]:
    return _worker(chance) | {"seconds": round(chance.uniform(1, 8), 1)}


def _seconds(most: float) -> Draw:
    return lambda chance: {"seconds": round(chance.uniform(0, most), 1)}


def _blackhole(chance: random.Random) -> dict[str, Any]:
    return {"seconds": round(chance.uniform(0.5, 6), 1), "then_reset": chance.random() < 0.5}


def _slow(chance: random.Random) -> dict[str, Any]:
    return {"seconds": round(chance.uniform(1, 4), 1), "bytes_per_second": 1000.0}


def _lost_reply(chance: random.Random) -> dict[str, Any]:
    request, reply = chance.choice([("XADD", ""), ("BRPOP", "execute"), ("XREADGROUP", "event")])
    return {"request": request, "reply": reply, "nth": chance.randint(1, 3)}


# What is hit, and by which faults; those of one target come one after the other.
TARGETS: dict[str, list[tuple[faults.Fault, Draw]]] = {
    "processes": [
        (faults.kill, _worker),
        (faults.kill, _worker),
        (faults.terminate, _worker),
        (faults.pause, _standing_still),
        (faults.kill, _program),
        (faults.kill_all, _nothing),
    ],
    "redis": [
        (faults.stop_redis, _seconds(3)),
        (faults.kill_redis, _seconds(3)),
        (faults.wipe_redis, _nothing),
        (faults.drop_stream, _nothing),
        (faults.drop_group, _nothing),
        (faults.fill_redis, _seconds(3)),
        (faults.forbid_writes, _seconds(3)),
        (faults.sleep_redis, _seconds(4)),
        (faults.blackhole_redis, _blackhole),
        (faults.reset_redis, _nothing),
        (faults.refuse_redis, _seconds(3)),
        (faults.slow_redis, _slow),
        (faults.deafen_redis, _seconds(2)),
        (faults.lose_redis_reply, _lost_reply),
    ],
    "postgresql": [
        (faults.crash_database, _seconds(2)),
        (faults.blackhole_database, _blackhole),
        (faults.reset_database, _nothing),
        (faults.refuse_database, _seconds(3)),
        (faults.lose_commit_reply, lambda chance: {"nth": chance.randint(1, 5)}),
    ],
}


@dataclass(frozen=True)
class Step:
    """A fault: so many accepted questions after the one before it, however long those take on this
    machine, and a moment later."""

    questions: int
    delay: float
    fault: faults.Fault
    arguments: dict[str, Any]

    def __str__(self) -> str:
        arguments = ", ".join(f"{name}={value}" for name, value in self.arguments.items())
        return f"{self.questions} questions, {self.delay:.1f} s: {self.fault.__name__}({arguments})"


Schedule = dict[str, list[Step]]


def make(seed: int, questions: int, vendor: str) -> Schedule:
    """Faults for so many questions, of the database only where it is a server."""
    return {
        target: _steps(random.Random(f"{seed} {target}"), kinds, questions)
        for target, kinds in TARGETS.items()
        if target != "postgresql" or vendor == "postgresql"
    }


def _steps(
    chance: random.Random, kinds: list[tuple[faults.Fault, Draw]], questions: int
) -> list[Step]:
    steps: list[Step] = []
    mean = MEAN_QUESTIONS if questions < MANY else MEAN_QUESTIONS_OF_MANY
    while (left := questions - sum(step.questions for step in steps)) > mean // 2:
        fault, draw = chance.choice(kinds)
        pause = min(left, chance.randint(1, 2 * mean))
        steps.append(Step(pause, chance.uniform(0, MOST_SECONDS), fault, draw(chance)))
    return steps


def play(schedule: Schedule, plant: Plant, load: Load) -> None:
    """All targets at once; returns when the load is over."""
    failures: list[BaseException] = []

    def hit(steps: list[Step]) -> None:
        try:
            for step in steps:
                goal = len(plant.client.asked) + step.questions
                while len(plant.client.asked) < goal:
                    if load.is_over:
                        return
                    time.sleep(0.05)
                time.sleep(step.delay)
                step.fault(plant, **step.arguments)
        except BaseException as error:
            error.add_note(f"while {step}")
            failures.append(error)

    threads = [threading.Thread(target=hit, args=(steps,)) for steps in schedule.values()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
