"""How much anybody may ask for at once, and what is answered beyond it. Rates and budgets are apart."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
from axes.models import AccessAttempt
from django.db import connection
from django.test import Client
from rest_framework.test import APIClient

from chat.api import views
from chat.jsonapi import pagination
from config.server import bridge
from config.server import threads as server
from lib.jsonapi import documents
from lib.jsonapi import views as jsonapi
from realm import models, tokens
from realm.models import BotCommand, BotRegistration, User
from tests import factories
from tests.chat.asgi_client import go, request
from tests.chat.serving import serving
from tests.realm.conftest import command_of, registration_of

pytestmark = pytest.mark.django_db
DOCUMENT = "application/vnd.api+json"
# Each way to send a body: the method, the address, what it is sent as.
WAYS = [
    ("POST", "/api/chat/messages", "application/json"),
    ("POST", "/api/chat/messages", "application/x-www-form-urlencoded"),
    ("POST", "/api/chat/messages", "multipart/form-data; boundary=b"),
    ("PATCH", "/api/chat/threads/mine", "application/json"),
    ("POST", "/api/messages", DOCUMENT),
    ("POST", "/_bot-registration", DOCUMENT),
    ("DELETE", "/_bot-registration", DOCUMENT),
    ("POST", "/_bot-commands", DOCUMENT),
    ("DELETE", "/_bot-commands", DOCUMENT),
    ("POST", "/_webhook-subscription", DOCUMENT),
    ("POST", "/_server-session", DOCUMENT),
    ("POST", "/_server-session", "application/json"),
]
IDS = [f"{method} {path} {kind[:26]}" for method, path, kind in WAYS]


@pytest.fixture
def alice() -> User:
    return factories.user("alice")


@pytest.fixture
def client(alice: User) -> APIClient:
    factories.ask("Hello", owner=alice, thread_id="mine")
    client = APIClient()
    client.credentials(HTTP_AUTHORIZATION=f"Bearer {tokens.issue('@alice:localhost')}")
    return client


def refused(response: Any, status: int) -> None:
    """In the words of its server."""
    assert response.status_code == status, response.content
    result = json.loads(response.content)
    if response["Content-Type"] == DOCUMENT:
        assert result["errors"][0]["status"] == str(status)
    else:
        assert result["ok"] is False


CHUNKED = (
    b"POST /api/chat/messages HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)


class TestBodies:
    @pytest.mark.parametrize(("method", "path", "kind"), WAYS, ids=IDS)
    def test_one_that_is_too_long(
        self, client: APIClient, settings: Any, method: str, path: str, kind: str
    ) -> None:
        body = b'{"content":"' + b"x" * settings.DATA_UPLOAD_MAX_MEMORY_SIZE + b'"}'
        refused(client.generic(method, path, body, kind), 413)

    @pytest.mark.parametrize(("method", "path", "kind"), WAYS, ids=IDS)
    def test_one_that_does_not_say_how_long_it_is(
        self, client: APIClient, method: str, path: str, kind: str
    ) -> None:
        chunked = {"HTTP_TRANSFER_ENCODING": "chunked"}
        refused(client.generic(method, path, content_type=kind, **chunked), 411)

    @pytest.mark.parametrize(("method", "path", "kind"), WAYS, ids=IDS)
    @pytest.mark.parametrize("opening", ["[", '{"a":', '{"data":[{"a":'])
    def test_one_that_is_too_deep(
        self, client: APIClient, method: str, path: str, kind: str, opening: str
    ) -> None:
        refused(client.generic(method, path, (opening * 50_000).encode(), kind), 400)

    def test_a_document_may_be_as_deep_as_documents_are_and_no_deeper(
        self, client: APIClient
    ) -> None:
        def nested(levels: int) -> bytes:
            meta: Any = 1
            for _ in range(levels - 1):
                meta = {"a": meta}
            document = registration_of("@alice:localhost") | {"meta": meta}
            return json.dumps(document).encode()

        def sent(levels: int) -> Any:
            return client.generic("POST", "/_bot-registration", nested(levels), DOCUMENT)

        assert sent(documents.MAX_DEPTH).status_code == 201
        refused(sent(documents.MAX_DEPTH + 1), 400)

    def test_forms_have_so_many_fields_and_no_more(self, alice: User) -> None:
        browser = Client()
        browser.force_login(alice)
        assert browser.post("/", {f"f{n}": "x" for n in range(2000)}).status_code == 400
        assert browser.post("/", {"content": "x" * 2_000_000}).status_code == 400


class TestPages:
    @pytest.mark.parametrize("path", ["/api/threads", "/api/messages", "/api/runs"])
    @pytest.mark.parametrize("size", ["0", "-1", "101", "1e3", "100.0", "9" * 400, "\u0661", ""])
    def test_of_documents(self, client: APIClient, path: str, size: str) -> None:
        assert pagination.MAX_SIZE == 100
        assert client.get(path, {"page[size]": "100"}).status_code == 200
        refused(client.get(path, {"page[size]": size}), 400)

    @pytest.mark.parametrize("path", ["/api/chat/threads", "/api/chat/threads/mine/messages"])
    @pytest.mark.parametrize("limit", ["0", "-1", "201", "1e2", "9" * 400, "\u0661", ""])
    def test_of_plain_json(self, client: APIClient, path: str, limit: str) -> None:
        assert views.MAX_PAGE == 200
        assert client.get(path, {"limit": "200"}).status_code == 200
        refused(client.get(path, {"limit": limit}), 400)

    def test_what_is_included_is_not_told_endlessly(self, client: APIClient) -> None:
        deep = ".".join(["messages", "thread"] * 50)
        wide = ",".join(["messages"] * (jsonapi.MAX_INCLUDE_PATHS + 1))
        for include in (deep, wide, "messages.thread.messages.thread"):
            refused(client.get("/api/threads/mine", {"include": include}), 400)
        twice = client.get("/api/threads/mine", {"include": "messages,messages.run,messages"})
        assert len(twice.json()["included"]) == 2

    @pytest.mark.parametrize("model", [BotRegistration, BotCommand])
    def test_what_is_listed_whole_cannot_grow_without_end(
        self, client: APIClient, alice: User, monkeypatch: pytest.MonkeyPatch, model: Any
    ) -> None:
        monkeypatch.setattr(models, "MAX_EACH", 2)
        bot = BotRegistration.objects.create(user=alice, username="@alice:localhost")
        registers = model is BotRegistration
        document = registration_of("@alice:localhost") if registers else command_of(bot.pk)
        path = "/_bot-registration" if registers else "/_bot-commands"

        statuses = []
        for _ in range(3):
            answer = client.generic("POST", path, json.dumps(document), DOCUMENT)
            statuses.append(answer.status_code)

        assert statuses == ([201, 409, 409] if registers else [201, 201, 409])
        refused(answer, 409)
        assert "at most 2" in answer.json()["errors"][0]["detail"]
        assert model.objects.count() == 2


class TestHeads:
    @pytest.mark.parametrize(
        ("path", "headers"),
        [
            ("/api?q=" + "x" * bridge.MAX_HEAD_BYTES, {}),
            ("/api/" + "x" * bridge.MAX_HEAD_BYTES, {}),
            ("/api", {"x-long": "x" * bridge.MAX_HEAD_BYTES}),
            ("/api", {f"x-{number}": "x" * 30 for number in range(2000)}),
            ("/admin/", {"cookie": "x" * bridge.MAX_HEAD_BYTES}),
        ],
        ids=["query", "path", "header", "headers", "cookie"],
    )
    def test_one_that_is_too_long(self, path: str, headers: dict[str, str]) -> None:
        async def scene() -> None:
            async with request(path, **headers) as response:
                await response.end()
                assert response.status == 431
                assert json.loads(response.body)["ok"] is False

        go(scene())

    def test_one_of_a_usual_length(self) -> None:
        async def scene() -> None:
            async with request("/api/schema?q=" + "x" * 8000, cookie="x" * 8000) as response:
                assert response.status == 200

        go(scene())

    @pytest.mark.parametrize(
        "raw",
        [
            b"GET /api HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
            b"GET /api HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            b"GET /api HTTP/1.1\r\nHost: a\r\nX : y\r\n\r\n",
            b"GET /api HTTP/1.1\r\nHost: a\r\nX: a\0b\r\n\r\n",
            b"GET /api HTTP/9.9\r\nHost: a\r\n\r\n",
            b"\x16\x03\x01\x00\xa5\x01\x00\x00",
        ],
        ids=["two lengths", "two framings", "name with a space", "nul", "version", "tls"],
    )
    @pytest.mark.django_db(transaction=True)
    def test_one_that_two_servers_might_read_differently(self, raw: bytes) -> None:
        async def scene() -> None:
            async with serving() as url:
                reader, writer = await asyncio.open_connection(
                    "127.0.0.1", int(url.rpartition(":")[2])
                )
                writer.write(raw)
                async with asyncio.timeout(120):
                    result = await reader.readline()
                    rest = await reader.read()
                assert result.split()[1] == b"400"
                assert b"HTTP/1.1" not in rest, "what came after it is not taken for a request"
                writer.close()

        go(scene())

    @pytest.mark.parametrize(
        ("beginning", "piece", "status"),
        [
            (b"GET /api", b"x" * 1000, b"431"),
            (b"GET /api HTTP/1.1\r\nHost: a\r\nX: ", b"x" * 1000, b"431"),
            (b"GET /api HTTP/1.1\r\nHost: a\r\n", b"X: y\r\n" * 100, b"431"),
            (CHUNKED + b"5;", b"x" * 1000, b""),
            (CHUNKED + b"2\r\n{}\r\n0\r\nX: ", b"x" * 1000, b""),
        ],
        ids=["address", "header", "headers", "extension", "trailer"],
    )
    @pytest.mark.django_db(transaction=True)
    def test_one_that_never_ends(self, beginning: bytes, piece: bytes, status: bytes) -> None:
        """It is not kept on and on: the connection is closed."""

        async def scene() -> None:
            async with serving() as url:
                port = int(url.rpartition(":")[2])
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(beginning)
                sent = 0
                async with asyncio.timeout(120):
                    with suppress(ConnectionError):
                        while not reader.at_eof() and sent < 10_000_000:
                            writer.write(piece)
                            sent += len(piece)
                            await writer.drain()
                            await asyncio.sleep(0)
                assert sent < 10_000_000
                with suppress(ConnectionError):
                    assert status in await reader.readline()
                writer.close()

        go(scene())


@pytest.mark.django_db(transaction=True)
def test_fifty_guesses_at_once_are_no_more_than_a_few_after_the_other() -> None:
    User.objects.create_superuser("admin", password="right-password")

    def guess(number: int) -> int:
        try:
            form = {"username": "admin", "password": f"wrong-{number}"}
            return int(Client().post("/admin/login/", form).status_code)
        finally:
            connection.close()

    with ThreadPoolExecutor(server.THREADS) as threads:
        statuses = list(threads.map(guess, range(50)))

    tried = statuses.count(200)
    # Those that are under way when the lock falls.
    assert tried <= 5 + server.THREADS
    assert statuses.count(429) == 50 - tried
    assert AccessAttempt.objects.get().failures_since_start >= 5
    right = {"username": "admin", "password": "right-password"}
    assert Client().post("/admin/login/", right).status_code == 429
