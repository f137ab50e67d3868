"""Membership of rooms. An app to the right knows the members; it registers its answer here when it is
ready."""

from collections.abc import Callable
from typing import Any

from django.db.models import Q


def no_members(user_id: str, room: str, at: str | None) -> Any:
    return Q(pk__in=[])


# A condition on rows of which the column `room` holds the Matrix id of a room: the Matrix user
# `user_id` is known to be in it now, and since the time in the column `at` where that is given.
member: Callable[[str, str, str | None], Any] = no_members
