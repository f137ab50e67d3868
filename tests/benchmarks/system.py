"""What the cases measure: the whole stack, a fake model beside it, and a look at its stream."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Collection, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import orjson
import redis.asyncio

from tests.benchmarks.load import Connection, connections
from tests.fakes.llm import LLMProcess
from tests.system.stack import Stack

CONTENT = "What is the state of the northern depot, and what should be done about it today?"
STREAM = "agent_events"


@dataclass(frozen=True)
class Result:
    """One measurement; `of` distinguishes it within its case."""

    case: str
    of: str
    figures: dict[str, float]

    def as_json(self) -> str:
        return orjson.dumps({"case": self.case, "of": self.of, **self.figures}).decode()


@dataclass(frozen=True)
class System:
    stack: Stack
    llm: LLMProcess
    quick: bool

    def scaled(self, full: int, quick: int) -> int:
        return quick if self.quick else full

    @asynccontextmanager
    async def clients(self, count: int) -> AsyncIterator[list[Connection]]:
        async with connections(self.stack.url, count) as opened:
            yield opened

    @asynccontextmanager
    async def outcomes(self) -> AsyncIterator[Outcomes]:
        async with self.stack.redis_server.async_client(timeout=10) as client:
            outcomes = Outcomes(client)
            watch = asyncio.create_task(outcomes.watch(await outcomes.newest()))
            try:
                yield outcomes
            finally:
                # redis-py swallows a cancellation now and then.
                outcomes.over = True
                await watch


class Outcomes:
    """The ends of runs, read from the stream: the measured system gets no request for them."""

    def __init__(self, client: redis.asyncio.Redis) -> None:
        self._redis = client
        self._ended = asyncio.Event()
        self.over = False
        # The events that end each run: the stream may repeat one, but must not have two.
        self.ended: dict[str, dict[str, float]] = defaultdict(dict)
        self.failed: dict[str, dict[str, Any]] = {}

    async def newest(self) -> str:
        entries: Any = await self._redis.xrevrange(STREAM, count=1)
        return entries[0][0].decode() if entries else "0"

    async def watch(self, after: str) -> None:
        while not self.over:
            read = await self._redis.xread({STREAM: after}, count=1000, block=200)
            for entry, fields in _entries(read):
                after = entry
                self._take(fields[b"event"])
            self._ended.set()

    async def of(self, runs: Collection[str], seconds: float = 120) -> list[float]:
        """When each of the runs ended (`time.perf_counter()`), as soon as all have. Each exactly
        once, and well."""
        deadline = time.perf_counter() + seconds
        while missing := [run for run in runs if run not in self.ended]:
            if time.perf_counter() > deadline:
                raise TimeoutError(
                    f"{len(missing)} of {len(runs)} runs have not ended: {missing[:3]}"
                )
            self._ended.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), 1)
        if twice := [run for run in runs if len(self.ended[run]) > 1]:
            raise AssertionError(f"{len(twice)} runs ended more than once, such as {twice[:3]}")
        if failed := [self.failed[run] for run in runs if run in self.failed]:
            raise AssertionError(f"{len(failed)} runs failed, such as {failed[0]}")
        return [next(iter(self.ended[run].values())) for run in runs]

    def _take(self, raw: bytes) -> None:
        if b'"agent.run.requested"' in raw:
            return
        event = orjson.loads(raw)
        run = event["payload"]["runId"]
        self.ended[run].setdefault(event["id"], time.perf_counter())
        if event["type"] != "agent.run.completed":
            self.failed[run] = event["payload"]


async def ask(connection: Connection, thread: str | None = None) -> dict[str, Any]:
    """POST a message; without a thread, into a new one."""
    body = {"content": CONTENT} | ({"threadId": thread} if thread else {})
    return dict(await connection.post("/api/chat/messages", body))


async def ask_and_wait(connection: Connection, thread: str | None = None) -> dict[str, Any]:
    """POST a message and stay for its outcome."""
    body = {"content": CONTENT} | ({"threadId": thread} if thread else {})
    answer = await connection.post("/api/chat/messages", body, "Prefer: wait=30\r\n")
    if answer.get("status") != "completed":
        raise AssertionError(f"No outcome within the wait: {answer}")
    return dict(answer)


def _entries(read: Any) -> Iterable[tuple[str, dict[bytes, bytes]]]:
    # RESP3 answers a dict of lists of batches, RESP2 a list of pairs.
    pairs = read.items() if isinstance(read, dict) else read or ()
    for _, batches in pairs:
        entries = batches[0] if isinstance(read, dict) else batches
        for entry, fields in entries:
            yield entry.decode(), fields
