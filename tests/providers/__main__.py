"""Run Botrealm against real model servers and print a table: `make providers ARGS="llamacpp litellm"`.

The exit status is 1 if a cell is wrong without a known reason, 2 if nothing could be run.
"""

from __future__ import annotations

import argparse
import sqlite3
import sys
import time
from collections.abc import Iterator

from tests.providers.cases import CASES, MAX_OUTPUT_TOKENS, Person, Wrong
from tests.providers.servers import SERVERS, Server, ServerError, install, make_model
from tests.system.stack import Stack, StackError

RIGHT = "right"


class Cell:
    """The result of a case at a server."""

    def __init__(self, text: str, *, reason: str = "", is_fault: bool = False) -> None:
        self.text, self.reason, self.is_fault = text, reason, is_fault


def _log(text: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")


def _cells(server: Server, cases: list[str]) -> Iterator[tuple[str, Cell]]:
    for environment in server.environments:
        _log(f"{server.name}: install {environment}")
        install(environment)
    _log(f"{server.name}: start")
    with server.start() as endpoint:
        settings = {
            "AGENT_TOOLS": "current_time",
            "AGENT_MAX_OUTPUT_TOKENS": str(MAX_OUTPUT_TOKENS),
            "CHAT_DEFAULT_MODEL": endpoint.model,
            **endpoint.settings,
        }
        with Stack(endpoint.url, **settings) as stack:
            person = Person(stack, endpoint)
            for case in cases:
                started = time.monotonic()
                cell = _cell(server, case, person)
                _log(f"{server.name}: {case}: {cell.text} ({time.monotonic() - started:.1f} s)")
                yield case, cell


def _cell(server: Server, case: str, person: Person) -> Cell:
    if case in server.skipped:
        return Cell("-", reason=server.skipped[case])
    if case == "rate limit" and case not in person.endpoint.failing:
        return Cell("-", reason="it limits nobody")
    try:
        CASES[case](person)
    except (Wrong, OSError, StackError, sqlite3.Error) as error:
        seen = " ".join(str(error).split())[:160]
        known, reason = server.known.get(case, ("", ""))
        if known and known in seen:
            return Cell(seen, reason=reason)
        return Cell(seen, is_fault=True)
    return Cell(RIGHT)


def _chosen(names: list[str]) -> list[Server]:
    """Return the servers whose names start with one of these, or all."""
    chosen = [s for s in SERVERS.values() if not names or any(map(s.name.startswith, names))]
    if not chosen:
        raise SystemExit(
            f"No server is named {' or '.join(names)}. There are: {', '.join(SERVERS)}."
        )
    return chosen


def _print(table: dict[str, dict[str, Cell]]) -> None:
    reasons: list[str] = []
    lines = ["| case | " + " | ".join(table) + " |", "| --- " * (len(table) + 1) + "|"]
    for case in CASES:
        cells = []
        for row in table.values():
            cell = row.get(case, Cell("not run"))
            text = f"WRONG: {cell.text}" if cell.is_fault else cell.text
            if cell.reason:
                if cell.reason not in reasons:
                    reasons.append(cell.reason)
                text += f" [{reasons.index(cell.reason) + 1}]"
            cells.append(text)
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    lines += ["", *(f"[{number}] {reason}" for number, reason in enumerate(reasons, 1))]
    sys.stdout.write("\n".join(lines) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(prog="make providers", description=__doc__)
    parser.add_argument("servers", nargs="*", help=", ".join(SERVERS))
    parser.add_argument("--case", action="append", choices=CASES, help="only this one; repeatable")
    options = parser.parse_args()
    servers = _chosen(options.servers)
    make_model()
    table: dict[str, dict[str, Cell]] = {}
    failed = []
    for server in servers:
        table[server.name] = {}
        try:
            for case, cell in _cells(server, options.case or list(CASES)):
                table[server.name][case] = cell
        except (ServerError, StackError) as error:
            _log(f"{server.name}: {error}")
            failed.append(server.name)
    _print(table)
    cells = [cell for row in table.values() for cell in row.values()]
    if not cells:
        return 2
    return 1 if failed or any(cell.is_fault for cell in cells) else 0


if __name__ == "__main__":
    raise SystemExit(main())
