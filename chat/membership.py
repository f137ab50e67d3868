"""Hook for the membership of rooms, which `botrunner.apps` sets: `chat` knows no Matrix rooms."""

from collections.abc import Callable
from typing import Any

from django.db.models import Q


def no_members(user_id: str, room: str, at: str | None) -> Any:
    return Q(pk__in=[])


# Return a condition on rows whose column `room` holds a Matrix room id: the Matrix user `user_id` is a
# member of it, and has been since the time in the column `at`, if given.
member_condition: Callable[[str, str, str | None], Any] = no_members
