"""Permission checks repeated during a long response."""

from collections.abc import Callable, Iterable

from django.core.exceptions import PermissionDenied
from django.http import HttpRequest

from realm.access import Access, look_up


def guard(request: HttpRequest, permissions: Iterable[str]) -> Callable[[], None]:
    """Return a function that raises `PermissionDenied` once the caller has lost access or one of the
    given permissions. The exception aborts the response, so a truncated file never looks complete."""
    access = Access.of(request)
    held = [each for each in permissions if request.user.has_perm(each)]

    def check() -> None:
        rights = look_up([access])
        if reason := rights.lost.get(access):
            raise PermissionDenied(f"The response was aborted. {reason.sentence}")
        if not rights.users[access.user_id or 0].has_perms(held):
            raise PermissionDenied("The response was aborted. The permission was revoked.")

    return check
