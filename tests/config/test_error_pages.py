"""Pages and documents of errors outside of the views, and paths with a trailing slash."""

import json
from typing import Any

import pytest
from django.core.exceptions import PermissionDenied
from django.http import HttpRequest, HttpResponse
from django.test import Client
from django.urls import include, path

from tests import factories
from tests.realm.conftest import a_filter, client_of
from tests.security import access
from tests.security.routes import address
from tests.security.world import visitor


def broken(request: HttpRequest) -> HttpResponse:
    raise RuntimeError("secret")


def denied(request: HttpRequest) -> HttpResponse:
    raise PermissionDenied


urlpatterns = [
    *(path(f"{start}broken", broken) for start in ("", "api/", "v1/", "mcp/", "a2a/", "_")),
    path("denied", denied),
    path("api/denied", denied),
    path("", include("config.urls")),
]


@pytest.fixture
def client() -> Client:
    return Client(raise_request_exception=False, enforce_csrf_checks=True)


@pytest.fixture(params=[True, False], ids=["debug", "no debug"], autouse=True)
def debug(request: Any, settings: Any) -> bool:
    settings.DEBUG = request.param
    return bool(request.param)


PAGES = pytest.mark.urls(__name__)
API = ["/api", "/v1", "/mcp", "/a2a"]


@PAGES
@pytest.mark.parametrize(
    ("where", "status"), [("/nosuch", 404), ("/broken", 500), ("/denied", 403)]
)
def test_pages_of_our_own(client: Client, debug: bool, where: str, status: int) -> None:
    """Without a query of the database."""
    response = client.get(where)
    assert response.status_code == status
    assert response["Content-Type"].startswith("text/html")
    if not debug:
        assert "· Botrealm</title>" in response.text
        assert "secret" not in response.text
        for method in ("head", "options", "post"):
            assert getattr(client, method)(where).status_code in (status, 403)


@PAGES
@pytest.mark.parametrize("start", [*API, "/_"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "TRACE"])
@pytest.mark.parametrize(
    ("where", "status"), [("nosuch", 404), ("nosuch/x/", 404), ("broken", 500)]
)
def test_errors_below_an_api_are_json(
    client: Client, start: str, method: str, where: str, status: int
) -> None:
    unguarded = Client(raise_request_exception=False)
    separator = "" if start == "/_" else "/"
    response = unguarded.generic(method, f"{start}{separator}{where}")
    assert response.status_code == status
    assert response["Content-Type"] in ("application/json", "application/vnd.api+json")
    if method != "HEAD":
        body = json.loads(response.content)
        assert body["errors"] if start == "/_" else body["ok"] is False
        assert b"secret" not in response.content
        assert b"Traceback" not in response.content


@pytest.mark.parametrize("where", ["/v1", "/v1/", "/mcp", "/a2a", "/api/nosuch", "/api//x"])
def test_the_paths_of_apis_alone(client: Client, where: str) -> None:
    response = client.get(where)
    assert (response.status_code, response["Content-Type"]) == (404, "application/json")
    assert response.json()["error"] == "There is nothing at this URL."


@pytest.mark.parametrize("where", ["/apis", "/v10/x", "/mcps", "/a2ab"])
def test_other_paths_are_pages(client: Client, where: str) -> None:
    assert client.get(where)["Content-Type"].startswith("text/html")


@PAGES
@pytest.mark.parametrize("start", ["", *API, "/_bot-commands"])
def test_a_forbidden_host(client: Client, debug: bool, start: str) -> None:
    response = client.get(f"{start}/x", headers={"host": "evil.example"})
    assert response.status_code == 400
    assert "json" in response["Content-Type"] or not start
    if not start and not debug:
        assert "Bad request · Botrealm" in response.text


@pytest.mark.django_db
def test_a_form_without_its_token(client: Client, debug: bool) -> None:
    response = client.post("/login", {"username": "x"})
    assert response.status_code == 403
    assert "Go back, reload the page" in response.text


@PAGES
@pytest.mark.parametrize("start", API[1:])
def test_a_csrf_failure_below_an_api_is_json(client: Client, start: str) -> None:
    response = client.post(f"{start}/broken")
    assert (response.status_code, response["Content-Type"]) == (403, "application/json")


@pytest.mark.django_db
def test_a_trailing_slash_is_the_same_resource(settings: Any) -> None:
    settings.CHAT_ALLOW_ANONYMOUS = False
    someone = visitor("token")
    seen = 0
    for route, outcomes in access.table().items():
        if not route.startswith(("api", "_")) or "..." in route or route.endswith("/events"):
            continue
        for method in ("GET", "HEAD", "PUT", "TRACE"):
            where = address(route, someone.ids)
            for sender in (someone.send, visitor_of_none):
                plain, slashed = sender(method, where), sender(method, where + "/")
                assert slashed.status_code == plain.status_code, f"{method} {route}"
                if method == "GET" and plain.status_code == 200:
                    assert slashed.content == plain.content
            if outcomes[method][1] == "yes":
                assert someone.send(method, where + "//").status_code in (404, 405), route
                seen += 1
    assert seen > 40


def visitor_of_none(method: str, where: str) -> Any:
    return Client(raise_request_exception=False).generic(method, where)


@pytest.mark.django_db
def test_the_body_of_a_post_is_kept(settings: Any) -> None:
    settings.CHAT_ALLOW_ANONYMOUS = True
    plain = Client().post("/api/chat/messages/", {"content": "x"}, "application/json")
    assert plain.status_code == 202
    alice = client_of(factories.user("alice"))
    document = {
        "data": {"type": "bot-registration", "attributes": {"username": "@alice:localhost"}}
    }
    made = alice.send("POST", "/_bot-registration/", document)
    assert made.status_code == 201
    attributes = {"botId": made.json()["data"]["id"], "command": "ping", "filter": a_filter()}
    command = {"data": {"type": "bot-command", "attributes": attributes}}
    assert alice.send("POST", "/_bot-commands/", command).status_code == 201
    pk = alice.get("/_bot-commands/").json()["data"][0]["id"]
    assert alice.raw("DELETE", f"/_bot-commands/{pk}/").status_code == 204


@pytest.mark.django_db
def test_links_are_those_of_the_path_without_the_slash(settings: Any) -> None:
    settings.CHAT_ALLOW_ANONYMOUS = True
    for _ in range(2):
        factories.ask()
    links = Client().get("/api/threads/?page[size]=1").json()["links"]
    assert links["next"].startswith("/api/threads?page")
