"""No pattern that reads what comes from outside takes longer than in proportion to it."""

import importlib
import pkgutil
import re
import time
from collections.abc import Iterator

import pytest

APPS = ("agents", "botrunner", "chat", "config", "console", "webhooks", "lib", "ops", "realm")
# Each is measured by itself in tests/config/test_scrub.py, from many more beginnings.
ELSEWHERE = {"config.scrub"}
# Reads the names of settings, which come from nowhere but the settings.
OURS = {"console.system.INTERNAL"}
PIECES = [
    "a",
    "0",
    "@",
    "@a",
    "@a:",
    "://",
    ":",
    ".",
    "-",
    "0-",
    "0.",
    " ",
    ">",
    ">\n",
    "\n",
    "%",
    "/_",
    "=",
]
SMALL, LARGE = 2_000, 32_000


def modules() -> Iterator[str]:
    for app in APPS:
        for found in pkgutil.walk_packages(importlib.import_module(app).__path__, f"{app}."):
            if not found.ispkg and found.name not in {"config.wsgi", "config.asgi", *ELSEWHERE}:
                yield found.name


def patterns() -> dict[str, re.Pattern[str]]:
    found: dict[str, re.Pattern[str]] = {}
    for name in modules():
        for attribute, value in vars(importlib.import_module(name)).items():
            place = f"{name}.{attribute}"
            if (
                isinstance(value, re.Pattern)
                and isinstance(value.pattern, str)
                and place not in OURS
            ):
                found[place] = value
    return found


def took(pattern: re.Pattern[str], text: str) -> float:
    best = float("inf")
    for _ in range(2):
        started = time.thread_time()
        pattern.match(text)
        pattern.search(text)
        best = min(best, time.thread_time() - started)
    return best


@pytest.mark.parametrize("piece", PIECES)
def test_it_grows_with_the_text(piece: str) -> None:
    assert len(patterns()) >= 10
    for name, pattern in patterns().items():
        for text in (piece * LARGE, f"@a:{piece * LARGE}"):
            long = took(pattern, text[:LARGE] + "\0")
            if long > 0.01:
                assert long < 16 * 4 * took(pattern, text[:SMALL] + "\0"), name
