"""The faults: each is injected and mended again by one call, whose arguments say how bad it is. The
scenarios and the random schedule draw on the same ones."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import closing, suppress

import redis

from tests.faults.plant import WORKERS, Plant

Fault = Callable[..., None]


def kill(plant: Plant, program: str) -> None:
    plant.kill(program)


def terminate(plant: Plant, program: str) -> None:
    """As a deployment does: what runs may end, or is handed back."""
    plant.kill(program, signal.SIGTERM)


def kill_all(plant: Plant) -> None:
    for program in (*WORKERS, "web", "realm"):
        plant.kill(program)


def pause(plant: Plant, program: str, seconds: float) -> None:
    """It stands still, as a virtual machine does that is moved, and wakes as if nothing had been."""
    pid = plant.kill(program, signal.SIGSTOP)
    time.sleep(seconds)
    if pid:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def stop_redis(plant: Plant, seconds: float) -> None:
    plant.redis.shut_down()
    time.sleep(seconds)
    plant.redis.start()


def kill_redis(plant: Plant, seconds: float = 0) -> None:
    plant.redis.kill()
    time.sleep(seconds)
    plant.redis.start()


def wipe_redis(plant: Plant) -> None:
    with closing(plant.redis.client()) as client:
        client.flushall()


def drop_stream(plant: Plant) -> None:
    with closing(plant.redis.client()) as client:
        client.delete("agent_events")


def drop_group(plant: Plant) -> None:
    with closing(plant.redis.client()) as client, suppress(redis.ResponseError):
        client.xgroup_destroy("agent_events", "agent_runtime")


def fill_redis(plant: Plant, seconds: float) -> None:
    """No room for anything: whatever adds data is refused."""
    with closing(plant.redis.client()) as client:
        # Below what an empty Redis takes.
        client.config_set("maxmemory", "500kb")
        time.sleep(seconds)
        client.config_set("maxmemory", 0)


def forbid_writes(plant: Plant, seconds: float) -> None:
    """Redis refuses every write: it waits for a replica that is not there."""
    with closing(plant.redis.client()) as client:
        client.config_set("min-replicas-to-write", 1)
        time.sleep(seconds)
        client.config_set("min-replicas-to-write", 0)


def sleep_redis(plant: Plant, seconds: float) -> None:
    with closing(plant.redis.client()) as client:
        client.execute_command("DEBUG", "SLEEP", seconds)


def blackhole_redis(plant: Plant, seconds: float, then_reset: bool = False) -> None:
    plant.redis.line.blackhole()
    time.sleep(seconds)
    if then_reset:
        plant.redis.line.reset()
    plant.redis.line.restore()


def reset_redis(plant: Plant) -> None:
    plant.redis.line.reset()


def refuse_redis(plant: Plant, seconds: float) -> None:
    plant.redis.line.refuse()
    time.sleep(seconds)
    plant.redis.line.restore()


def slow_redis(plant: Plant, seconds: float, bytes_per_second: float) -> None:
    plant.redis.line.slow(bytes_per_second)
    time.sleep(seconds)
    plant.redis.line.restore()


def deafen_redis(plant: Plant, seconds: float) -> None:
    """Whatever Redis answers is lost, and then the connections are."""
    plant.redis.line.drop_replies()
    time.sleep(seconds)
    plant.redis.line.reset()
    plant.redis.line.restore()


def lose_redis_reply(plant: Plant, request: str, reply: str = "", nth: int = 1) -> None:
    plant.redis.line.lose_reply(request.encode(), reply.encode(), nth)


def crash_database(plant: Plant, seconds: float = 0) -> None:
    plant.postgresql.stop()
    time.sleep(seconds)
    plant.postgresql.start()


def blackhole_database(plant: Plant, seconds: float, then_reset: bool = False) -> None:
    plant.postgresql.line.blackhole()
    time.sleep(seconds)
    if then_reset:
        plant.postgresql.line.reset()
    plant.postgresql.line.restore()


def reset_database(plant: Plant) -> None:
    plant.postgresql.line.reset()


def refuse_database(plant: Plant, seconds: float) -> None:
    plant.postgresql.line.refuse()
    time.sleep(seconds)
    plant.postgresql.line.restore()


def lose_commit_reply(plant: Plant, nth: int = 1) -> None:
    plant.postgresql.line.lose_reply(b"COMMIT", nth=nth)
