"""Bodies in chunks (`Transfer-Encoding: chunked`): read, bounded, and never taken for another request.
Raw sockets, and the real server."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from agents.models import Run
from config.server import protocol
from tests.chat.asgi_client import go
from tests.chat.serving import serving

pytestmark = pytest.mark.django_db(transaction=True)
HEAD = "POST {} HTTP/1.1\r\nHost: localhost\r\n{}\r\n"
MESSAGES = "/api/chat/messages"
CHUNKED = "Transfer-Encoding: chunked\r\n"
END = b"0\r\n\r\n"


def head(path: str = MESSAGES, fields: str = CHUNKED) -> bytes:
    return HEAD.format(path, fields).encode()


def chunks(body: bytes, size: int, extension: str = "") -> bytes:
    pieces = (body[start : start + size] for start in range(0, len(body), size))
    return b"".join(f"{len(p):x}{extension}\r\n".encode() + p + b"\r\n" for p in pieces)


def message(content: str = "Hello") -> bytes:
    return json.dumps({"content": content}).encode()


@pytest.fixture(autouse=True)
def _settings(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings.CHAT_ALLOW_ANONYMOUS = True
    settings.LIMIT_USER_MESSAGES_PER_MINUTE = 0
    monkeypatch.setattr(protocol, "CHECK_SECONDS", 0.05)


async def answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], Any]:
    async with asyncio.timeout(60):
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        fields = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
        body = await reader.readexactly(int(fields.get("content-length", 0)))
    return int(lines[0].split()[1]), fields, json.loads(body) if body else None


def exchange(*sent: bytes, answers: int = 1) -> list[tuple[int, dict[str, str], Any]]:
    """Send these bytes, one write each, and return the answers."""
    found = []

    async def play() -> None:
        async with serving() as url:
            port = int(url.rpartition(":")[2])
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            for each in sent:
                writer.write(each)
                await asyncio.sleep(0)
            found.extend([await answer(reader) for _ in range(answers)])
            writer.close()

    go(play())
    return found


@pytest.mark.parametrize("size", [1, 7, 10_000])
@pytest.mark.parametrize("extension", ["", ";a=b", ';a="b;c"'])
def test_a_chunked_message_is_accepted(size: int, extension: str) -> None:
    [(status, _, body)] = exchange(head(), chunks(message("ö" * 50), size, extension) + END)
    assert (status, body["ok"]) == (202, True)
    assert Run.objects.get().message.content == "ö" * 50


@pytest.mark.parametrize(
    "path", ["/api/messages", "/_bot-registration", "/_server-session", "/api/chat/threads/x"]
)
def test_chunked_bodies_are_read_at_every_door(path: str) -> None:
    sent = head(path).replace(b"POST", b"PATCH" if "threads" in path else b"POST")
    [(status, _, body)] = exchange(sent, chunks(b"[1]", 2) + END)
    assert status in (400, 401, 404, 415)
    assert body


def test_the_connection_goes_on_after_a_chunked_body() -> None:
    one = head() + chunks(message("one"), 3) + END
    two = head() + chunks(message("two"), 100) + END
    plain = head(fields=f"Content-Length: {len(message('three'))}\r\n") + message("three")
    found = exchange(one, two + plain, answers=3)
    assert [status for status, *_ in found] == [202, 202, 202]
    assert set(Run.objects.values_list("message__content", flat=True)) == {"one", "two", "three"}


@pytest.mark.parametrize(
    "value", ["Chunked", "CHUNKED", " chunked ", "chunked\r\nContent-Type: application/json"]
)
def test_the_coding_is_read_as_the_rfc_says(value: str) -> None:
    fields = f"Transfer-Encoding: {value}\r\n"
    [(status, *_)] = exchange(head(fields=fields), chunks(message(), 100) + END)
    assert status == 202


def test_a_body_up_to_the_limit_is_read_and_a_longer_one_is_413(settings: Any) -> None:
    settings.DATA_UPLOAD_MAX_MEMORY_SIZE = 100_000
    fits = message("x" * (100_000 - len(message(""))))
    [(status, *_)] = exchange(head(), chunks(fits, 4096) + END)
    assert status == 202
    # Answered before the end, which never comes.
    [(status, _, body)] = exchange(head(), chunks(fits + b" ", 4096))
    assert (status, body["ok"]) == (413, False)
    [(status, *_)] = exchange(head(), b"ffffffff\r\n" + b" " * 100_001)
    assert status == 413


def test_a_document_that_is_too_long_is_413(settings: Any) -> None:
    settings.DATA_UPLOAD_MAX_MEMORY_SIZE = 1000
    fields = CHUNKED + "Content-Type: application/vnd.api+json\r\n"
    [(status, headers, body)] = exchange(head("/api/messages", fields), chunks(b" " * 2000, 99))
    assert status == 413
    assert headers["content-type"] == "application/vnd.api+json"
    assert body["errors"][0]["status"] == "413"


@pytest.mark.parametrize(
    ("fields", "statuses"),
    [
        (CHUNKED + "Content-Length: 5\r\n", {400}),
        ("Content-Length: 5\r\n" + CHUNKED, {400}),
        ("Content-Length: 0\r\n" + CHUNKED, {400}),
        ("Transfer-Encoding: gzip, chunked\r\n", {400, 501}),
        ("Transfer-Encoding: gzip\r\n" + CHUNKED, {400, 501}),
        ("Transfer-Encoding: chunked, gzip\r\n", {400, 501}),
        ("Transfer-Encoding: chunked, chunked\r\n", {400, 501}),
        (CHUNKED + CHUNKED, {400, 501}),
        ("Transfer-Encoding: identity\r\n", {400, 501}),
        ("Transfer-Encoding: xchunked\r\n", {400, 501}),
        ("Transfer-Encoding: \x0bchunked\r\n", {400, 501}),
        ("Transfer-Encoding : chunked\r\n", {400}),
        ("Transfer-Encoding:\r\n", {400, 501}),
    ],
)
def test_a_body_whose_end_is_not_clear_is_refused(fields: str, statuses: set[int]) -> None:
    """The bytes after it are not taken for a request."""
    seen = b""

    async def play() -> None:
        nonlocal seen
        async with serving() as url:
            port = int(url.rpartition(":")[2])
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(
                head(fields=fields) + END + b"GET /api HTTP/1.1\r\nHost: localhost\r\n\r\n"
            )
            async with asyncio.timeout(60):
                seen = await reader.read()
            writer.close()

    go(play())
    assert int(seen.split()[1]) in statuses
    assert seen.count(b"HTTP/1.1 ") == 1
    assert not Run.objects.exists()


def test_http_1_0_has_no_chunks() -> None:
    sent = (head() + chunks(message(), 100) + END).replace(b"HTTP/1.1", b"HTTP/1.0")
    [(status, *_)] = exchange(sent)
    assert status == 400
    assert not Run.objects.exists()


@pytest.mark.parametrize(
    "body", [b"x\r\n", b"-1\r\n", b"5 \r\nhello\r\n", b"3\r\nabcd\r\n", b"1" * 40 + b"\r\n"]
)
def test_broken_chunks_are_400(body: bytes) -> None:
    async def play() -> None:
        async with serving() as url:
            port = int(url.rpartition(":")[2])
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head() + body)
            async with asyncio.timeout(60):
                assert b" 400 " in await reader.readline()
            writer.close()

    go(play())
    assert not Run.objects.exists()


def test_a_trailer_is_not_a_header(settings: Any) -> None:
    settings.CHAT_ALLOW_ANONYMOUS = False
    end = (
        b"0\r\nAuthorization: Bearer x\r\nX-Forwarded-For: 1.2.3.4\r\nExpect: 100-continue\r\n\r\n"
    )
    [(status, _, body), (second, *_)] = exchange(
        head() + chunks(message(), 4) + end, head() + chunks(message(), 4) + END, answers=2
    )
    assert (status, second) == (401, 401)
    assert "Sign in" in body["error"]  # not: the token is not valid


def endless(piece: Callable[[int], bytes]) -> bytes:
    """Return the answer to a body that never ends."""
    seen = b""

    async def play() -> None:
        nonlocal seen
        async with serving() as url:
            port = int(url.rpartition(":")[2])
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head())

            async def pour() -> None:
                number = 0
                while True:
                    writer.write(piece(number))
                    await writer.drain()
                    number += 1

            pouring = asyncio.create_task(pour())
            async with asyncio.timeout(60):
                seen = await reader.readline()
            pouring.cancel()
            await asyncio.wait([pouring])
            writer.close()

    go(play())
    return seen


@pytest.mark.parametrize(
    ("piece", "status"),
    [
        (b"1;" + b"x" * 30_000 + b"\r\nx\r\n", b" 431 "),
        (b"1;" + b"x" * 200 + b"\r\nx\r\n", b" 431 "),
        (b"1" + b";x" * 5000, b" 431 "),
        (b"10000\r\n" + b"x" * 65536 + b"\r\n", b" 413 "),
        (b"1\r\nx\r\n" * 5000, b" 413 "),
    ],
    ids=["long extensions", "short ones", "one extension", "data", "small chunks"],
)
def test_an_endless_body_is_bounded(piece: bytes, status: bytes) -> None:
    assert status in endless(lambda _: piece)


def test_endless_trailers_are_bounded() -> None:
    assert b" 431 " in endless(lambda n: b"0\r\n" if n == 0 else b"X-Y: z\r\n" * 500)


def test_a_slow_chunked_body_is_408(settings: Any) -> None:
    settings.WEB_BODY_SECONDS = 0.4
    [(status, *_)] = exchange(head(), b"5\r\nhel")
    assert status == 408


def test_expect_100_continue() -> None:
    found = []

    async def play() -> None:
        async with serving() as url:
            port = int(url.rpartition(":")[2])
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head(fields=CHUNKED + "Expect: 100-continue\r\n"))
            async with asyncio.timeout(60):
                assert b" 100 " in await reader.readuntil(b"\r\n\r\n")
            writer.write(chunks(message(), 4) + END)
            found.append(await answer(reader))
            writer.close()

    go(play())
    assert found[0][0] == 202
