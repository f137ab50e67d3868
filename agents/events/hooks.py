"""What an app to the right wants to know of outcomes; it says so here when it is ready."""

from collections.abc import Callable
from typing import Any


def nobody(type: str) -> Any:
    return None


# Whether somebody is to be told of an outcome of this type, as an expression: the database works it out
# in the statement that writes the event, so that it costs no query, and misses nobody by a cache.
wanted: Callable[[str], Any] = nobody
