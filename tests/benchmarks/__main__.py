"""Measure the whole system on this machine: `python -m tests.benchmarks [case ...]`. To compare two
commits: `python -m tests.benchmarks compare BASE=<commit>` (compare.py).

One line of JSON for each measurement on stdout, a table for people on stderr at the end. The model
is a fake that answers after a fixed time; load generator, fake and system share the processors.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import orjson
import psutil

from tests.benchmarks import compare
from tests.benchmarks.footprint import cpu, memory
from tests.benchmarks.history import history
from tests.benchmarks.ingest import ingest
from tests.benchmarks.rooms import rooms
from tests.benchmarks.runs import first_question, latency, throughput
from tests.benchmarks.streams import streams
from tests.benchmarks.system import Result, System
from tests.fakes.llm import LLMProcess
from tests.system.stack import Stack, process_cpu_seconds

CASES: dict[str, Callable[[System], AsyncIterator[Result]]] = {
    "ingest": ingest,
    "latency": latency,
    "throughput": throughput,
    "history": history,
    "cpu": cpu,
    "stream": streams,
    "rooms": rooms,
}


def main() -> None:
    # As Ctrl-C does, so that nothing is left running.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if sys.argv[1:2] == ["compare"]:
        sys.exit(compare.main(sys.argv[2:]))
    options = _options()
    env = dict(each.split("=", 1) for each in options.env)
    if options.database_url:
        env["DATABASE_URL"] = options.database_url
    _show({"case": "machine", **_machine(options.database_url)})
    with LLMProcess() as llm, Stack(llm.url, **env) as stack:
        try:
            results = asyncio.run(_measure(System(stack, llm, options.quick), options.cases))
        except Exception:
            print(stack.log()[-10_000:], file=sys.stderr)
            raise
    print(_table(results, _earlier(options.compare)), file=sys.stderr)


async def _measure(system: System, cases: list[str]) -> list[Result]:
    results = [memory(system, "after the start"), await first_question(system)]
    for result in results:
        _show(result.as_json())
    for case in cases:
        before = _busy()
        async for result in CASES[case](system):
            _show(result.as_json())
            results.append(result)
        results.append(_others(case, before, _busy()))
        _show(results[-1].as_json())
    results.append(memory(system, "at the end"))
    _show(results[-1].as_json())
    return results


def _busy() -> tuple[float, float, float]:
    """Return the clock and the CPU seconds so far, of the whole machine and of our own processes."""
    machine = psutil.cpu_times()
    ours = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return (
        time.perf_counter(),
        sum(machine) - machine.idle - getattr(machine, "iowait", 0),
        sum(process_cpu_seconds(process.pid) for process in ours),
    )


def _others(case: str, before: tuple[float, ...], after: tuple[float, ...]) -> Result:
    """How much of the machine others took meanwhile: figures with much of it are not to be compared
    with figures with little."""
    seconds, machine, ours = (b - a for a, b in zip(before, after, strict=True))
    return Result(
        "machine", f"others during {case}", {"cores": round((machine - ours) / seconds, 2)}
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="case", help=", ".join(CASES))
    parser.add_argument("--quick", action="store_true", help="few repetitions: does it run at all?")
    parser.add_argument("--database-url", default="", help="an empty database; default: SQLite")
    parser.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of the system, such as WORKER_CONCURRENCY=200",
    )
    parser.add_argument("--compare", type=Path, help="the JSON lines of an earlier time")
    options = parser.parse_args()
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    options.cases = options.cases or list(CASES)
    return options


def _machine(database_url: str) -> dict[str, Any]:
    return {
        "cores": psutil.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
        "database": database_url.partition(":")[0] or "sqlite",
    }


def _earlier(path: Path | None) -> dict[tuple[str, str], dict[str, float]]:
    if path is None:
        return {}
    lines = [line for line in path.read_text().splitlines() if line.startswith("{")]
    results = [orjson.loads(line) for line in lines]
    return {(r["case"], r["of"]): r for r in results if "of" in r}


def _table(results: list[Result], earlier: dict[tuple[str, str], dict[str, float]]) -> str:
    """One line for each measurement; in brackets how many times the earlier figure it is."""
    lines = []
    for result in results:
        before = earlier.get((result.case, result.of), {})
        figures = (
            f"{name} {value:g}" + (f" (x{value / before[name]:.2f})" if before.get(name) else "")
            for name, value in result.figures.items()
        )
        lines.append(f"{result.case:11}{result.of:32}{'  '.join(figures)}")
    return "\n".join(lines)


def _show(line: str | dict[str, Any]) -> None:
    print(line if isinstance(line, str) else orjson.dumps(line).decode(), flush=True)


if __name__ == "__main__":
    main()
