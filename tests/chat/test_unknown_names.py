"""Fields and query parameters that do not exist are refused by name."""

import json
from typing import Any

import pytest

from agents.models import Run
from lib import names
from realm.models import User
from tests import factories
from tests.realm.conftest import Client, client_of, only_error
from tests.security import access
from tests.security.routes import address
from tests.security.world import visitor

pytestmark = pytest.mark.django_db


@pytest.fixture
def alice() -> User:
    return factories.user("alice")


def post(path: str, body: Any, **extra: Any) -> Any:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Client().raw("POST", path, data, content_type="application/json", **extra)


@pytest.fixture(autouse=True)
def _anonymous(settings: Any) -> None:
    settings.CHAT_ALLOW_ANONYMOUS = True


@pytest.mark.parametrize(
    ("field", "hint"),
    [
        ("stream", "Accept: text/event-stream"),
        ("Stream", "Accept: text/event-stream"),
        ("modle", "Did you mean 'model'?"),
        ("Content", "Did you mean 'content'?"),
        ("thread_id", "Did you mean 'threadId'?"),
        ("threadID", "Did you mean 'threadId'?"),
        ("deadline", "Did you mean 'deadlineSeconds'?"),
        ("idempotency_key", "Idempotency-Key"),
        ("wait", "Prefer: wait"),
        ("temperature", "Known: content, correlationId"),
        ("", "Known: "),
        ("\x00", "Known: "),
        ("x" * 10_000, "Known: "),
    ],
)
def test_an_unknown_field_of_a_message(field: str, hint: str) -> None:
    response = post("/api/chat/messages", {"content": "x", field: True})
    assert response.status_code == 400
    body = response.json()
    assert body["code"] == "unknown_name"
    assert repr(field[:100]) in body["error"]
    assert hint in body["error"]
    assert len(body["error"]) < 400
    assert not Run.objects.exists()


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("/api/chat/threads?offset=3", "'offset'. Known: archived, before, limit."),
        ("/api/chat/threads?Limit=3", "'limit'"),
        ("/api/chat/threads?limits=3", "'limit'"),
        ("/api/chat/threads?", ""),
        ("/api/chat/threads?limit=3&limit=4", "only once"),
        ("/api/chat/models?page=1", "None is known here"),
        ("/api?x", "None is known here"),
        ("/api/chat/threads?utm_source=x", "utm_source"),
    ],
)
def test_unknown_query_parameters(path: str, hint: str) -> None:
    response = Client().get(path)
    assert response.status_code == (400 if hint else 200)
    assert hint in response.json().get("error", "")


@pytest.mark.parametrize(
    ("query", "hint"),
    [
        ("offset=3", "'offset'"),
        ("filter[threads]=x", "'filter[thread]'"),
        ("filter=x", "'filter'"),
        ("page[sizes]=1", "'page[size]'"),
        ("includes=thread", "'include'"),
        ("include=threads", "'thread'"),
        ("fields[runs]=state", "'state'"),
        ("Sort=createdAt", "'sort'"),
    ],
)
def test_unknown_query_parameters_of_json_api(query: str, hint: str) -> None:
    error = only_error(Client().get(f"/api/runs?{query}"), 400)
    assert error["code"] == "unknown_name"
    assert error["source"]["parameter"] == query.partition("=")[0]
    assert hint in error["detail"]


def test_every_endpoint_refuses_unknown_query_parameters() -> None:
    """With every method that it has."""
    someone = visitor("token")
    seen = 0
    for route, outcomes in access.table().items():
        if not route.startswith(("api", "_")) or "..." in route:
            continue
        if route in ("api/schema", "api/docs"):
            continue
        for method in ("GET", "POST", "PATCH", "DELETE"):
            if outcomes[method][access.ROLES.index("token")] != "yes":
                continue
            path = address(route, someone.ids) + "?offsets=3"
            response = someone.send(method, path)
            assert response.status_code == 400, f"{method} {route}"
            assert "offsets" in response.content.decode(), f"{method} {route}"
            seen += 1
    assert seen > 40


@pytest.mark.parametrize("action", ["cancel", "retry"])
def test_calls_without_fields_take_none(action: str) -> None:
    someone = visitor("token")
    path = f"/api/chat/runs/{someone.ids['api/chat/runs/']}/{action}"
    response = someone.send("POST", path, b'{"reason": "x"}', content_type="application/json")
    assert (response.status_code, response.json()["code"]) == (400, "unknown_name")
    for nothing in (b"", b"{}"):
        assert someone.send("POST", path, nothing).status_code == 409


DOCUMENTS = {
    "/api/messages": ("messages", {"content": "x"}, "role", "contents"),
    "/_bot-registration": ("bot-registration", {"username": "@alice:localhost"}, "enabled", "name"),
    "/_webhook-subscription": (
        "webhook-subscription",
        {"url": "https://hooks.example.org/x"},
        "secret",
        "event",
    ),
}


@pytest.mark.parametrize("path", DOCUMENTS)
def test_unknown_attributes_and_members_of_documents(alice: User, path: str) -> None:
    kind, attributes, servers, unknown = DOCUMENTS[path]
    client = client_of(alice)

    def refused(pointer: str, document: dict[str, Any]) -> dict[str, Any]:
        error = only_error(client.send("POST", path, document), 400)
        assert error["source"] == {"pointer": pointer}
        return error

    def document(**extra: Any) -> dict[str, Any]:
        return {"data": {"type": kind, "attributes": attributes | extra}}

    error = refused(f"/data/attributes/{unknown}", document(**{unknown: 1}))
    assert f"Unknown attribute '{unknown}'." in error["detail"]
    refused(f"/data/attributes/{servers}", document(**{servers: "x"}))
    misplaced = document()
    misplaced["data"] |= {"content": "x"}
    refused("/data/content", misplaced)
    refused("/include", document() | {"include": "x"})
    refused(
        "/data/relationships/user",
        {"data": document()["data"] | {"relationships": {"user": {"data": None}}}},
    )


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("content", "Content"),
        ("content", "CONTENT"),
        ("correlationId", "correlation_id"),
        ("correlationId", "correlation-id"),
        ("correlation_id", "CorrelationId"),
    ],
)
def test_two_spellings_of_one_attribute(first: str, second: str) -> None:
    attributes = {"content": "x"} | {first: "a", second: "b"}
    document = {"data": {"type": "messages", "attributes": attributes}}
    error = only_error(Client().send("POST", "/api/messages", document), 400)
    assert error["source"] == {"pointer": f"/data/attributes/{second}"}
    assert repr(first) in error["detail"]
    assert not Run.objects.exists()


def test_an_attribute_beside_a_relationship_of_its_name() -> None:
    document = {
        "data": {
            "type": "messages",
            "attributes": {"content": "x", "Thread": "y"},
            "relationships": {"thread": {"data": {"type": "threads", "id": "z"}}},
        }
    }
    only_error(Client().send("POST", "/api/messages", document), 400)
    assert not Run.objects.exists()


BOM = b"\xef\xbb\xbf"


def test_a_byte_order_mark_is_taken_at_every_door(alice: User) -> None:
    assert post("/api/chat/messages", BOM + b'{"content": "x"}').status_code == 202
    client = client_of(alice)
    for path, (kind, attributes, *_) in DOCUMENTS.items():
        document = json.dumps({"data": {"type": kind, "attributes": attributes}}).encode()
        response = client.raw("POST", path, BOM + document)
        assert response.status_code in (201, 400), path
        assert "JSON" not in response.content.decode(), path
    thread = Run.objects.latest("created_at").thread_id
    response = Client().raw("PATCH", f"/api/chat/threads/{thread}", BOM + b'{"title": "T"}')
    assert response.status_code in (200, 404)


@pytest.mark.parametrize(
    "encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]
)
@pytest.mark.parametrize("path", ["/api/chat/messages", "/api/messages"])
def test_another_encoding_is_refused_by_name(path: str, encoding: str) -> None:
    body = '{"content": "x", "data": {}}'.encode(encoding)
    response = post(path, body)
    assert response.status_code == 400
    assert "UTF-8" in response.content.decode()


@pytest.mark.parametrize("body", [BOM, BOM + BOM + b"{}", b"{}" + BOM, b"\xff\xfe", b"\xfe\xff"])
def test_a_byte_order_mark_elsewhere_is_not_json(body: bytes) -> None:
    assert post("/api/chat/messages", body).status_code == 400


def test_the_nearest_name_does_not_take_long() -> None:
    assert names.nearest("x" * 1_000_000, {"content"}) is None
