"""Two builds are compared by their ratios, and a slower one is found out."""

import io
import random
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import compare
from tests.benchmarks.builds import Build, BuildFailed, commit_of
from tests.benchmarks.ratios import Figure, ratio, ratios, t_quantile, table

LATENCY = Figure("accept p50", "ms")
RATE = Figure("ingest", "1/s", rises=True)


def pairs(factor: float, *, noise: float = 0.01, count: int = 10) -> list[tuple[float, float]]:
    """Return (base, head) pairs of machines of different speed; head takes `factor` times as long."""
    chance = random.Random(7)
    bases = [chance.uniform(5, 20) for _ in range(count)]
    return [(base, base * factor * chance.gauss(1, noise)) for base in bases]


def test_the_interval_is_that_of_the_t_distribution() -> None:
    # log(1.1), log(1.2), log(1.3): mean 0.18000, deviation 0.08355, t(2) 4.303.
    found = ratio(LATENCY, [(1.0, 1.1), (1.0, 1.2), (1.0, 1.3)])

    assert found.ratio == pytest.approx(1.19720, abs=1e-4)
    assert found.low == pytest.approx(0.97275, abs=1e-4)
    assert found.high == pytest.approx(1.47342, abs=1e-4)
    assert [t_quantile(n) for n in (1, 9, 500)] == [12.706, 2.262, 2.086]


@pytest.mark.parametrize(
    ("factor", "noise", "slower"),
    [
        (1.0, 0.01, False),
        (1.02, 0.001, False),
        (1.05, 0.01, True),
        (1.05, 0.2, False),
        (0.8, 0.01, False),
    ],
)
def test_a_figure_is_slower_when_the_whole_interval_is_above_the_margin(
    factor: float, noise: float, slower: bool
) -> None:
    found = ratio(LATENCY, pairs(factor, noise=noise))

    assert found.is_slower == slower
    assert found.low <= found.ratio <= found.high


def test_a_rate_that_falls_is_a_ratio_above_one() -> None:
    found = ratio(RATE, [(100.0, 80.0), (120.0, 96.0)])

    assert found.ratio == pytest.approx(1.25)
    assert found.is_slower


@pytest.mark.parametrize("values", [[(1.0, 1.0)], [(1.0, 0.0), (1.0, 1.0)]])
def test_what_has_no_ratio_is_refused_by_name(values: list[tuple[float, float]]) -> None:
    with pytest.raises(ValueError, match="accept p50"):
        ratio(LATENCY, values)


def test_the_table_names_what_is_slower() -> None:
    rounds = [
        {"base": {"ingest": 200.0, "accept p50": 4.0}, "head": {"ingest": 150.0, "accept p50": 4.0}}
    ] * 3
    found = ratios([LATENCY, RATE, Figure("not measured", "s")], rounds)
    lines = table(found).splitlines()

    assert [each.figure for each in found] == [LATENCY, RATE]
    assert lines[1].split() == ["accept", "p50", "4", "4", "ms", "1.000", "1.000", "to", "1.000"]
    assert lines[2].split()[-1] == "SLOWER"
    assert lines[-1] == "Slower (the whole interval above 1.03): ingest."
    assert found[1].as_json()["slower"] is True


def test_every_second_round_begins_with_the_other_build() -> None:
    base, head = (Build(name, Path(), Path()) for name in ("base", "head"))
    orders = [[each.name for each in compare.order((base, head), number)] for number in range(3)]

    assert orders == [["base", "head"], ["head", "base"], ["base", "head"]]


def test_the_options() -> None:
    options = compare.parsed(["history", "BASE=HEAD~1", "ROUNDS=3", "accept"])

    assert options == compare.Options("HEAD~1", "", 3, ("history", "accept"))
    assert compare.parsed(["BASE=x"]).cases == tuple(compare.CASES)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "BASE is missing"),
        (["BASE=x", "ROUNDS=1"], "ROUNDS=1 gives no interval"),
        (["BASE=x", "SPEED=1", "tea"], "Unknown: SPEED, tea."),
    ],
)
def test_wrong_options_are_refused_with_the_right_ones(
    arguments: list[str], problem: str, capsys: Any
) -> None:
    assert compare.main(arguments) == 2
    output = capsys.readouterr().err
    assert problem in output
    assert "ROUNDS=<n>" in output


def test_a_commit_that_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(BuildFailed, match="no-such-commit is no commit"):
        commit_of("no-such-commit")


@pytest.mark.parametrize(("factor", "status"), [(1.0, 0), (1.2, 1)])
def test_the_status_is_the_verdict(
    factor: float, status: int, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def found(options: compare.Options) -> Any:
        return [ratio(LATENCY, pairs(factor))]

    monkeypatch.setattr(compare, "_compare", found)

    assert compare.main(["BASE=x"]) == status
    printed = capsys.readouterr()
    assert '"of":"accept p50"' in io.StringIO(printed.out).readline()
    assert "95 % interval" in printed.err
