"""Whether a long thread is slower than a short one: it should not be."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator

from tests.benchmarks.load import Connection, closed_loop, milliseconds
from tests.benchmarks.system import Result, System, ask_and_wait
from tests.system.stack import BASE_DIR

LENGTHS = (10, 1_000, 10_000)

# Run with the stack's own settings. The summary reaches as far as it does in a thread that grew.
SEED = """
from django.conf import settings
from django.db import connection
from chat.models import Message, Thread

thread = Thread.objects.create(
    turns={length} // 2,
    summary="They talked about the northern depot." if {length} > 10 else "",
    summary_reach=max(-1, {length} - settings.CHAT_MEMORY_RECENT_MESSAGES - 1),
)
Message.objects.bulk_create(
    (
        Message(
            thread=thread,
            position=position,
            role=("user", "assistant")[position % 2],
            content=f"Message {{position}}: " + "nothing new from the northern depot. " * 4,
            correlation_id="seeded",
        )
        for position in range({length})
    ),
    batch_size=500,
)
if connection.vendor == "postgresql":
    # What autovacuum has long done for a thread that grew.
    connection.cursor().execute("ANALYZE")
print(thread.pk)
"""


async def history(system: System) -> AsyncIterator[Result]:
    system.llm.configure(latency=0)
    for length in LENGTHS:
        thread = await asyncio.to_thread(_seed, system, length)
        yield await _read(system, thread, length)
        yield await _ask(system, thread, length)


async def _read(system: System, thread: str, length: int) -> Result:
    async def send(connection: Connection) -> None:
        await connection.get(f"/api/chat/threads/{thread}/messages")

    async with system.clients(1) as opened:
        total = system.scaled(300, 30)
        seconds, duration = await closed_loop(opened, send, total=total)
    figures = {"per_second": round(total / duration, 1), **milliseconds(seconds)}
    return Result("history", f"first page of {length}", figures)


async def _ask(system: System, thread: str, length: int) -> Result:
    async def send(connection: Connection) -> None:
        await ask_and_wait(connection, thread)

    system.llm.configure(latency=0)
    async with system.clients(1) as opened:
        total = system.scaled(50, 10)
        seconds, _ = await closed_loop(opened, send, total=total)
    calls = system.llm.stats()["calls"]
    figures = milliseconds(seconds) | {"model_calls": round(calls / total, 2)}
    return Result("history", f"question after {length}", figures)


def _seed(system: System, length: int) -> str:
    command = [sys.executable, "manage.py", "shell", "-c", SEED.format(length=length)]
    env = system.stack.env | {"REDIS_URL": system.stack.redis_url}
    output = subprocess.run(
        command, cwd=BASE_DIR, env=os.environ | env, check=True, capture_output=True, text=True
    )
    return output.stdout.split()[-1]
