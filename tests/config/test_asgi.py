"""The bridge from the ASGI server to Django's WSGI handler."""

import asyncio
import json
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
from django.contrib import admin
from django.http import HttpRequest, HttpResponse, JsonResponse, StreamingHttpResponse
from django.urls import path
from django.views.decorators.csrf import csrf_exempt

from config import asgi
from config.server import bridge
from config.server import threads as server
from config.server.callers import UNKNOWN, HeldBytes
from config.server.response import WSGIResponse, wsgi_environ
from tests.chat.asgi_client import Response, go, request

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.urls(__name__)]


@csrf_exempt
def echo(request: HttpRequest, rest: str = "") -> HttpResponse:
    meta = {name: value for name, value in request.META.items() if isinstance(value, str)}
    return JsonResponse({"meta": meta, "body": request.body.decode(), "path": request.path})


def long(request: HttpRequest) -> HttpResponse:
    return StreamingHttpResponse(b"x" * 100_000 for _ in range(20))


def broken(request: HttpRequest) -> HttpResponse:
    def pieces() -> Iterator[bytes]:
        yield b"x" * 300_000
        raise RuntimeError("half way")

    return StreamingHttpResponse(pieces())


urlpatterns = [
    path("", echo, name="chat"),  # the page of an error links to it
    path("api/long", long),
    path("api/broken", broken),
    path("api/echo", echo),
    path("api/echo/<path:rest>", echo),
    path("admin/", admin.site.urls),  # whose paths a middleware asks for
]


def answer(
    path: str, method: str = "GET", body: Any = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    found: list[Response] = []

    async def scene() -> None:
        async with request(path, method, body, **headers) as response:
            found.append(await response.end())

    go(scene())
    return found[0].status, found[0].headers, found[0].body


def test_a_request_comes_as_it_was_sent() -> None:
    status, headers, raw = answer("/api/echo/a%20%C3%A4?q=%C3%A4", "POST", {"a": 1}, x_one="1")
    result = json.loads(raw)

    assert status == 200
    assert headers["content-type"] == "application/json"
    assert result["path"] == "/api/echo/a ä"
    assert result["body"] == '{"a": 1}'
    assert result["meta"]["QUERY_STRING"] == "q=%C3%A4"
    assert result["meta"]["HTTP_X_ONE"] == "1"
    assert result["meta"]["REMOTE_ADDR"] == "127.0.0.1"


def test_a_header_cannot_pass_for_another() -> None:
    scope = {
        "method": "GET",
        "path": "/",
        "query_string": b"",
        "http_version": "1.1",
        "headers": [(b"x_forwarded_proto", b"https"), (b"a", b"1"), (b"a", b"2")],
    }
    environ = wsgi_environ(scope, b"")
    assert "HTTP_X_FORWARDED_PROTO" not in environ
    assert environ["HTTP_A"] == "1,2"


@pytest.mark.parametrize("charset", ["hex", "bz2_codec", "undefined", "nope"])
def test_a_charset_that_is_none_does_not_break_the_server(charset: str) -> None:
    status, _, _ = answer("/api/echo?a=b", content_type=f"application/json; charset={charset}")
    assert status == 200


def test_what_goes_wrong_is_told_in_json() -> None:
    status, _, body = answer("/api/nothing")
    assert (status, json.loads(body)["ok"]) == (404, False)


def test_a_body_that_is_too_long_is_not_read(settings: Any) -> None:
    status, _, body = answer(
        "/api/echo", "POST", content_length=str(settings.DATA_UPLOAD_MAX_MEMORY_SIZE + 1)
    )
    assert status == 400  # of a plain view; the API says 413
    assert json.loads(body)["ok"] is False


def test_nor_is_one_whose_length_begins_with_zeros(settings: Any) -> None:
    length = f"{settings.DATA_UPLOAD_MAX_MEMORY_SIZE + 1}"
    scope = {"headers": [(b"content-length", b"0" * 12 + length.encode())]}

    async def receive() -> Any:
        raise AssertionError

    async def scene() -> None:
        assert await bridge._read_body(scope, receive, HeldBytes(), UNKNOWN) == (b"", 0)

    go(scene())


def test_a_long_response_is_sent_in_pieces() -> None:
    assert answer("/api/long")[2] == b"x" * 2_000_000


def test_a_response_that_breaks_is_not_ended_as_if_it_were_whole() -> None:
    with pytest.raises(RuntimeError, match="half way"):
        answer("/api/broken")


def test_a_client_that_leaves_within_its_body_costs_no_thread() -> None:
    sent: list[Any] = []

    async def scene() -> None:
        messages = iter(
            [
                {"type": "http.request", "body": b"half", "more_body": True},
                {"type": "http.disconnect"},
            ]
        )

        async def receive() -> Any:
            return next(messages)

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/api/echo",
            "query_string": b"",
            "http_version": "1.1",
            "headers": [(b"content-length", b"10")],
        }
        await asgi.application(scope, receive, send)

    go(scene())
    assert sent == []


def test_no_more_requests_at_once_than_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once, most = 0, 0
    begin: Callable[..., bytes] = WSGIResponse.start

    def counted(self: WSGIResponse, environ: dict[str, Any]) -> bytes:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        time.sleep(0.01)
        try:
            return begin(self, environ)
        finally:
            at_once -= 1

    monkeypatch.setattr(WSGIResponse, "start", counted)

    async def one() -> None:
        async with request("/api/echo") as response:
            assert response.status == 200

    async def scene() -> None:
        several: list[Coroutine[Any, Any, None]] = [one() for _ in range(40)]
        await asyncio.gather(*several)

    go(scene())
    assert 1 < most <= server.THREADS
