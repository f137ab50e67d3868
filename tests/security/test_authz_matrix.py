"""Role by route by method, for every address that the URL conf has."""

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from django.contrib import admin
from django.db import connection, transaction
from django.template.backends.django import Template

from tests.security import access
from tests.security.access import METHODS, Outcomes, outcome
from tests.security.routes import address, routes
from tests.security.world import ROLES, Visitor, of_admin, visitor

pytestmark = pytest.mark.django_db
SAFE = {"GET", "HEAD", "OPTIONS", "TRACE"}
WRITE = re.compile(r'(?:INSERT INTO|UPDATE|DELETE FROM) "(\w+)"')
# What is written on the way: sessions, who read whose words, and a second factor that is on offer.
BESIDE = {"django_session", "console_auditentry", "otp_totp_totpdevice"}
# These look at no session, and change nothing that belongs to one.
WITHOUT_SESSION = {"_server-session", "healthz", "readyz"}


def area(route: str) -> str:
    """What is tried in one test, of which several run at a time."""
    first, _, rest = route.partition("/")
    if first == "admin" and rest.startswith(("agents", "realm")):
        return "admin, agents and realm"
    return first if first in ("admin", "api") else "other"


@pytest.fixture
def ids(settings: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Of the rows that the admin shows; from here on no page is rendered, which nobody looks at."""
    settings.CHAT_ALLOW_ANONYMOUS = False
    settings.OPS_READY_WITHOUT_REDIS = True
    found = of_admin()
    monkeypatch.setattr(Template, "render", lambda *args, **kwargs: "")
    monkeypatch.setattr(admin.site, "each_context", lambda request: {})
    logging.disable(logging.CRITICAL)
    yield found
    logging.disable(logging.NOTSET)


def ask(visitor: Visitor, route: str, method: str, ids: dict[str, Any]) -> tuple[str, set[str]]:
    """What comes of a request, and to which tables it wrote; then it has not happened."""
    body, kind = b"", "application/x-www-form-urlencoded"
    if route.startswith(("api", "_")) and method in ("POST", "PUT", "PATCH", "DELETE"):
        body, kind = b"{}", "application/json"
    with transaction.atomic(), _writes() as written:
        response = visitor.send(method, address(route, ids | visitor.ids), body, content_type=kind)
        transaction.set_rollback(True)
    return outcome(response), written


@contextmanager
def _writes() -> Iterator[set[str]]:
    found: set[str] = set()

    def look(execute: Callable[..., Any], sql: str, *args: Any) -> Any:
        found.update(WRITE.findall(sql))
        return execute(sql, *args)

    with connection.execute_wrapper(look):
        yield found


def ends(expected: Outcomes) -> list[int]:
    """Whom to ask. From `user` on each role may all that the one before it may, so that of several in
    a row who are meant to be treated alike the first and the last tell of those in between."""
    last = len(expected) - 1
    return [
        at
        for at, meant in enumerate(expected)
        if at in (0, last) or meant != expected[at - 1] or meant != expected[at + 1]
    ]


def test_every_address_stands_in_the_table(ids: dict[str, Any]) -> None:
    known = access.table()
    missing = [route for route in routes() if (route or '""') not in known]
    visitors = [visitor(role) for role in ROLES] if missing else []

    def lines(route: str) -> str:
        return access.as_lines(
            route,
            {
                method: tuple(ask(each, route, method, ids)[0] for each in visitors)
                for method in METHODS
            },
        )

    assert not missing, (
        "Say who may do what: add to tests/security/access.txt, if it is meant,\n\n"
        + "\n\n".join(map(lines, missing))
    )
    gone = known.keys() - {route or '""' for route in routes()}
    assert not gone, f"tests/security/access.txt tells of addresses that are gone: {sorted(gone)}"


@pytest.mark.parametrize("where", sorted({area(route) for route in routes()}))
def test_each_role_may_do_what_the_table_says_and_no_more(ids: dict[str, Any], where: str) -> None:
    table = access.table()
    visitors = [visitor(role) for role in ROLES]
    wrong = []
    for route in (route for route in routes() if area(route) == where):
        for method in METHODS:
            expected = table[route or '""'][method]
            for at in ends(expected):
                each, meant = visitors[at], expected[at]
                came, written = ask(each, route, method, ids)
                if came != meant:
                    wrong.append(f"{method} {route} of {each.role}: {came}, not {meant}")
                if (came != "yes" or method in SAFE) and written - BESIDE:
                    wrong.append(f"{method} {route} of {each.role} wrote to {written - BESIDE}")
    assert not wrong, "\n".join(wrong)


def test_a_session_does_nothing_without_a_csrf_token(ids: dict[str, Any]) -> None:
    """Else any page that an operator looks at could do it with the operator's session."""
    table = access.table()
    superuser = visitor("superuser", enforce_csrf_checks=True)
    wrong = []
    for route in routes():
        for method in ("POST", "PUT", "PATCH", "DELETE"):
            if table[route or '""'][method][-1] != "yes" or route in WITHOUT_SESSION:
                continue
            came, written = ask(superuser, route, method, ids)
            if came != "403" or written - BESIDE:
                wrong.append(f"{method} {route}: {came}, wrote to {written}")
    assert not wrong, "\n".join(wrong)
