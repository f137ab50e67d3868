"""From the question to its recorded outcome."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from statistics import median

from tests.benchmarks.load import Connection, closed_loop, milliseconds
from tests.benchmarks.system import Result, System, ask, ask_and_wait

AT_ONCE = 200


async def first_question(system: System) -> Result:
    """Warm the processes up: they import and connect on first use."""
    system.llm.configure(latency=0)
    async with system.clients(1) as opened:
        (seconds,), _ = await closed_loop(opened, ask_and_wait, total=1)
    return Result("latency", "first question", {"ms": _ms(seconds)})


async def latency(system: System) -> AsyncIterator[Result]:
    """One in flight: what the system adds to the time that the model itself saw go by."""
    async with system.clients(1) as opened:
        for milliseconds_of_model in (0, 50):
            system.llm.configure(latency=milliseconds_of_model / 1000)
            await closed_loop(opened, ask_and_wait, total=system.scaled(10, 3))
            system.llm.configure(latency=milliseconds_of_model / 1000)
            seconds, _ = await closed_loop(opened, ask_and_wait, total=system.scaled(200, 30))
            model = system.llm.stats()["p50"]
            figures = milliseconds(s - model for s in seconds) | {"model_ms": _ms(model)}
            yield Result("latency", f"model {milliseconds_of_model} ms", figures)


async def throughput(system: System) -> AsyncIterator[Result]:
    """200 questions in 200 threads at once, from the first POST to the last outcome."""
    for milliseconds_of_model in (0, 50, 500):
        system.llm.configure(latency=milliseconds_of_model / 1000)
        rates = [await _all_at_once(system) for _ in range(system.scaled(3, 1))]
        figures = {
            "runs_per_second": round(median(rates), 1),
            "least": round(min(rates), 1),
            "most": round(max(rates), 1),
            "model_ms": _ms(system.llm.stats()["p50"]),
        }
        yield Result("throughput", f"model {milliseconds_of_model} ms", figures)


async def _all_at_once(system: System) -> float:
    async with system.outcomes() as outcomes, system.clients(AT_ONCE) as opened:
        begun = time.perf_counter()
        asked = await asyncio.gather(*(ask(connection) for connection in opened))
        ended = await outcomes.of([answer["runId"] for answer in asked])
    # On another connection: the server has closed those that were idle for 5 s.
    async with system.clients(1) as (connection,):
        for answer in asked:
            await _check_answered_once(connection, answer["runId"], answer["threadId"])
    return AT_ONCE / (max(ended) - begun)


async def _check_answered_once(connection: Connection, run: str, thread: str) -> None:
    """Read the rows, as the stream may be wrong."""
    status = (await connection.get(f"/api/chat/runs/{run}"))["run"]["status"]
    page = await connection.get(f"/api/chat/threads/{thread}/messages")
    roles = [message["role"] for message in page["messages"]]
    if (status, roles) != ("completed", ["user", "assistant"]):
        raise AssertionError(f"{run} is {status}, its thread has {roles}")


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 2)
