"""Hooks that other apps set when they are ready (`AppConfig.ready`)."""

from collections.abc import Callable
from typing import Any


def _never(type: str) -> Any:
    return None


# Set by webhooks.apps: does an outcome of this type need a delivery? It returns an expression, which
# the database evaluates in the statement that writes the event: no extra query, and no stale cache.
needs_delivery: Callable[[str], Any] = _never
