"""Paired figures of two builds: their ratio, its interval, and the verdict.

The interval is the two-sided 95 % t-interval of the mean of log(head / base) over the pairs, one pair a
round. Both figures of a pair come from the same few minutes, so what the machine does besides falls on
both, and what is left of it widens the interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import geometric_mean, mean, stdev

# A figure is slower when the whole interval lies above this.
SLOWER = 1.03
# The 97.5 % quantiles of Student's t by degrees of freedom, from 1; the last one for all above.
T_QUANTILES = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """A measured quantity. `rises` marks a rate, where more is better: its ratio is turned round, so
    that above 1 always means slower or bigger."""

    name: str
    unit: str
    rises: bool = False


@dataclass(frozen=True)
class Ratio:
    """A figure of two builds: the means of both, and head / base with its interval."""

    figure: Figure
    base: float
    head: float
    ratio: float
    low: float
    high: float
    pairs: int

    @property
    def is_slower(self) -> bool:
        return self.low > SLOWER

    def as_json(self) -> dict[str, object]:
        return {
            "case": "compare",
            "of": self.figure.name,
            "unit": self.figure.unit,
            "base": float(f"{self.base:.4g}"),
            "head": float(f"{self.head:.4g}"),
            "ratio": round(self.ratio, 4),
            "low": round(self.low, 4),
            "high": round(self.high, 4),
            "pairs": self.pairs,
            "slower": self.is_slower,
        }


def ratio(figure: Figure, pairs: Sequence[tuple[float, float]]) -> Ratio:
    """Return the ratio over (base, head) pairs, at least two."""
    if len(pairs) < 2:
        raise ValueError(f"{figure.name}: an interval needs two rounds or more, not {len(pairs)}.")
    if any(value <= 0 for pair in pairs for value in pair):
        raise ValueError(f"{figure.name}: not all values are above 0: {pairs}.")
    sign = -1 if figure.rises else 1
    logs = [sign * math.log(head / base) for base, head in pairs]
    centre = mean(logs)
    half = t_quantile(len(logs) - 1) * stdev(logs) / math.sqrt(len(logs))
    bases, heads = zip(*pairs, strict=True)
    return Ratio(
        figure,
        geometric_mean(bases),
        geometric_mean(heads),
        math.exp(centre),
        math.exp(centre - half),
        math.exp(centre + half),
        len(pairs),
    )


def t_quantile(degrees: int) -> float:
    return T_QUANTILES[min(degrees, len(T_QUANTILES)) - 1]


def ratios(
    figures: Sequence[Figure], rounds: Sequence[Mapping[str, Mapping[str, float]]]
) -> list[Ratio]:
    """Return the ratio of each measured figure; `rounds` holds for each round by build ("base",
    "head") the values by name of the figure."""
    measured = {name for each in rounds for values in each.values() for name in values}
    return [
        ratio(figure, [(each["base"][figure.name], each["head"][figure.name]) for each in rounds])
        for figure in figures
        if figure.name in measured
    ]


def table(found: Sequence[Ratio]) -> str:
    """One line for each figure, and what the columns mean."""
    lines = [f"{'figure':24}{'base':>10}{'head':>10}  {'unit':8}{'ratio':>7}  95 % interval"]
    lines += [
        f"{each.figure.name:24}{each.base:>10.4g}{each.head:>10.4g}  {each.figure.unit:8}"
        f"{each.ratio:>7.3f}  {each.low:.3f} to {each.high:.3f}"
        + ("  SLOWER" if each.is_slower else "")
        for each in found
    ]
    pairs = min((each.pairs for each in found), default=0)
    slower = [each.figure.name for each in found if each.is_slower]
    lines += [
        "",
        "Ratio: head / base, turned round for rates: above 1 is slower or bigger. Interval: t, of the "
        f"mean log ratio of {pairs} pairs.",
        f"Slower (the whole interval above {SLOWER}): {', '.join(slower) or 'none'}.",
    ]
    return "\n".join(lines)
