"""The rows of the fault matrix, each a function that does the damage while questions keep coming."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.faults import injections as faults
from tests.faults.invariants import NOTHING, Allowed, Row, check
from tests.faults.plant import WORKERS, Plant

Damage = Callable[[Plant], None]
WORKS_ON = ("sqlite", "postgresql")


@dataclass(frozen=True)
class Scenario:
    """`row` of the matrix; of each `kind` a short run of the tests takes one. `load` are the arguments
    of `Plant.load`, None where the damage asks its own questions."""

    row: int
    name: str
    kind: str
    damage: Damage
    vendors: tuple[str, ...] = WORKS_ON
    load: dict[str, Any] | None = field(default_factory=lambda: {"runs": 24})
    allowed: Allowed = NOTHING
    settle_seconds: float = 90

    def __str__(self) -> str:
        return f"row-{self.row:02}-{self.name.replace(' ', '-')}"

    def play(self, plant: Plant) -> Row:
        """Raises `invariants.Violated`."""
        plant.begin()
        if self.load is None:
            self.damage(plant)
        else:
            with plant.load(**self.load).running():
                plant.wait_for_calls(4)
                self.damage(plant)
                plant.mended()
        plant.wait_up()
        plant.settle(self.settle_seconds)
        return check(plant, f"{self.row} {self.name}", self.allowed)


SCENARIOS: list[Scenario] = []


def scenario(row: int, name: str, kind: str, **options: Any) -> Callable[[Damage], Damage]:
    def register(damage: Damage) -> Damage:
        SCENARIOS.append(Scenario(row, name, kind, damage, **options))
        return damage

    return register


@scenario(2, "a worker is killed", "process", allowed=Allowed(extra_calls=20))
def _(plant: Plant) -> None:
    faults.kill(plant, WORKERS[0])


@scenario(4, "a worker stands still", "process", allowed=Allowed(extra_calls=20))
def _(plant: Plant) -> None:
    faults.pause(plant, WORKERS[0], 5)


@scenario(8, "Redis is killed", "redis")
def _(plant: Plant) -> None:
    faults.kill_redis(plant, 1)


@scenario(9, "Redis is wiped", "redis")
def _(plant: Plant) -> None:
    faults.wipe_redis(plant)
