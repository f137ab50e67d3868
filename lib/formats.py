"""Figures as the admin writes them."""

import math
from decimal import Decimal

from agents.usage import prices


def money(cost: int, currency: str) -> str:
    """To the cent; what is less than a few cents, to two digits that count."""
    amount = prices.amount(cost)
    if not amount or amount >= Decimal("0.1"):
        return f"{currency} {amount:,.2f}"
    digits = min(12, 1 - math.floor(math.log10(amount)))
    return f"{currency} {amount:.{digits}f}"


UNITS = (("ms", 1, 1000), ("s", 1000, 60), ("min", 60_000, 60), ("h", 3_600_000, 48))


def duration(ms: float | None) -> str:
    """As people say it: 840 ms, 3.2 s, 4 min, 2.5 h, 3 d."""
    if ms is None:
        return "–"  # noqa: RUF001
    for unit, length, below in UNITS:
        number = ms / length
        if number < below:
            return (
                f"{number:.0f} {unit}" if unit == "ms" or number >= 10 else f"{number:.2g} {unit}"
            )
    return f"{ms / 86_400_000:.0f} d"
