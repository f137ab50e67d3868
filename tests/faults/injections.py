"""The faults: each is injected and repaired by one call, whose arguments set its extent. The
scenarios and the random schedule draw on the same ones."""

from __future__ import annotations

import os
import resource
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import redis

from tests.faults.client import Asked
from tests.faults.plant import WORKERS, Plant
from tests.faults.servers import ROLE, SQLite
from tests.synapse import wait_for

Fault = Callable[..., None]
PAGE = 4096


def kill(plant: Plant, program: str) -> None:
    plant.kill(program)


def terminate(plant: Plant, program: str) -> None:
    """As a deployment does: what runs may end, or is handed back."""
    plant.kill(program, signal.SIGTERM)


def kill_all(plant: Plant) -> None:
    for program in (*WORKERS, "web", "realm"):
        plant.kill(program)


def pause(plant: Plant, program: str, seconds: float) -> None:
    """Freeze it, as a moved virtual machine, and let it continue."""
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
    """Fill it up: commands that add data are refused."""
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


def fail_to_save(plant: Plant, seconds: float) -> None:
    """Redis cannot write its file, and refuses every write until it can."""
    with closing(plant.redis.client()) as client:
        folder = client.config_get("dir")["dir"]
        client.config_set("save", "3600 1")
        client.config_set("dir", "/proc")
        client.bgsave()
        wait_for("the save to fail", lambda: client.info()["rdb_last_bgsave_status"] == "err")
        time.sleep(seconds)
        client.config_set("dir", folder)
        client.config_set("save", "")


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


def limit_connections(plant: Plant, seconds: float, most: int = 2) -> None:
    """Refuse nearly all connections, and end the open ones."""
    with plant.postgresql.connect() as server:
        server.execute(f"ALTER ROLE {ROLE} CONNECTION LIMIT {most}")
        server.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = %s", [ROLE]
        )
        time.sleep(seconds)
        server.execute(f"ALTER ROLE {ROLE} CONNECTION LIMIT -1")


def deadlock(plant: Plant, asked: Asked) -> None:
    """Somebody takes the rows of a run's thread and of the run the wrong way round; the database ends
    the transaction of the one that waits for the shorter time, which is the system's. The run has been
    claimed: a claim would wait for the thread with nothing in hand."""
    with plant.postgresql.connect() as server, server.transaction():
        server.execute("SET deadlock_timeout = '60s'")
        # The outcome has changed the run when it waits for the thread, which its answer refers to.
        server.execute("SELECT 1 FROM chat_thread WHERE id = %s FOR UPDATE", [asked.thread_id])
        waiting = f"""
            SELECT 1 FROM pg_stat_activity
             WHERE {server.info.backend_pid} = ANY(pg_blocking_pids(pid)) AND NOT EXISTS (
                   SELECT 1 FROM agents_run WHERE id = '{asked.run_id}' FOR UPDATE SKIP LOCKED)"""
        wait_for("the outcome to wait", lambda: plant.database.rows(waiting), 90)
        server.execute("SELECT 1 FROM agents_run WHERE id = %s FOR UPDATE", [asked.run_id])


def lock_sqlite(plant: Plant, seconds: float) -> None:
    """Another program has the file to itself."""
    assert isinstance(plant.database, SQLite)
    with closing(sqlite3.connect(plant.database.path, timeout=60, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        time.sleep(seconds)
        other.execute("ROLLBACK")


def fill_disk(plant: Plant, seconds: float) -> None:
    """No file of the system's processes may grow beyond a page, the database's journal included."""
    assert isinstance(plant.database, SQLite)
    pids = [
        pid for name, pids in plant.stack.processes().items() if name != "stack" for pid in pids
    ]
    unlimited = resource.RLIM_INFINITY
    for pid in pids:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (PAGE, unlimited))
    time.sleep(seconds)
    for pid in pids:
        with suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (unlimited, unlimited))


@contextmanager
def wrong_clock(plant: Plant, offset: int) -> Iterator[Callable[[], list[float]]]:
    """One worker alone, whose clock is so many seconds off; for each attempt that it has ended, how
    many it was."""
    with plant.stack._supervisor() as supervisor:
        environment = {
            "PYTHONPATH": str(Path(__file__).parent / "clock"),
            "FAULTS_CLOCK_OFFSET": str(offset),
        }
        worker = plant.extra_worker(**environment)
        for program in WORKERS:
            supervisor.stopProcess(program)
    query = f"SELECT started_at FROM agents_attempt WHERE worker LIKE '%:{worker.pid}:%'"

    def seconds_off() -> list[float]:
        times = (datetime.fromisoformat(str(at)) for (at,) in plant.database.rows(query))
        return [at.replace(tzinfo=at.tzinfo or UTC).timestamp() - time.time() for at in times]

    try:
        yield seconds_off
    finally:
        with plant.stack._supervisor() as supervisor:
            for program in WORKERS:
                supervisor.startProcess(program, False)
        worker.terminate()
        worker.wait(90)


def lose_commit_reply(plant: Plant, nth: int = 1) -> None:
    plant.postgresql.line.lose_reply(b"COMMIT", nth=nth)
