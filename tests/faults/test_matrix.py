"""docs/explanation/reliability.md names no test that is not there, and leaves out no row."""

import re
from pathlib import Path

import pytest

from tests.faults import model_scenarios  # noqa: F401 - it adds its rows
from tests.faults.scenarios import SCENARIOS

ROOT = Path(__file__).resolve().parents[2]
LINE = re.compile(r"^\| (\d+)(?:-(\d+))? \| .* \| (.*) \|$", re.MULTILINE)
ROWS = {
    number: proof
    for first, last, proof in LINE.findall((ROOT / "docs/explanation/reliability.md").read_text())
    for number in range(int(first), int(last or first) + 1)
}


def test_every_row_stands_there() -> None:
    assert sorted(ROWS) == list(range(1, 43))


@pytest.mark.parametrize("row", range(1, 43))
def test_what_proves_a_row_is_there(row: int) -> None:
    has_scenario = row in {scenario.row for scenario in SCENARIOS}
    assert ("scenarios" in ROWS[row]) == has_scenario
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", ROWS[row])
    assert named or has_scenario
    for path, name in named:
        assert re.search(rf"^ *def {name}\(", (ROOT / path).read_text(), re.MULTILINE), name
