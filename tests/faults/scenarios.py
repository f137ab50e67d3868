"""The rows of the fault matrix, each a function that does the damage while questions keep coming."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from tests.fakes.llm import Call, Reply
from tests.faults import injections as faults
from tests.faults.client import Asked
from tests.faults.invariants import NOTHING, Allowed, Row, check
from tests.faults.plant import LEASE_SECONDS, MAX_ATTEMPTS, WORKERS, Plant

Damage = Callable[[Plant], None]
WORKS_ON = ("sqlite", "postgresql")


@dataclass(frozen=True)
class Scenario:
    """`row` of the matrix; of each `kind` a short run of the tests takes one, but none that is `slow`.
    `load` are the arguments of `Plant.load`, None where the damage asks its own questions."""

    row: int
    name: str
    kind: str
    damage: Damage
    vendors: tuple[str, ...] = WORKS_ON
    load: dict[str, Any] | None = field(default_factory=lambda: {"runs": 24})
    allowed: Allowed = NOTHING
    settle_seconds: float = 240

    def __str__(self) -> str:
        return f"row-{self.row:02}-{self.name.replace(' ', '-')}"

    def play(self, plant: Plant) -> Row:
        """Run the scenario. Raises `invariants.Violated`."""
        plant.begin()
        if self.load is None:
            self.damage(plant)
        else:
            with plant.load(**self.load).running():
                plant.wait_for_calls(4)
                self.damage(plant)
                plant.mended()
        plant.wait_up()
        plant.settle(self.settle_seconds)
        return check(plant, f"{self.row} {self.name}", self.allowed)


SCENARIOS: list[Scenario] = []


def scenario(row: int, name: str, kind: str, **options: Any) -> Callable[[Damage], Damage]:
    def register(damage: Damage) -> Damage:
        SCENARIOS.append(Scenario(row, name, kind, damage, **options))
        return damage

    return register


PROCESS = Allowed(extra_calls=20)
BROKEN = Allowed(extra_calls=20, broken_connections=True, refusals=True, p99_seconds=10)
AWAY = Allowed(extra_calls=20, refusals=True, p99_seconds=30)
# For a damage that needs some more questions while it lasts.
LONG = {"runs": 80, "pause": 0.5}
ONLY_SQLITE, ONLY_POSTGRESQL = ("sqlite",), ("postgresql",)


@scenario(1, "a worker dies in the middle of a call", "process", load=None, allowed=PROCESS)
def _(plant: Plant) -> None:
    plant.llm.script(Reply(latency=60))
    asked = plant.client.ask("t-dies", plant.number())
    plant.llm.wait_for_requests()
    os.kill(plant.holder(asked), signal.SIGKILL)
    plant.mended()
    plant.settle()
    results = plant.database.rows(
        f"SELECT result FROM agents_attempt WHERE run_id = '{asked.run_id}' ORDER BY number"
    )
    assert results == [("lost",), ("completed",)]


@scenario(2, "a worker is killed", "process", allowed=PROCESS)
def _(plant: Plant) -> None:
    faults.kill(plant, WORKERS[0])


@scenario(
    3,
    "a message kills its worker",
    "worker",
    load=None,
    allowed=Allowed(extra_calls=20, failures=True),
)
def _(plant: Plant) -> None:
    def answer(call: Call) -> Reply:
        return Reply(latency=60) if "poison" in call.last_user else Reply()

    plant.llm.default = answer
    poison = plant.client.ask("t-poison", plant.number())
    for attempt in range(1, MAX_ATTEMPTS + 1):
        plant.stack.wait(
            f"attempt {attempt}",
            lambda attempt=attempt: plant.attempt(poison) == attempt,
            240,
        )
        plant.llm.wait_for_requests(attempt, 240)
        os.kill(plant.holder(poison), signal.SIGKILL)
    plant.mended()
    good = plant.client.ask("t-good", plant.number())
    plant.settle()
    ended = plant.database.rows(
        f"SELECT status, error_code FROM agents_run WHERE id IN ('{poison.run_id}', '{good.run_id}')"
        " ORDER BY created_at"
    )
    assert ended == [("failed", "workers_lost"), ("completed", "")]


@scenario(4, "a worker stands still", "process", allowed=PROCESS)
def _(plant: Plant) -> None:
    pid = plant.stack.freeze(WORKERS[0])
    try:
        time.sleep(LEASE_SECONDS + 3)
    finally:
        os.kill(pid, signal.SIGCONT)


@scenario(5, "a worker is stopped", "process")
def _(plant: Plant) -> None:
    faults.terminate(plant, WORKERS[0])


@scenario(6, "all programs are killed", "process", allowed=BROKEN)
def _(plant: Plant) -> None:
    faults.kill_all(plant)


@scenario(7, "Redis is stopped for a second", "redis")
def _(plant: Plant) -> None:
    faults.stop_redis(plant, 1)


@scenario(7, "Redis is stopped for ten seconds", "redis")
def _(plant: Plant) -> None:
    faults.stop_redis(plant, 10)


@scenario(8, "Redis is killed", "redis")
def _(plant: Plant) -> None:
    faults.kill_redis(plant, 1)


@scenario(8, "Redis is killed and has its file", "redis", load=LONG)
def _(plant: Plant) -> None:
    with closing(plant.redis.client()) as client:
        client.config_set("appendonly", "yes")
    plant.redis.aof = True
    try:
        plant.wait_for_calls(2)
        faults.kill_redis(plant)
    finally:
        plant.redis.aof = False
    with closing(plant.redis.client()) as client:
        client.config_set("appendonly", "no")


@scenario(9, "Redis is wiped", "redis")
def _(plant: Plant) -> None:
    faults.wipe_redis(plant)


@scenario(9, "the stream is deleted", "redis")
def _(plant: Plant) -> None:
    faults.drop_stream(plant)


@scenario(9, "the consumer group is destroyed", "redis")
def _(plant: Plant) -> None:
    faults.drop_group(plant)


@scenario(10, "Redis is full", "redis")
def _(plant: Plant) -> None:
    faults.fill_redis(plant, 4)


@scenario(11, "Redis waits for a replica", "redis")
def _(plant: Plant) -> None:
    faults.forbid_writes(plant, 4)


@scenario(11, "Redis cannot save", "redis")
def _(plant: Plant) -> None:
    faults.fail_to_save(plant, 4)


@scenario(12, "Redis is a black hole", "line")
def _(plant: Plant) -> None:
    faults.blackhole_redis(plant, 5)


@scenario(12, "Redis is a black hole for a minute", "slow", load={"runs": 40, "pause": 1.0})
def _(plant: Plant) -> None:
    faults.blackhole_redis(plant, 60, then_reset=True)


@scenario(13, "the reply to a pop is lost", "line", load=None)
def _(plant: Plant) -> None:
    before = plant.redis.line.lost
    faults.lose_redis_reply(plant, "BRPOP", "execute")
    plant.client.ask(plant.thread("popped"), 0)
    plant.stack.wait("the loss", lambda: plant.redis.line.lost > before, 90)
    plant.mended()
    with closing(plant.redis.client()) as client:
        assert client.llen("agent_events:celery") == 0
    assert not plant.llm.requests


@scenario(14, "the reply to an addition is lost", "line", load=LONG)
def _(plant: Plant) -> None:
    before = plant.redis.line.lost
    faults.lose_redis_reply(plant, "XADD")
    plant.stack.wait("the loss", lambda: plant.redis.line.lost > before, 90)


@scenario(13, "all replies are lost", "line")
def _(plant: Plant) -> None:
    faults.deafen_redis(plant, 3)


@scenario(15, "Redis sleeps", "line")
def _(plant: Plant) -> None:
    faults.sleep_redis(plant, 5)


@scenario(15, "Redis is slow", "line")
def _(plant: Plant) -> None:
    faults.slow_redis(plant, 5, 1000)


@scenario(16, "the database crashes", "database", vendors=ONLY_POSTGRESQL, allowed=AWAY)
def _(plant: Plant) -> None:
    faults.crash_database(plant, 1)


@scenario(
    17, "replies to commits are lost", "database", vendors=ONLY_POSTGRESQL, load=LONG, allowed=AWAY
)
def _(plant: Plant) -> None:
    before = plant.postgresql.line.lost
    for count in range(1, 9):
        faults.lose_commit_reply(plant, nth=count % 3 + 1)
        plant.stack.wait(
            "the loss", lambda count=count: plant.postgresql.line.lost == before + count, 90
        )


@scenario(18, "the database is a black hole", "database", vendors=ONLY_POSTGRESQL, allowed=AWAY)
def _(plant: Plant) -> None:
    faults.blackhole_database(plant, 5)


@scenario(
    18,
    "the database has no connections",
    "database",
    vendors=ONLY_POSTGRESQL,
    load=LONG,
    allowed=AWAY,
)
def _(plant: Plant) -> None:
    faults.limit_connections(plant, 5)
    assert plant.client.refusals, "There were connections enough."


@scenario(19, "the database ends a deadlock", "database", vendors=ONLY_POSTGRESQL, load=None)
def _(plant: Plant) -> None:
    plant.llm.script(Reply(latency=5))
    asked = plant.client.ask(plant.thread("deadlock"), 0)
    plant.llm.wait_for_requests()
    faults.deadlock(plant, asked)
    plant.mended()
    plant.stack.wait("word of it", lambda: "deadlock detected" in plant.stack.log(), 90)


@scenario(20, "SQLite is locked", "database", vendors=ONLY_SQLITE, allowed=AWAY)
def _(plant: Plant) -> None:
    faults.lock_sqlite(plant, 3)


@scenario(20, "SQLite is locked for long", "slow", vendors=ONLY_SQLITE, allowed=AWAY)
def _(plant: Plant) -> None:
    faults.lock_sqlite(plant, 30)


@scenario(21, "the disk is full", "database", vendors=ONLY_SQLITE, load=LONG, allowed=AWAY)
def _(plant: Plant) -> None:
    faults.fill_disk(plant, 4)
    assert plant.client.refusals, "The disk was not full."


@scenario(22, "the clock of a worker is an hour fast", "worker", load=None)
def _(plant: Plant) -> None:
    _with_clock(plant, 3600)


@scenario(22, "the clock of a worker is an hour slow", "worker", load=None)
def _(plant: Plant) -> None:
    _with_clock(plant, -3600)


def _with_clock(plant: Plant, offset: int) -> None:
    """Let one worker do all the work, so that the fault is seen."""
    with faults.wrong_clock(plant, offset) as seconds_off:
        with plant.load(12).running():
            pass
        plant.mended()
        plant.settle()
        assert {round(seconds / 600) for seconds in seconds_off()} == {offset // 600}


@scenario(38, "twenty ask with the same key", "http", load=None)
def _(plant: Plant) -> None:
    thread, key = plant.thread("same"), f"key-{plant.number()}"

    def ask(content: str) -> tuple[int, Any]:
        body = {"content": content, "threadId": thread}
        return plant.client.call("POST", "/api/chat/messages", body, **{"Idempotency-Key": key})

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(ask, ["the same"] * 20))
    assert {status for status, _ in answers} == {202}
    assert len({answer["runId"] for _, answer in answers}) == 1
    assert ask("another")[0] == 422
    found = plant.database.rows(f"SELECT count(*) FROM chat_message WHERE thread_id = '{thread}'")
    assert found[0][0] in (1, 2)
    plant.client.asked.append(Asked(thread, 0, "the same", answers[0][1]["runId"]))
    plant.mended()


@scenario(40, "runs are cancelled at any moment", "http", load=None)
def _(plant: Plant) -> None:
    chance = random.Random(40)

    def person(number: int) -> None:
        thread = plant.thread(f"cancel-{number}")
        for turn in range(4):
            asked = plant.client.ask(thread, turn)
            time.sleep(chance.uniform(0, 0.8))
            assert plant.client.cancel(asked) in (202, 409)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(person, range(8)))
    plant.mended()
    plant.settle()
    states = {status for (status,) in plant.database.rows("SELECT DISTINCT status FROM agents_run")}
    assert "cancelled" in states
