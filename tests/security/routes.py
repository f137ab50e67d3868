"""Every address of the server, read from its URL conf."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from django.urls import get_resolver

from ops.middleware import PROBES

# Patterns that are regular expressions: by what name they are called here, and an address of each.
NAMED = {
    r"^api/(threads|messages|runs)(/|$)": ("api/(resource)/...", "api/threads/x/y/z"),
    r"^api/": ("api/...", "api/nothing"),
    r"^_": ("_...", "_nothing"),
    r"admin/(?P<url>.*)$": ("admin/...", "admin/nothing"),
}
APP_LIST = re.compile(r"admin/\^\(\?P<app_label>.*\)/\$\Z")
PARAMETER = re.compile(r"<(?:\w+:)?(\w+)>")


def routes() -> list[str]:
    """The patterns: `api/chat/threads/<id:thread_id>`, or a name of ours for a regular expression."""
    found = [_name(pattern) for pattern in _patterns(get_resolver().url_patterns)]
    return [*found, *(path.removeprefix("/") for path in PROBES)]


def address(route: str, ids: dict[str, Any]) -> str:
    """One that the pattern fits. `ids` has the beginnings of patterns and what stands for the
    parameters there; the longest that fits is taken."""
    if route == "admin/<app_label>/":
        return "/admin/realm/"
    for name, path in NAMED.values():
        if route == name:
            return f"/{path}"
    if not PARAMETER.search(route):
        return f"/{route}"
    known = max((start for start in ids if route.startswith(start)), key=len, default=None)
    assert known is not None, f"no id is known for {route}: add one to tests/security/world.py"
    return "/" + PARAMETER.sub(str(ids[known]), route)


def _patterns(patterns: Iterable[Any], before: str = "") -> Iterator[str]:
    for each in patterns:
        whole = before + str(each.pattern)
        if hasattr(each, "url_patterns"):
            yield from _patterns(each.url_patterns, whole)
        else:
            yield whole


def _name(pattern: str) -> str:
    if APP_LIST.match(pattern):
        return "admin/<app_label>/"
    return NAMED[pattern][0] if pattern in NAMED else pattern
