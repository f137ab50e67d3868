"""Charts as the server draws them: plain SVG, coloured by the style sheet, so that they need no
script and follow the theme. A chart is 1000 wide and 100 high; the page stretches it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

WIDTH, HEIGHT = 1000.0, 100.0
GAP = 0.15  # of a bar's width


@dataclass(frozen=True)
class Rect:
    kind: str
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Slot:
    """What the pointer is over, in words."""

    x: float
    width: float
    title: str


@dataclass(frozen=True)
class Line:
    kind: str
    path: str


@dataclass
class Chart:
    title: str
    legend: list[tuple[str, str]]  # the kind, and what is said of it
    slots: list[Slot] = field(default_factory=list)
    rects: list[Rect] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    ticks: list[tuple[float, str]] = field(default_factory=list)  # y, and what is there
    first: str = ""
    last: str = "now"


def slots(times: Sequence[datetime], titles: Sequence[str]) -> list[Slot]:
    width = WIDTH / max(1, len(times))
    return [
        Slot(_r(number * width), _r(width), f"{time:%a %d %b, %H:%M} UTC: {title}")
        for number, (time, title) in enumerate(zip(times, titles, strict=True))
    ]


def bars(columns: Sequence[dict[str, float]]) -> tuple[list[Rect], float]:
    """Stacked, and how high the highest is."""
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
                rects.append(Rect(kind, _r(x), _r(y), _r(width * (1 - GAP)), _r(height)))
    return rects, top


def line(kind: str, values: Sequence[float | None], low: float, high: float) -> Line:
    """On a scale of powers of ten. Where there is no value, there is no line."""
    width = WIDTH / max(1, len(values))
    path, drawing = [], False
    for number, value in enumerate(values):
        if value is None:
            drawing = False
            continue
        x, y = (number + 0.5) * width, HEIGHT * (1 - _log_share(value, low, high))
        # A value between two gaps is seen as a dash.
        start = f"M{_r(x - width * 0.3)} {_r(y)}L" if not drawing else "L"
        path.append(f"{start}{_r(x)} {_r(y)}")
        drawing = True
    return Line(kind, "".join(path))


def decades(values: Sequence[float | None]) -> tuple[float, float]:
    """The powers of ten that the values lie between."""
    known = [value for value in values if value] or [1.0]
    low, high = math.floor(math.log10(min(known))), math.ceil(math.log10(max(known)))
    return float(low), float(max(high, low + 1))


def decade_ticks(low: float, high: float) -> list[tuple[float, float]]:
    """Where the powers of ten are, and what they are."""
    return [
        (_r(HEIGHT * (1 - _log_share(10.0**power, low, high))), 10.0**power)
        for power in range(int(low), int(high) + 1)
    ]


def _log_share(value: float, low: float, high: float) -> float:
    return (math.log10(max(value, 10**low)) - low) / (high - low)


def _r(value: float) -> float:
    return round(value, 2)
