"""Paths below a proxy that serves this system under a path of its own."""

from django.conf import settings


def public(path: str) -> str:
    """Return the path as clients request it: below FORCE_SCRIPT_NAME."""
    return f"{settings.FORCE_SCRIPT_NAME or ''}{path}"


def inner(path: str) -> str | None:
    """Return the path without FORCE_SCRIPT_NAME; None if it does not begin with that: the proxy has
    removed it, or the request is for a probe."""
    prefix = settings.FORCE_SCRIPT_NAME
    if not prefix or not f"{path}/".startswith(f"{prefix}/"):
        return None
    return path.removeprefix(prefix) or "/"
