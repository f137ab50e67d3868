"""What the system takes: processor time for a run, memory for each process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable

from tests.benchmarks.load import Connection, paced
from tests.benchmarks.system import Result, System, ask

RUNS_PER_SECOND = 20
DELTAS = 8


async def cpu(system: System) -> AsyncIterator[Result]:
    """Of all processes of the system; their idle share is included, and shown as well."""
    idle = await _cpu_while(system, asyncio.sleep(system.scaled(5, 2)))
    idle_seconds = idle.pop("seconds")
    yield Result("cpu", "idle, ms a second", _rounded(idle, idle_seconds))
    total = system.scaled(500, 60)
    for gap in (0, 5):
        system.llm.configure(latency=0.05, deltas=DELTAS, delta_latency=gap / 1000)
        used = await _cpu_while(system, _steady(system, total))
        used.pop("seconds")
        of = f"{DELTAS} deltas, {gap} ms apart, ms a run"
        yield Result("cpu", of, _rounded(used, total))


async def _steady(system: System, total: int) -> None:
    runs: list[str] = []

    async def send(connection: Connection) -> None:
        runs.append((await ask(connection))["runId"])

    async with system.outcomes() as outcomes, system.clients(32) as opened:
        await paced(opened, send, per_second=RUNS_PER_SECOND, total=total)
        await outcomes.of(runs)


async def _cpu_while(system: System, work: Awaitable[None]) -> dict[str, float]:
    """CPU seconds by program while `work` goes on, and the seconds of the clock."""
    before, begun = system.stack.cpu_seconds(), time.perf_counter()
    await work
    after = system.stack.cpu_seconds()
    used = {name: after[name] - before.get(name, 0) for name in after}
    return {**used, "total": sum(used.values()), "seconds": time.perf_counter() - begun}


def _rounded(used: dict[str, float], divisor: float) -> dict[str, float]:
    return {name: round(seconds / divisor * 1000, 2) for name, seconds in used.items()}


def memory(system: System, when: str) -> Result:
    """MB of each program."""
    used = system.stack.memory()
    used.pop("ready", None)  # it only waits for the start, and ends then
    return Result("memory", when, {**used, "total": round(sum(used.values()), 1)})
