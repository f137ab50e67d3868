"""Answers that belong to a caller are stored nowhere on their way."""

from typing import Any

import pytest

from tests.security.routes import address, routes
from tests.security.test_authz_matrix import ids
from tests.security.world import Visitor, visitor

__all__ = ["ids"]
pytestmark = pytest.mark.django_db
# Documents that are the same for everybody.
PUBLIC = {"api", "api/schema", "api/docs"}


def cache_control(who: Visitor, method: str, route: str, ids: dict[str, Any]) -> list[str]:
    response = who.send(method, address(route, ids | who.ids))
    return [part.strip() for part in response.headers.get("Cache-Control", "").split(",")]


@pytest.mark.parametrize("role", ["nobody", "token", "superuser"])
def test_every_answer_forbids_it(ids: dict[str, Any], role: str) -> None:
    """Refusals and errors included."""
    who = visitor(role)
    stored = [
        f"{method} {route}"
        for route in routes()
        for method in ("GET", "HEAD", "PUT")
        if "no-store" not in cache_control(who, method, route, ids)
        and not (route in PUBLIC and method != "PUT")
    ]
    assert not stored


def test_public_documents_may_be_kept(ids: dict[str, Any]) -> None:
    who = visitor("token")
    for route in PUBLIC:
        assert cache_control(who, "GET", route, ids) == [""]
        assert "no-store" in cache_control(who, "PUT", route, ids)


@pytest.mark.parametrize("path", ["/nothing", "/api/nothing", "/_nothing", "/static/nothing.js"])
def test_what_is_not_there_neither(path: str) -> None:
    response = visitor("user").send("GET", path)
    assert response.status_code == 404
    assert response.headers["Cache-Control"] == "no-store"


def test_nor_what_a_forbidden_host_is_told() -> None:
    response = visitor("user").send("GET", "/api/chat/threads", HTTP_HOST="evil.example.org")
    assert response.status_code == 400
    assert response.headers["Cache-Control"] == "no-store"
