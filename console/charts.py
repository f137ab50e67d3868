"""Charts rendered by the server as plain SVG: they need no script, and the style sheet gives them the
colours of the theme. A chart is 1000 wide and 100 high; the page scales it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

WIDTH, HEIGHT = 1000.0, 100.0
GAP = 0.15  # of a bar's width


@dataclass(frozen=True)
class Bar:
    kind: str
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class HoverSlot:
    """A time slot and the text shown when the pointer is over it."""

    x: float
    width: float
    title: str


@dataclass(frozen=True)
class ChartLine:
    kind: str
    path: str


@dataclass
class Chart:
    title: str
    legend: list[tuple[str, str]]  # the kind and its text
    slots: list[HoverSlot] = field(default_factory=list)
    rects: list[Bar] = field(default_factory=list)
    lines: list[ChartLine] = field(default_factory=list)
    ticks: list[tuple[float, str]] = field(default_factory=list)  # y and its label
    first: str = ""
    last: str = "now"


def slots(times: Sequence[datetime], titles: Sequence[str]) -> list[HoverSlot]:
    width = WIDTH / max(1, len(times))
    return [
        HoverSlot(_r(number * width), _r(width), f"{time:%a %d %b, %H:%M} UTC: {title}")
        for number, (time, title) in enumerate(zip(times, titles, strict=True))
    ]


def bars(columns: Sequence[dict[str, float]]) -> tuple[list[Bar], float]:
    """Return stacked bars, and the total of the highest column."""
    top = max((sum(column.values()) for column in columns), default=0)
    rects = []
    width = WIDTH / max(1, len(columns))
    for number, column in enumerate(columns):
        y = HEIGHT
        for kind, value in column.items():
            height = HEIGHT * value / top if top else 0
            y -= height
            if value:
                x = (number + GAP / 2) * width
                rects.append(Bar(kind, _r(x), _r(y), _r(width * (1 - GAP)), _r(height)))
    return rects, top


def line(kind: str, values: Sequence[float | None], low: float, high: float) -> ChartLine:
    """Return a line on a logarithmic scale, with a gap for each missing value."""
    width = WIDTH / max(1, len(values))
    path, drawing = [], False
    for number, value in enumerate(values):
        if value is None:
            drawing = False
            continue
        x, y = (number + 0.5) * width, HEIGHT * (1 - _log_share(value, low, high))
        # A value between two gaps appears as a dash.
        start = f"M{_r(x - width * 0.3)} {_r(y)}L" if not drawing else "L"
        path.append(f"{start}{_r(x)} {_r(y)}")
        drawing = True
    return ChartLine(kind, "".join(path))


def decades(values: Sequence[float | None]) -> tuple[float, float]:
    """Return the exponents of the powers of ten that enclose the values."""
    positive = [value for value in values if value] or [1.0]
    low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    return float(low), float(max(high, low + 1))


def decade_ticks(low: float, high: float) -> list[tuple[float, float]]:
    """Return the positions and values of the powers of ten."""
    return [
        (_r(HEIGHT * (1 - _log_share(10.0**power, low, high))), 10.0**power)
        for power in range(int(low), int(high) + 1)
    ]


def _log_share(value: float, low: float, high: float) -> float:
    return (math.log10(max(value, 10**low)) - low) / (high - low)


def _r(value: float) -> float:
    return round(value, 2)
