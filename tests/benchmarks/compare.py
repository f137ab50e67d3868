"""Compare this working tree with another commit: `make bench ARGS="compare BASE=<commit>"`.

    BASE=<commit>   what to compare with
    HEAD=<commit>   compare this commit instead of the working tree
    ROUNDS=<n>      how many rounds, 10; two at least
    start ...       measure these cases only: start, accept, run, throughput, history, stream, memory

Both builds are made by `make run`, each with its own .venv, and driven by HTTP with the drivers of this
tree. A round starts a stack of the one build and then one of the other; every second round begins with
the other. One line of JSON for each stack and then for each figure on stdout, a table for people on
stderr.

Exit status: 0 if no figure is slower, 1 if one is, 2 if nothing could be measured.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import orjson

from tests.benchmarks.builds import (
    FINISHED,
    Build,
    BuildFailed,
    Running,
    built,
    commit_of,
    status_of,
)
from tests.benchmarks.load import BadAnswer, Connection, closed_loop, connections, paced
from tests.benchmarks.ratios import Figure, Ratio, ratios, table
from tests.benchmarks.streams import Stream, open_streams, question
from tests.benchmarks.system import ask, ask_and_wait

ROUNDS = 10
AT_ONCE = 150
SETTLE_SECONDS = 120
# A build that does not start or answer as it should; errors of git and make.
FAILURES = (BuildFailed, BadAnswer, AssertionError, OSError, subprocess.SubprocessError)
Values = dict[str, float]

FIGURES = [
    Figure("start", "s"),
    Figure("accept p50", "ms"),
    Figure("ingest", "1/s", rises=True),
    Figure("run above model p50", "ms"),
    Figure("throughput, model 0 ms", "1/s", rises=True),
    Figure("throughput, model 50 ms", "1/s", rises=True),
    Figure("cpu of a run", "ms"),
    Figure("history page p50", "ms"),
    Figure("frame p50", "ms"),
    Figure("200 deltas, 16 streams", "s"),
    Figure("memory of web", "MB"),
    Figure("memory of worker", "MB"),
]


@dataclass(frozen=True)
class Options:
    base: str
    head: str = ""
    rounds: int = ROUNDS
    cases: tuple[str, ...] = ()


class Usage(Exception):
    """The arguments are not what the module's docstring describes."""


def parsed(arguments: Sequence[str]) -> Options:
    """Parse the options `NAME=value ... case ...`."""
    named = dict(each.split("=", 1) for each in arguments if "=" in each)
    cases = tuple(each for each in arguments if "=" not in each)
    if unknown := [*(set(named) - {"BASE", "HEAD", "ROUNDS"}), *(set(cases) - set(CASES))]:
        raise Usage(f"Unknown: {', '.join(sorted(unknown))}.")
    if not named.get("BASE"):
        raise Usage("BASE is missing: name the commit to compare with.")
    rounds = named.get("ROUNDS", str(ROUNDS))
    if not (rounds.isascii() and rounds.isdigit() and int(rounds) >= 2):
        raise Usage(f"ROUNDS={rounds} gives no interval: use a whole number of 2 or more.")
    return Options(named["BASE"], named.get("HEAD", ""), int(rounds), cases or tuple(CASES))


def main(arguments: Sequence[str]) -> int:
    try:
        options = parsed(arguments)
        found = _compare(options)
    except Usage as error:
        print(f"{error}\n\n{__doc__}", file=sys.stderr)
        return 2
    except FAILURES as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    for each in found:
        _show(each.as_json())
    print(table(found), file=sys.stderr)
    return int(any(each.is_slower for each in found))


def _compare(options: Options) -> list[Ratio]:
    base = commit_of(options.base)
    head = commit_of(options.head) if options.head else ""
    _show(
        {"case": "compare", "base": base, "head": head or "working tree", "rounds": options.rounds}
    )
    rounds: list[dict[str, Values]] = []
    with built(base, head) as builds:
        for build in builds:
            print(f"Making {build.name}", file=sys.stderr, flush=True)
            build.make()
        for number in range(options.rounds):
            measured: dict[str, Values] = {}
            for build in order(builds, number):
                measured[build.name] = _measure(build, options.cases)
                line = {"round": number + 1, "build": build.name, **measured[build.name]}
                _show({"case": "compare", **line})
            rounds.append(measured)
    return ratios(FIGURES, rounds)


def order(builds: tuple[Build, Build], number: int) -> tuple[Build, Build]:
    """Return base first in rounds of even number, head first in the others."""
    first, second = builds
    return (second, first) if number % 2 else (first, second)


@dataclass
class Subject:
    """A stack under measurement, and the figures so far."""

    running: Running
    values: Values = field(default_factory=dict)

    def configure(self, **reply: Any) -> None:
        self.running.llm.configure(**reply)

    @asynccontextmanager
    async def clients(self, count: int) -> AsyncIterator[list[Connection]]:
        async with connections(self.running.url, count) as opened:
            yield opened


def _measure(build: Build, cases: Sequence[str]) -> Values:
    # What blocks stays outside of the loop, which would hold back a Ctrl-C until it is over.
    with build.running() as running:
        values = asyncio.run(_values(running, cases))
    return {name: float(f"{value:.5g}") for name, value in values.items()}


async def _values(running: Running, cases: Sequence[str]) -> Values:
    subject = Subject(running)
    started = await running.answer()
    if "start" in cases:
        subject.values["start"] = started
    for name, case in CASES.items():
        if name in cases:
            await case(subject)
    return subject.values


async def _start(subject: Subject) -> None:
    """Measured already: each stack is started."""


async def _accept(subject: Subject) -> None:
    """POST of a message at a pace that the system keeps up with, then as fast as it goes."""
    subject.configure(latency=0)
    runs: list[str] = []

    async def send(connection: Connection) -> None:
        runs.append((await ask(connection))["runId"])

    # On new connections each: the server closes those that were idle for 5 s.
    async with subject.clients(16) as opened:
        await closed_loop(opened, send, total=32)
    await _settle(subject, runs)
    async with subject.clients(16) as opened:
        seconds = await paced(opened, send, per_second=25, total=125)
    await _settle(subject, runs)
    async with subject.clients(16) as opened:
        _, duration = await closed_loop(opened, send, total=400)
    await _settle(subject, runs)
    subject.values["accept p50"] = median(seconds) * 1000
    subject.values["ingest"] = 400 / duration


async def _settle(subject: Subject, runs: list[str]) -> None:
    """Wait until all of these have completed, and forget them: workers are idle then."""
    async with asyncio.timeout(SETTLE_SECONDS), subject.clients(1) as (connection,):
        for run in runs:
            while (status := await status_of(connection, run)) not in FINISHED:
                await asyncio.sleep(0.05)
            if status != "completed":
                raise BadAnswer(f"{run} is {status}.")
    runs.clear()


async def _run(subject: Subject) -> None:
    """One in flight: what the system adds to the time that the model itself saw go by."""
    async with subject.clients(1) as opened:
        await closed_loop(opened, ask_and_wait, total=5)
        subject.configure(latency=0.02)
        seconds, _ = await closed_loop(opened, ask_and_wait, total=80)
    model = subject.running.llm.stats()["p50"]
    subject.values["run above model p50"] = (median(seconds) - model) * 1000


async def _throughput(subject: Subject) -> None:
    """150 runs in flight, and the processor time of each."""
    subject.configure(latency=0)
    await _at_once(subject, AT_ONCE, AT_ONCE)
    total, used = 2 * AT_ONCE, 0.0
    for milliseconds in (0, 50):
        subject.configure(latency=milliseconds / 1000)
        before = subject.running.cpu_seconds()
        seconds = await _at_once(subject, AT_ONCE, total)
        used += subject.running.cpu_seconds() - before
        subject.values[f"throughput, model {milliseconds} ms"] = total / seconds
    subject.values["cpu of a run"] = used / (2 * total) * 1000


async def _at_once(subject: Subject, at_once: int, total: int) -> float:
    """Seconds for so many streamed runs, of which so many are in flight."""
    left = iter(range(total))

    async def work() -> None:
        for _ in left:
            await _streamed(subject)

    return await _seconds(asyncio.gather(*(work() for _ in range(at_once))))


async def _streamed(subject: Subject) -> Stream:
    """Ask, and follow the answer to its end."""
    (stream,) = await open_streams(subject.running.port, [question()])
    try:
        await asyncio.wait_for(stream.over.wait(), SETTLE_SECONDS)
    finally:
        stream.transport.close()
    if not stream.completed:
        raise BadAnswer(f"A stream ended before its run: {stream.run or 'no run'}")
    return stream


async def _history(subject: Subject) -> None:
    """Measure the first page of a thread of 40 messages."""
    subject.configure(latency=0)
    async with subject.clients(1) as opened:
        (connection,) = opened
        thread = (await ask_and_wait(connection))["threadId"]
        for _ in range(19):
            await ask_and_wait(connection, thread)

        async def read(connection: Connection) -> None:
            await connection.get(f"/api/chat/threads/{thread}/messages")

        await closed_loop(opened, read, total=20)
        seconds, _ = await closed_loop(opened, read, total=200)
    subject.values["history page p50"] = median(seconds) * 1000


async def _stream(subject: Subject) -> None:
    """How long a token is under way, and how long 16 answers of 200 deltas take at once."""
    subject.configure(latency=0, deltas=60, delta_latency=0.01, clock=True)
    lags = [lag for _ in range(4) for lag in (await _streamed(subject)).seconds]
    subject.values["frame p50"] = median(lags) * 1000
    subject.configure(latency=0, deltas=200, delta_latency=0.001)
    took = [await _at_once(subject, 16, 16) for _ in range(4)]
    subject.values["200 deltas, 16 streams"] = median(took[1:])


async def _memory(subject: Subject) -> None:
    """After all that was measured before."""
    used = subject.running.memory()
    subject.values |= {f"memory of {name}": megabytes for name, megabytes in used.items()}


async def _seconds(work: Awaitable[Any]) -> float:
    loop = asyncio.get_running_loop()
    begun = loop.time()
    await work
    return loop.time() - begun


CASES: dict[str, Callable[[Subject], Awaitable[None]]] = {
    "start": _start,
    "accept": _accept,
    "run": _run,
    "throughput": _throughput,
    "history": _history,
    "stream": _stream,
    "memory": _memory,
}


def _show(line: dict[str, Any]) -> None:
    print(orjson.dumps(line).decode(), flush=True)
