"""What the apps to the right want done every so often by one of the workers; they add it when they
are ready. It must be quick, and may be done twice."""

from collections.abc import Callable

# Each chore and how many seconds lie between two times.
CHORES: list[tuple[Callable[[], object], float]] = []
