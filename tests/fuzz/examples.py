"""The number of examples. The same each time, so that a failure repeats; FUZZ_FACTOR=50 tries 50 times
as many, new ones each time."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

FACTOR = int(os.environ.get("FUZZ_FACTOR", "1"))
# An example takes milliseconds; one that takes this long is quadratic or hangs, on any machine.
DEADLINE = timedelta(seconds=10)


def tried(count: int, **strategies: Any) -> Callable[[Any], Any]:
    """Decorate a test with `count` examples of these."""
    settled = settings(
        max_examples=count * FACTOR,
        derandomize=FACTOR == 1,
        deadline=DEADLINE,
        database=None,
        # Fixtures outlive the examples, which leave nothing behind.
        suppress_health_check=list(HealthCheck),
        print_blob=FACTOR != 1,
    )
    return lambda test: settled(given(**strategies)(test))


# Hostile texts of all kinds, lone surrogates and NUL included.
words = st.one_of(
    st.text(max_size=30),
    st.text(st.characters(categories=["Cc", "Cf", "Cs", "Zs", "So"]), max_size=8),
    st.sampled_from(["", "\0", "\ud800", "a\0b", "x" * 300, "null", "-1", "1e999", "../..", "'--"]),
)
numbers = st.one_of(
    st.integers(-(2**70), 2**70), st.floats(), st.sampled_from([0, -1, 2**31, 2**63, 2**64])
)
scalars = st.one_of(st.none(), st.booleans(), numbers, words)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4),
    max_leaves=12,
)


def objects(required: dict[str, Any], **optional: Any) -> Any:
    """Return JSON objects with these members; each may be of any other kind, or missing."""
    members = {name: odd(each) for name, each in {**required, **optional}.items()}
    return st.fixed_dictionaries({}, optional=members) | st.fixed_dictionaries(
        {name: required[name] for name in required},
        optional={name: members[name] for name in optional},
    )


def odd(strategy: Any) -> Any:
    """Return mostly expected values."""
    return st.one_of(strategy, strategy, strategy, anything)
