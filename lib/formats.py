"""Money and durations as people read them."""

import math
from decimal import Decimal

# A cost is a whole number of these parts of one unit of the currency.
COST_UNITS = 10**12


def amount(cost: int) -> Decimal:
    """Return a cost in units of the currency."""
    return Decimal(cost) / COST_UNITS


def money(cost: int, currency: str) -> str:
    """Format a cost to the cent, and less than ten cents to two significant digits."""
    value = amount(cost)
    if not value or value >= Decimal("0.1"):
        return f"{currency} {value:,.2f}"
    digits = min(12, 1 - math.floor(math.log10(value)))
    return f"{currency} {value:.{digits}f}"


UNITS = (("ms", 1, 1000), ("s", 1000, 60), ("min", 60_000, 60), ("h", 3_600_000, 48))


def duration(ms: float | None) -> str:
    """Format milliseconds: 840 ms, 3.2 s, 4 min, 2.5 h, 3 d."""
    if ms is None:
        return "–"  # noqa: RUF001
    for unit, length, below in UNITS:
        number = ms / length
        if number < below:
            return (
                f"{number:.0f} {unit}" if unit == "ms" or number >= 10 else f"{number:.2g} {unit}"
            )
    return f"{ms / 86_400_000:.0f} d"
