"""Whatever comes in at whichever JSON:API address, the answer is a document, and never a 500."""

import json
import logging
import re
import uuid
from typing import Any

import pytest
from django.db import DatabaseError

from chat.models import Message
from realm import views
from realm.models import BotCommand, BotRegistration, User
from tests.realm.conftest import JSON_API, Client, a_filter, client_of, only_error, registration_of
from tests.security.routes import routes
from webhooks.models import Subscription

pytestmark = pytest.mark.django_db
GOOD = registration_of("@alice:localhost")
# The same in every process that collects these tests.
NOBODY = "00000000-0000-4000-8000-000000000000"
RESOURCE = GOOD["data"]
HOOK = "https://hooks.example.org/runs"

# Where something is made: the type of it, and attributes that will do. What is sent to one address is
# sent to all, with these put in the place of a registration's.
MAKERS: dict[str, tuple[str, dict[str, Any]]] = {
    "/_bot-registration": ("bot-registration", RESOURCE["attributes"]),
    "/_bot-commands": (
        "bot-command",
        {"botId": NOBODY, "command": "ping", "filter": a_filter()},
    ),
    "/_webhook-subscription": ("webhook-subscription", {"url": HOOK}),
    "/_server-session": ("server-session", {"accessToken": "x"}),
    "/api/messages": ("messages", {"content": "Hello"}),
}
# What these make needs nobody else: a bot, or a homeserver.
ALONE = ("/_bot-registration", "/_webhook-subscription", "/api/messages")
DELETERS = ("/_bot-registration", "/_bot-commands", "/_webhook-subscription")
READERS = (
    "/_bot-registrations",
    "/_bot-commands",
    "/_webhook-subscriptions",
    "/api/threads",
    "/api/messages",
    "/api/runs",
)


@pytest.fixture(autouse=True)
def _settings(settings: Any) -> None:
    settings.HOOKS_ALLOWED_HOSTS = ["hooks.example.org"]


def body_at(path: str, document: Any) -> bytes:
    """As that address would have it: a document, or bytes that look like one."""
    kind, attributes = MAKERS[path]
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    for usual, ours in ((RESOURCE["attributes"], attributes), ("bot-registration", kind)):
        body = body.replace(json.dumps(usual).encode(), json.dumps(ours).encode())
    return body


def nothing_is_made() -> bool:
    made = (BotRegistration, BotCommand, Subscription, Message)
    return not any(model._default_manager.exists() for model in made)


def test_every_address_of_documents_is_tried() -> None:
    tried = {*MAKERS, *DELETERS, *READERS}
    found = {
        f"/{route}"
        for route in routes()
        if "<" not in route and "..." not in route and "/chat" not in route
    }
    documents = {
        path for path in found if path.startswith("/_") or re.match("/api/[a-z]+$", path)
    } - {"/api/docs", "/api/schema"}
    assert tried == documents


@pytest.fixture
def client(alice: User) -> Client:
    return client_of(alice)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"{",
        b"{'data': 1}",
        b"\x00",
        b"\xff\xfe{}",
        b"\xef\xbb\xbf{}",
        b'{"data": {"type": "bot-registration", "attributes": {"username": "\xff"}}}',
        b'{"data": {"type": "bot-registration", "attributes": {"username": "\\ud800"}}}',
        b'{"data": {"type": "bot-registration", "attributes": {"username": NaN}}}',
        b'{"data": {"type": "bot-registration", "attributes": {"username": Infinity}}}',
        b'{"data": {"type": "bot-registration", "attributes": {"username": 1e999}}}',
        b'{"data": {"type": "bot-registration", "attributes": {"username": "\x00"}}}',
        b'{"data": {"type": "bot-registration"}} trailing',
        b"[" * 200_000,
        b"[" * 500 + b"]" * 500,
        b'{"data":' * 100_000,
        b'{"a":' * 30 + b"1" + b"}" * 30,
        b"1" * 5000,
        json.dumps(GOOD).encode("utf-16"),
        b"username=@alice:localhost",
        b"<data/>",
    ],
)
def test_bodies_that_are_no_document(client: Client, body: bytes) -> None:
    for path in MAKERS:
        response = client.raw("POST", path, body_at(path, body))
        if body:
            only_error(response, 400)
        # What is not there lacks all that there must be.
        assert response.status_code == 400
        assert response.headers["Content-Type"] == JSON_API
    assert nothing_is_made()


@pytest.mark.parametrize(
    ("document", "status", "pointer"),
    [
        (None, 400, "/data"),
        (7, 400, "/data"),
        ("x", 400, "/data"),
        ([], 400, "/data"),
        ([GOOD], 400, "/data"),
        ({}, 400, "/data"),
        ({"errors": []}, 400, "/data"),
        ({"data": None}, 400, "/data"),
        ({"data": []}, 400, "/data"),
        ({"data": [RESOURCE]}, 400, "/data"),
        ({"data": "x"}, 400, "/data"),
        ({"data": {}}, 400, "/data/type"),
        ({"data": RESOURCE | {"type": None}}, 400, "/data/type"),
        ({"data": RESOURCE | {"type": 7}}, 400, "/data/type"),
        ({"data": RESOURCE | {"type": ["bot-registration"]}}, 400, "/data/type"),
        ({"data": RESOURCE | {"type": {}}}, 400, "/data/type"),
        ({"data": RESOURCE | {"type": "bot-registrations"}}, 409, "/data/type"),
        ({"data": RESOURCE | {"type": "x" * 100_000}}, 409, "/data/type"),
        ({"data": RESOURCE | {"id": str(uuid.uuid4())}}, 403, "/data/id"),
        ({"data": RESOURCE | {"id": None}}, 403, "/data/id"),
        ({"data": RESOURCE | {"id": 7}}, 403, "/data/id"),
        ({"data": {"type": "bot-registration"}}, 400, "/data/attributes/username"),
        ({"data": RESOURCE | {"attributes": None}}, 400, "/data/attributes"),
        ({"data": RESOURCE | {"attributes": [1]}}, 400, "/data/attributes"),
        ({"data": RESOURCE | {"attributes": "x"}}, 400, "/data/attributes"),
        ({"data": RESOURCE | {"attributes": 0}}, 400, "/data/attributes"),
        ({"data": RESOURCE | {"attributes": {"id": "x"}}}, 400, "/data/attributes/id"),
        ({"data": RESOURCE | {"attributes": {"type": "x"}}}, 400, "/data/attributes/type"),
        ({"data": RESOURCE | {"relationships": None}}, 400, "/data/relationships"),
        ({"data": RESOURCE | {"relationships": [None]}}, 400, "/data/relationships"),
        ({"data": RESOURCE | {"relationships": "x"}}, 400, "/data/relationships"),
    ],
)
def test_documents_of_the_wrong_shape(
    client: Client, document: Any, status: int, pointer: str
) -> None:
    # What is missing is told of each in its own words.
    some = ["/_bot-registration"] if pointer.endswith("username") else MAKERS
    for path in some:
        error = only_error(client.raw("POST", path, body_at(path, document)), status)
        assert error["source"] == {"pointer": pointer}
        assert len(error["detail"]) < 200
    assert nothing_is_made()


@pytest.mark.parametrize(
    "relationship",
    [
        None,
        7,
        "x",
        [],
        [None],
        {},
        {"links": {}},
        {"data": 7},
        {"data": "x"},
        {"data": [None]},
        {"data": ["x"]},
        {"data": [[]]},
        {"data": {}},
        {"data": {"type": "thread"}},
        {"data": {"type": "thread", "id": None}},
        {"data": {"type": "thread", "id": 7}},
        {"data": {"type": None, "id": "x"}},
        {"data": [{"type": "thread", "id": "x"}, None]},
    ],
)
def test_relationships_of_the_wrong_shape(client: Client, relationship: Any) -> None:
    for name, step in [("thread", "thread"), ("a/b~c", "a~1b~0c")]:
        document = {"data": RESOURCE | {"relationships": {name: relationship}}}
        for path in MAKERS:
            error = only_error(client.raw("POST", path, body_at(path, document)), 400)
            assert error["source"] == {"pointer": f"/data/relationships/{step}"}
    assert nothing_is_made()


@pytest.mark.parametrize("path", MAKERS)
def test_a_name_stands_for_one_thing(client: Client, path: str) -> None:
    for name in (*MAKERS[path][1], "id", "type"):
        document = {"data": RESOURCE | {"relationships": {name: {"data": None}}}}
        only_error(client.raw("POST", path, body_at(path, document)), 400)
    assert nothing_is_made()


@pytest.mark.parametrize(
    "extra",
    [
        {"relationships": {}},
        {"lid": "a"},
        {"meta": {"a": 1}},
        {"links": None},
    ],
)
def test_what_is_allowed_and_not_needed_is_passed_over(
    client: Client, extra: dict[str, Any]
) -> None:
    document = {"data": RESOURCE | extra, "meta": {"b": [1]}, "jsonapi": {"version": "1.1"}}
    for path in ALONE:
        assert client.raw("POST", path, body_at(path, document)).status_code == 201


@pytest.mark.parametrize("linkage", [None, [], [{"type": "thread", "id": "x"}]])
def test_unknown_relationships_are_refused(client: Client, linkage: Any) -> None:
    document = {"data": RESOURCE | {"relationships": {"threads": {"data": linkage}}}}
    for path in MAKERS:
        error = only_error(client.raw("POST", path, body_at(path, document)), 400)
        assert error["source"] == {"pointer": "/data/relationships/threads"}
        assert "threads" in error["detail"]
    assert nothing_is_made()


@pytest.mark.parametrize("path", DELETERS)
@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        (b"", "/data/id"),
        (b"{}", "/data"),
        (b"[]", "/data"),
        (b'{"data": null}', "/data"),
        (b'{"data": []}', "/data"),
        (b'{"data": {}}', "/data/type"),
        (b'{"data": {"type": "TYPE"}}', "/data/id"),
        (b'{"data": {"type": "TYPE", "id": null}}', "/data/id"),
        (b'{"data": {"type": "TYPE", "id": 7}}', "/data/id"),
        (b'{"data": {"type": "TYPE", "id": ["x"]}}', "/data/id"),
        (b'{"data": {"type": "TYPE", "id": ""}}', "/data/id"),
        (b'{"data": {"type": "TYPE", "id": "*"}}', "/data/id"),
        (b'{"data": {"type": "TYPE", "id": "\\u0000"}}', "/data/id"),
        (b'{"data": {"type": "TYPE", "id": "' + b"9" * 100_000 + b'"}}', "/data/id"),
        (b'{"data": {"type": "TYPE", "attributes": {"id": "ID"}}}', "/data/attributes/id"),
    ],
)
def test_deleting_needs_an_id(
    client: Client, alice: User, path: str, body: bytes, pointer: str
) -> None:
    """An empty body is never "all of them"."""
    row = hers(path, alice)
    kind = MAKERS[path][0].encode()
    body = body.replace(b"TYPE", kind).replace(b"ID", str(row.pk).encode())
    error = only_error(client.raw("DELETE", path, body), 400)
    assert error["source"] == {"pointer": pointer}
    row.refresh_from_db()


def hers(path: str, alice: User) -> Any:
    """What she could delete there."""
    bot = BotRegistration.objects.create(user=alice, username="@alice:localhost")
    if path == "/_bot-commands":
        return BotCommand.objects.create(registration=bot, command="ping", filter=a_filter())
    if path == "/_webhook-subscription":
        return Subscription.objects.create(owner=alice, url=HOOK)
    return bot


@pytest.mark.parametrize("path", DELETERS)
def test_deleting_wants_the_right_type(client: Client, alice: User, path: str) -> None:
    row = hers(path, alice)
    document = {"data": {"type": "messages", "id": str(row.pk)}}
    only_error(client.send("DELETE", path, document), 409)
    row.refresh_from_db()
    document["data"]["type"] = MAKERS[path][0]
    assert client.send("DELETE", path, document).status_code == 204


@pytest.mark.parametrize("pk", ["x", "1", "%00", "%FF", "..%2f", "9" * 3000, "%F0%9F%98%80"])
@pytest.mark.parametrize("path", DELETERS)
def test_an_address_that_names_no_id(client: Client, path: str, pk: str) -> None:
    only_error(client.delete(f"{path}/{pk}"), 400)


def test_a_body_that_is_too_large(client: Client) -> None:
    body = json.dumps({"data": RESOURCE | {"meta": {"a": "x" * 5_000_000}}}).encode()
    for method, paths in (("POST", MAKERS), ("DELETE", DELETERS)):
        for path in paths:
            assert only_error(client.raw(method, path, body), 413)["code"] == "too_large"
    response = Client().raw("POST", "/_server-session", body, content_type="application/json")
    only_error(response, 413)


def test_a_body_of_unknown_length_is_not_taken_for_none(client: Client) -> None:
    for method, paths in (("POST", MAKERS), ("DELETE", DELETERS)):
        for path in paths:
            only_error(client.raw(method, path, HTTP_TRANSFER_ENCODING="chunked"), 411)


@pytest.mark.parametrize(
    "media_type",
    [
        "application/vnd.api+json; charset=utf-8",
        "application/vnd.api+json;ext=bulk",
        'application/vnd.api+json; profile="http://a/b"; version=1',
        "APPLICATION/VND.API+JSON; charset=utf-8",
        "application/json; charset=utf-16",
        "application/json; charset=hex",
        "application/json; charset=bz2_codec",
        "application/json; charset=",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "text/plain",
        "text/html",
        "application/xml",
        "",
        "x",
        ";;;",
        "*/*",
        "application/*",
        "application/vnd.api+json" + "x" * 5000,
    ],
)
def test_media_types_that_are_not_spoken(client: Client, media_type: str) -> None:
    for path in MAKERS:
        answer = client.raw("POST", path, body_at(path, GOOD), content_type=media_type)
        assert only_error(answer, 415)["detail"].endswith(
            "Send application/vnd.api+json or application/json, without parameters, in UTF-8."
        )
    assert nothing_is_made()


@pytest.mark.parametrize(
    "media_type",
    [
        "application/vnd.api+json",
        "Application/Vnd.Api+JSON",
        'application/vnd.api+json; profile="http://example.com/last-modified"',
        "application/json",
        "application/json; charset=utf-8",
        "application/json;charset=UTF-8",
    ],
)
def test_media_types_that_are_spoken(client: Client, media_type: str) -> None:
    for path in ALONE:
        response = client.raw("POST", path, body_at(path, GOOD), content_type=media_type)
        assert response.status_code == 201


@pytest.mark.parametrize("media_type", [f"{JSON_API}; charset=utf-8", "text/html; charset=utf-16"])
def test_the_media_type_counts_without_a_body_too(client: Client, media_type: str) -> None:
    for path in (*READERS, "/_bot-commands?botId=%41"):
        only_error(client.raw("GET", path, content_type=media_type), 415)


@pytest.mark.parametrize(
    "accept",
    [
        "application/vnd.api+json; charset=utf-8",
        "application/vnd.api+json;ext=bulk, application/vnd.api+json;v=1",
        "application/vnd.api+json; charset=utf-8, */*",
        "application/vnd.api+json;q=0",
        "text/html",
        "application/xml;q=0.9, image/*",
        ";;;",
        "x" * 9000,
    ],
)
def test_answers_that_cannot_be_given(client: Client, accept: str) -> None:
    for path in READERS:
        only_error(client.get(path, HTTP_ACCEPT=accept), 406)
    for path in MAKERS:
        only_error(client.raw("POST", path, body_at(path, GOOD), HTTP_ACCEPT=accept), 406)
    assert nothing_is_made()


@pytest.mark.parametrize(
    ("accept", "answer"),
    [
        ("", JSON_API),
        ("*/*", JSON_API),
        ("application/*", JSON_API),
        (JSON_API, JSON_API),
        (f"{JSON_API}; q=0.5, application/json", JSON_API),
        (f"{JSON_API}; charset=utf-8, {JSON_API}", JSON_API),
        (f'{JSON_API}; profile="http://example.com/x"', JSON_API),
        ("text/html, application/json;q=0.9", "application/json"),
        ("text/html,application/xhtml+xml,*/*;q=0.8", JSON_API),
    ],
)
def test_answers_that_can(client: Client, accept: str, answer: str) -> None:
    for path in READERS:
        response = client.get(path, HTTP_ACCEPT=accept)
        assert response.status_code == 200
        assert response.headers["Content-Type"] == answer
        assert "Accept" in response.headers["Vary"]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/_bot-registration", "POST, DELETE"),
        ("POST", "/_bot-registrations", "GET, HEAD"),
        ("PUT", "/_bot-commands", "GET, POST, DELETE, HEAD"),
        ("PATCH", "/_bot-commands", "GET, POST, DELETE, HEAD"),
        ("OPTIONS", "/_bot-commands", "GET, POST, DELETE, HEAD"),
        ("TRACE", "/_bot-commands", "GET, POST, DELETE, HEAD"),
        ("BREW", "/_bot-commands", "GET, POST, DELETE, HEAD"),
        ("POST", f"/_bot-registration/{NOBODY}", "DELETE"),
        ("GET", f"/_bot-commands/{NOBODY}", "DELETE"),
        ("GET", "/_server-session", "POST"),
    ],
)
def test_wrong_methods(nobody: Client, method: str, path: str, allowed: str) -> None:
    response = nobody.raw(method, path)
    assert only_error(response, 405)["code"] == "method_not_allowed"
    assert response.headers["Allow"] == allowed


@pytest.mark.parametrize(
    "path",
    [
        "/_",
        "/_nothing",
        "/_bot-registrations/x",
        "/_bot-registration/a/b",
        "/_server-session/x",
        "/_%00",
        "/_%FF",
        "/_x%0Ay",
        "/_<script>",
        "/_" + "x" * 5000,
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "OPTIONS", "BREW"])
def test_addresses_where_nothing_is(nobody: Client, path: str, method: str) -> None:
    only_error(nobody.raw(method, path), 404)


@pytest.mark.parametrize(
    ("query", "parameter"),
    [
        ("sort=id", "sort"),
        ("sort=-user__password", "sort"),
        ("filter[user]=1", "filter[user]"),
        ("filter[username]=%00", "filter[username]"),
        ("page[size]=1000000", "page[size]"),
        ("page=1", "page"),
        ("user=1", "user"),
        ("botid=1", "botid"),
        ("include=user", "include"),
        ("include=commands", "include"),
        ("include=a.b.c.d", "include"),
        ("include=" + ".".join(["commands", "registration"] * 50), "include"),
        ("include=" + ",".join(["commands"] * 1000), "include"),
        ("include=,", "include"),
        ("x" * 3000 + "=1", "x" * 100),
        ("%00=1", "\x00"),
    ],
)
def test_query_parameters_that_are_not_known(client: Client, query: str, parameter: str) -> None:
    known = ("sort=", "page[size]")  # to lists of the chat server: tests/chat/test_resources.py
    for path in READERS:
        if path.startswith("/_") or not query.startswith(known):
            error = only_error(client.get(f"{path}?{query}"), 400)
            assert error["source"] == {"parameter": parameter}


def test_more_query_parameters_than_anybody_needs(client: Client) -> None:
    query = "&".join(f"fields[{number}]=x" for number in range(2000))
    for path in READERS:
        only_error(client.get(f"{path}?{query}"), 400)


def test_fields_of_nothing(client: Client, alice: User) -> None:
    BotRegistration.objects.create(user=alice, username="@alice:localhost")
    for query in ("fields[bot-registration]=", "include="):
        [result] = client.get(f"/_bot-registrations?{query}").json()["data"]
        assert "attributes" in result or query.startswith("fields")


def test_some_fields(client: Client, alice: User) -> None:
    BotRegistration.objects.create(user=alice, username="@alice:localhost")

    query = "fields[bot-registration]=createdAt,enabled"
    [result] = client.get(f"/_bot-registrations?{query}").json()["data"]

    assert set(result["attributes"]) == {"createdAt", "enabled"}


@pytest.mark.parametrize(
    ("query", "parameter"),
    [
        ("fields[x]=y", "fields[x]"),
        ("fields[bot-registration]=createdAt,nope", "fields[bot-registration]"),
        ("fields[bot-registration]=created_at", "fields[bot-registration]"),
        ("fields[bot-registration=enabled", "fields[bot-registration"),
        ("fields=%00", "fields"),
        ("fields[]=x", "fields[]"),
        ("include=&include=", "include"),
    ],
)
def test_fields_that_there_are_not(client: Client, query: str, parameter: str) -> None:
    error = only_error(client.get(f"/_bot-registrations?{query}"), 400)
    assert error["source"] == {"parameter": parameter}


def test_a_host_that_is_not_ours(nobody: Client) -> None:
    for path in READERS:
        only_error(nobody.get(path, HTTP_HOST="evil.example"), 400)


def test_a_database_that_fails(
    client: Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any) -> None:
        raise DatabaseError("secret detail")

    monkeypatch.setattr(views.BotRegistration.objects, "of", fail)
    response = client.get("/_bot-registrations")
    assert "secret" not in only_error(response, 503)["detail"]
    assert response.headers["Retry-After"] == "1"
    assert "secret detail" in caplog.text


def test_a_mistake_of_ours(
    client: Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any) -> None:
        raise KeyError("secret detail")

    monkeypatch.setattr(views.BotRegistration.objects, "of", fail)
    with caplog.at_level(logging.ERROR):
        error = only_error(client.get("/_bot-registrations"), 500)
    assert "secret" not in json.dumps(error)
    assert "Traceback" in caplog.text
