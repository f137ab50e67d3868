import itertools
import random

import pytest

from tests.faults import model_scenarios  # noqa: F401 - it adds its rows
from tests.faults.invariants import Row
from tests.faults.plant import Plant
from tests.faults.scenarios import SCENARIOS, Scenario
from tests.faults.settings import ALL, DATABASE, KINDS, SEED

pytestmark = pytest.mark.faults


def selected() -> list[Scenario]:
    """All of them, or one of each kind as the seed has it."""
    possible = [
        each for each in SCENARIOS if DATABASE in each.vendors and (not KINDS or each.kind in KINDS)
    ]
    if ALL:
        return possible
    chance = random.Random(SEED)
    quick = sorted((each for each in possible if each.kind != "slow"), key=lambda s: s.kind)
    by_kind = itertools.groupby(quick, key=lambda s: s.kind)
    return [chance.choice(list(group)) for _, group in by_kind]


@pytest.mark.parametrize("scenario", selected(), ids=str)
def test_it_holds_what_it_promises(scenario: Scenario, plant: Plant, table: list[Row]) -> None:
    table.append(scenario.play(plant))
