"""What clients send over HTTP, to both servers: whatever it is, the answer is one of those that there
are for it, and never a 500."""

import json
import uuid
from typing import Any
from urllib.parse import quote

import pytest
from django.core import signing
from hypothesis import strategies as st
from rest_framework.request import Request
from rest_framework.test import APIClient, APIRequestFactory

from agents.runs import execution
from chat.api import streams, views
from realm import tokens
from realm.models import BotRegistration
from tests import factories
from tests.fuzz.examples import anything, numbers, objects, odd, tried, words

pytestmark = pytest.mark.django_db
# HTTP has no room for others.
HEADER = st.text(st.characters(min_codepoint=1, max_codepoint=255, exclude_characters="\r\n"))
KNOWN = {200, 201, 202, 204, 400, 401, 403, 404, 406, 409, 410, 411, 413, 415, 422}
ATTRIBUTES = {
    "model": words,
    "correlationId": words,
    "whenBusy": st.sampled_from(["enqueue", "merge", "reject", "interrupt"]),
    "deadlineSeconds": numbers,
}
LINK = objects({"data": objects({"type": st.just("threads"), "id": words})})
DOCUMENTS = {
    "/api/messages": ("messages", objects({"content": words}, **ATTRIBUTES)),
    "/_bot-registration": ("bot-registration", objects({"username": words})),
    "/_bot-commands": (
        "bot-command",
        objects({"botId": words, "command": words, "filter": anything}),
    ),
    "/_webhook-subscription": (
        "webhook-subscription",
        objects({"url": words}, events=anything, botId=words),
    ),
    "/_server-session": ("server-session", objects({"accessToken": words})),
}
PLAIN = {
    "/api/chat/messages": objects({"content": words}, threadId=words, **ATTRIBUTES),
    "/api/chat/threads/mine": objects({"title": words}, archived=st.booleans()),
}
CURSOR = st.one_of(
    words,
    st.builds(
        "{}.{}".format,
        st.one_of(st.integers(0, 10**17), words),
        st.one_of(words, st.just(str(uuid.uuid4())), st.just("mine")),
    ),
)
LISTS = ["/api/threads", "/api/messages", "/api/runs", "/api/threads/mine/messages"]
PLAIN_LISTS = ["/api/chat/threads", "/api/chat/threads/mine/messages", "/_bot-commands"]
PARAMETERS = {
    "page[size]": st.one_of(words, st.integers(-1, 2000).map(str)),
    "page[after]": CURSOR,
    "page[before]": CURSOR,
    "sort": st.one_of(words, st.sampled_from(["createdAt", "-updatedAt", "position"])),
    "include": st.one_of(words, st.sampled_from(["thread", "run.thread", "messages.run,runs"])),
    "filter[thread]": words,
    "filter[status]": st.one_of(words, st.just("queued,completed")),
    "filter[role]": words,
    "fields[messages]": st.one_of(words, st.just("content")),
    "before": CURSOR,
    "limit": st.one_of(words, st.integers(-1, 300).map(str)),
    "archived": words,
    "botId": st.one_of(words, st.just(str(uuid.uuid4()))),
}


@pytest.fixture
def client() -> APIClient:
    alice = factories.user("alice")
    BotRegistration.objects.create(user=alice, username="@alice:localhost")
    execution.execute(factories.ask("Hello", owner=alice, thread_id="mine").pk)
    client = APIClient(raise_request_exception=False)
    client.credentials(HTTP_AUTHORIZATION=f"Bearer {tokens.issue('@alice:localhost')}")
    return client


@pytest.fixture(autouse=True)
def _nowhere(settings: Any) -> None:
    settings.MATRIX_URL = "http://127.0.0.1:1"
    settings.HOOKS_ALLOWED_HOSTS = ["hooks.example.org"]


def checked(response: Any, *also: int) -> None:
    assert response.status_code in KNOWN | set(also), response.content
    if response.status_code >= 400:
        told = json.loads(response.content)
        assert told.get("errors") or told["error"]


def as_body(data: Any) -> bytes:
    return json.dumps(data).encode("utf-8", "surrogatepass")


def documents(kind: str, attributes: Any) -> Any:
    relationships = objects({}, thread=odd(LINK))
    members = {"type": st.just(kind), "attributes": attributes}
    resource = objects(members, id=words, relationships=relationships)
    return objects({"data": resource}) | anything


@pytest.mark.parametrize("path", sorted(DOCUMENTS))
def test_documents(client: APIClient, path: str) -> None:
    @tried(25, document=documents(*DOCUMENTS[path]))
    def each(document: Any) -> None:
        # No homeserver is there to ask: 503.
        answer = client.generic("POST", path, as_body(document), "application/vnd.api+json")
        checked(answer, 503)

    each()


@tried(
    50,
    asked=st.one_of(*(st.tuples(st.just(path), odd(body)) for path, body in PLAIN.items())),
    key=st.one_of(st.none(), HEADER),
    prefer=HEADER,
)
def test_plain_json(client: APIClient, asked: Any, key: str | None, prefer: str) -> None:
    path, body = asked[0], as_body(asked[1])
    method = "PATCH" if "threads" in path else "POST"
    headers = {"HTTP_PREFER": prefer} | ({} if key is None else {"HTTP_IDEMPOTENCY_KEY": key})
    checked(client.generic(method, path, body, "application/json", **headers))


@tried(40, path=st.sampled_from([*DOCUMENTS, *PLAIN]), body=st.binary(max_size=40), kind=HEADER)
def test_bytes_of_any_type(client: APIClient, path: str, body: bytes, kind: str) -> None:
    method = "PATCH" if "threads" in path else "POST"
    checked(client.generic(method, path, body, content_type=kind), 503)


@tried(
    100,
    path=st.sampled_from([*LISTS, *PLAIN_LISTS]),
    query=st.fixed_dictionaries({}, optional=PARAMETERS),
)
def test_queries(client: APIClient, path: str, query: dict[str, str]) -> None:
    asked = "&".join(
        f"{quote(name)}={quote(value.encode('utf-8', 'surrogatepass'))}"
        for name, value in query.items()
    )
    checked(client.get(f"{path}?{asked}"))


@tried(30, path=st.text(max_size=40), accept=HEADER, place=HEADER)
def test_addresses_and_headers(client: APIClient, path: str, accept: str, place: str) -> None:
    headers = {"HTTP_ACCEPT": accept, "HTTP_LAST_EVENT_ID": place, "HTTP_X_REQUEST_ID": place}
    for base in ("/api/", "/_", "/api/chat/runs/"):
        address = base + quote(path.encode("utf-8", "surrogatepass"), safe="/%")
        checked(client.get(address, **headers))


@tried(
    100,
    place=st.one_of(HEADER, st.from_regex(r"[0-9]{1,12}-([0-9]{1,12}|end)", fullmatch=True)),
    accept=st.one_of(HEADER, st.from_regex(r"(text/event-stream|\*/\*)(;q=[0-9.a-z]{1,5})?")),
    prefer=st.one_of(HEADER, st.from_regex(r'wait="?[0-9]{1,30}"?', fullmatch=True)),
)
def test_headers_of_streams(place: str, accept: str, prefer: str) -> None:
    headers = {"HTTP_LAST_EVENT_ID": place, "HTTP_ACCEPT": accept, "HTTP_PREFER": prefer}
    request = Request(APIRequestFactory().get("/", **headers))
    assert streams.wants_stream(request) in (True, False)
    assert 0 <= views._seconds_to_wait(request) <= 60
    for asked in (streams.requested_event_id, streams.requested_number):
        try:
            asked(request)
        except Exception as error:
            assert getattr(error, "status_code", 500) == 400


@tried(
    25,
    cookie=st.one_of(HEADER, st.just(signing.dumps({"a": 1}))),
    token=HEADER,
    page=st.sampled_from(["/", "/login", "/threads/mine", "/admin/", "/api/chat/threads"]),
)
def test_cookies(cookie: str, token: str, page: str) -> None:
    client = APIClient(raise_request_exception=False)
    cookies = f"sessionid={cookie}; csrftoken={token}"
    form = {"HTTP_COOKIE": cookies, "HTTP_X_CSRFTOKEN": token}
    assert client.get(page, HTTP_COOKIE=cookies).status_code in (200, 302, 404)
    assert client.post(page, {"content": "Hi"}, **form).status_code in (
        200,
        302,
        400,
        403,
        404,
        405,
    )
