"""Rights to a response that takes long, looked up again while it is sent."""

from collections.abc import Callable, Iterable

from django.core.exceptions import PermissionDenied
from django.http import HttpRequest

from realm.access import Access, look_up


def guard(request: HttpRequest, permissions: Iterable[str]) -> Callable[[], None]:
    """A check to be made now and then. It raises `PermissionDenied` when the caller would be refused
    by now, or has lost one of the permissions that they had, so that what was sent does not pass for
    the whole."""
    access = Access.of(request)
    held = [each for each in permissions if request.user.has_perm(each)]

    def check() -> None:
        found = look_up([access])
        if reason := found.lost.get(access):
            raise PermissionDenied(f"The response was broken off. {reason.sentence}")
        if not found.users[access.user_id or 0].has_perms(held):
            raise PermissionDenied("The response was broken off. The permission was taken away.")

    return check
