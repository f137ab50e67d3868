"""One plant for all scenarios, and the table at the end. FAULTS_SEED chooses what is drawn by lot,
FAULTS_DATABASE is `sqlite` or `postgresql` (by default that of DATABASE_URL), and FAULTS_TABLE names a
file for the table, FAULTS_LOGS a directory to keep the logs of the processes in."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.invariants import Row, Violated
from tests.faults.plant import Plant, available
from tests.faults.settings import DATABASE, SEED

COLUMNS = (
    "scenario",
    "accepted",
    "outcomes",
    "duplicates",
    "lost",
    "disorder",
    "extra_calls",
    "refused",
    "recovery",
    "restarts",
    "self_exits",
)
ROWS: list[Row] = []
STARTED: list[str] = []


class Keeper:
    """Has a sound plant for who needs one: one that was left damaged is replaced."""

    def __init__(self) -> None:
        self._plant: Plant | None = None
        self.is_damaged = False

    def plant(self) -> Plant:
        if self.is_damaged:
            self.close()
        if self._plant is None:
            STARTED.append(DATABASE)
            self._plant = Plant(DATABASE).__enter__()
        return self._plant

    def close(self) -> None:
        plant, self._plant, self.is_damaged = self._plant, None, False
        if plant is not None:
            plant.__exit__()


@pytest.fixture(scope="session")
def keeper() -> Iterator[Keeper]:
    keeper = Keeper()
    yield keeper
    keeper.close()


@pytest.fixture
def plant(keeper: Keeper, request: pytest.FixtureRequest) -> Iterator[Plant]:
    if not available(DATABASE):
        pytest.skip("there is no PostgreSQL to start")
    keeper_plant = keeper.plant()
    keeper.is_damaged = True
    yield keeper_plant
    keeper.is_damaged = request.node.stash.get(FAILED, False)


FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Iterator[None]:
    report = yield
    if call.when == "call":
        item.stash[FAILED] = bool(report.failed)
        if call.excinfo and isinstance(call.excinfo.value, Violated):
            ROWS.append(call.excinfo.value.args[1])
    return report


@pytest.fixture
def table() -> list[Row]:
    return ROWS


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not STARTED:
        return
    lines = [f"Faults on {DATABASE}; again: make faults SEED={SEED}", " | ".join(COLUMNS)]
    for row in ROWS:
        cells = [getattr(row, name) for name in COLUMNS]
        texts = [f"{cell:.1f} s" if isinstance(cell, float) else str(cell) for cell in cells]
        lines.append(" | ".join(texts) + (" | VIOLATED" if row.violations else ""))
    terminalreporter.section("faults")
    for line in lines:
        terminalreporter.write_line(line)
    if path := os.environ.get("FAULTS_TABLE"):
        with Path(path).open("a") as file:
            file.write("\n".join(lines) + "\n")
