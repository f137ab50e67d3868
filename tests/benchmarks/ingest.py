"""How fast messages are taken in, while the workers carry out the runs that they ask for."""

from __future__ import annotations

from collections.abc import AsyncIterator

from tests.benchmarks.load import Connection, closed_loop, milliseconds, paced
from tests.benchmarks.system import Result, System, ask

PACE_PER_SECOND = 50


async def ingest(system: System) -> AsyncIterator[Result]:
    """Each message in a thread of its own."""
    system.llm.configure(latency=0.05)
    for count in (1, 16, 64):
        yield await _as_fast_as_it_goes(system, count)
    yield await _at_a_pace(system)


async def _as_fast_as_it_goes(system: System, count: int) -> Result:
    runs: list[str] = []

    async def send(connection: Connection) -> None:
        runs.append((await ask(connection))["runId"])

    async with system.outcomes() as outcomes, system.clients(count) as opened:
        await closed_loop(opened, ask, total=count)
        total = system.scaled(1000, 100)
        seconds, duration = await closed_loop(opened, send, total=total)
        # The next case begins with idle workers.
        await outcomes.of(runs)
    figures = {"per_second": round(total / duration, 1), **milliseconds(seconds)}
    return Result("ingest", f"{count} connections", figures)


async def _at_a_pace(system: System) -> Result:
    runs: list[str] = []

    async def send(connection: Connection) -> None:
        runs.append((await ask(connection))["runId"])

    async with system.outcomes() as outcomes, system.clients(64) as opened:
        seconds = await paced(
            opened,
            send,
            per_second=PACE_PER_SECOND,
            total=PACE_PER_SECOND * system.scaled(20, 3),
        )
        await outcomes.of(runs)
    return Result("ingest", f"{PACE_PER_SECOND} a second", milliseconds(seconds))
