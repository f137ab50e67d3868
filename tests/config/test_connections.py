"""Clients that leave, stall, flood or hold on: what they cost the others. Raw sockets, and the real
server."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import pytest
import structlog
from django.contrib import admin
from django.http import HttpRequest, HttpResponse, JsonResponse, StreamingHttpResponse
from django.urls import path
from django.views.decorators.csrf import csrf_exempt
from structlog.testing import capture_logs

from config.server import bridge, pool, protocol, refusals
from config.server import threads as server
from config.server.callers import ClientKey, HeldBytes, client_key
from config.server.pool import ClientLeft, Pool, QueueFull
from lib import ratelimitedlog
from tests.chat.asgi_client import go
from tests.chat.serving import serving

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.urls(__name__)]

BIG = 6_000_000


class Scene:
    """What views of this module have begun, and whether they may go on."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.may_end = threading.Event()
        self.streams = 0


scene_now = Scene()


@csrf_exempt
def hold(request: HttpRequest) -> HttpResponse:
    scene = scene_now
    scene.begun.append(request.path)
    assert scene.may_end.wait(60)
    return JsonResponse({"ok": True})


@csrf_exempt
def quick(request: HttpRequest) -> HttpResponse:
    scene_now.begun.append(request.path)
    return JsonResponse({"ok": True})


def big(request: HttpRequest) -> HttpResponse:
    scene_now.begun.append(request.path)
    return HttpResponse(b"x" * BIG)


def big_later(request: HttpRequest) -> HttpResponse:
    hold(request)
    return HttpResponse(b"x" * BIG)


def pieces(request: HttpRequest) -> StreamingHttpResponse:
    def all_of_it() -> Iterator[bytes]:
        for _ in range(100):
            scene_now.begun.append("piece")
            yield b"x" * 300_000

    return StreamingHttpResponse(all_of_it())


def events(request: HttpRequest) -> StreamingHttpResponse:
    async def frames() -> AsyncIterator[bytes]:
        scene_now.streams += 1
        try:
            while True:
                yield b": \n\n"
                await asyncio.sleep(0.05)
        finally:
            scene_now.streams -= 1

    return StreamingHttpResponse(frames(), content_type="text/event-stream")


urlpatterns = [
    path("api/hold", hold),
    path("api/threads/hold", hold),
    path("login", hold),
    path("api/quick", quick),
    path("api/big", big),
    path("api/big-later", big_later),
    path("api/pieces", pieces),
    path("api/events", events),
    path("admin/", admin.site.urls),  # whose paths a middleware asks for
]


@pytest.fixture(autouse=True)
def scene(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    global scene_now
    scene_now = Scene()
    monkeypatch.setattr(protocol, "CHECK_SECONDS", 0.05)
    yield scene_now
    scene_now.may_end.set()


class Wire:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def ask(self, path: str, *headers: str, method: str = "GET", body: str = "") -> None:
        lines = [f"{method} {path} HTTP/1.1", "Host: localhost", *headers]
        lines += [f"Content-Length: {len(body)}"] if body else []
        self.writer.write("\r\n".join([*lines, "", body]).encode())

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        async with asyncio.timeout(60):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
            body = await self.reader.readexactly(int(headers.get("content-length", 0)))
        return int(head[0].split()[1]), headers, body

    async def rest(self) -> bytes:
        """Until the server closes."""
        async with asyncio.timeout(60):
            with suppress(ConnectionError):
                return await self.reader.read()
        return b""

    def leave(self) -> None:
        self.writer.transport.abort()


@asynccontextmanager
async def connecting() -> AsyncIterator[Callable[[], Any]]:
    async with serving() as url, AsyncExitStack() as opened:
        port = int(url.rpartition(":")[2])

        async def connect(**options: Any) -> Wire:
            wire = Wire(*await asyncio.open_connection("127.0.0.1", port, **options))
            opened.callback(wire.leave)
            return wire

        opened.callback(lambda: scene_now.may_end.set())
        yield connect


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


def number_left() -> int:
    """How many of those that wait have left."""
    lines = server.threads().web._lines.values()
    return sum(job.has_left() for line in lines for jobs in line.values() for job in jobs)


async def held_threads(connect: Any, count: int, path: str = "/api/hold") -> list[Wire]:
    wires = [await connect() for _ in range(count)]
    for wire in wires:
        wire.ask(path)
    await until(lambda: len(scene_now.begun) == server.THREADS)
    await until(lambda: server.threads().web.length == count - server.THREADS)
    return wires


class TestWaiting:
    def test_what_nobody_waits_for_is_never_begun(self, scene: Scene) -> None:
        async def play() -> None:
            async with connecting() as connect:
                wires = await held_threads(connect, server.THREADS + 20)
                post = await connect()
                post.ask("/api/hold", method="POST", body='{"content": "Hello"}')
                await until(lambda: server.threads().web.length == 21)
                stays = await connect()
                stays.ask("/api/quick")
                for wire in [*wires, post]:
                    wire.leave()
                await until(lambda: number_left() == 21)
                scene.may_end.set()
                assert (await stays.answer())[0] == 200
                assert server.threads().web.length == 0
                assert len(scene.begun) == server.THREADS + 1

        go(play())

    def test_one_that_left_within_a_pipeline_is_not_begun_either(self, scene: Scene) -> None:
        async def play() -> None:
            async with connecting() as connect:
                await held_threads(connect, server.THREADS)
                wire = await connect()
                wire.ask("/api/hold")
                wire.ask("/api/hold", method="POST", body="x" * 200_000)
                await until(lambda: server.threads().web.length == 1)
                wire.leave()
                await until(lambda: number_left() == 1)
                scene.may_end.set()
                await until(lambda: server.threads().web.length == 0)
                assert len(scene.begun) == server.THREADS

        go(play())

    def test_an_answer_that_nobody_takes_is_not_made_to_its_end(self, scene: Scene) -> None:
        async def play() -> None:
            async with connecting() as connect:
                wire = await connect()
                wire.ask("/api/pieces")
                await wire.reader.readuntil(b"\r\n\r\n")
                wire.leave()
                quiet = await connect()
                quiet.ask("/api/quick")
                await quiet.answer()
                await until(lambda: not server.threads().answers.total)
                assert scene.begun.count("piece") < 60

        go(play())

    def test_another_caller_is_begun_at_once(self, scene: Scene) -> None:
        async def play() -> None:
            async with connecting() as connect:
                await held_threads(connect, server.THREADS + 20)
                for header in ("Cookie: sessionid=another", "Authorization: Bearer another"):
                    other = await connect()
                    other.ask("/api/quick", header)
                    assert (await other.answer())[0] == 200
                assert scene.begun.count("/api/hold") == server.THREADS

        go(play())

    def test_probes_wait_for_nobody(self) -> None:
        async def play() -> None:
            async with connecting() as connect:
                await held_threads(connect, server.THREADS + 20)
                for probe in ("/healthz", "/readyz", "/metrics"):
                    wire = await connect()
                    wire.ask(probe)
                    assert (await wire.answer())[0] in (200, 503)  # without a Redis

        go(play())

    def test_passwords_keep_no_page_waiting(self, scene: Scene) -> None:
        async def play() -> None:
            async with connecting() as connect:
                for _ in range(20):
                    wire = await connect()
                    wire.ask("/login", method="POST", body="username=a&password=b")
                await until(lambda: len(scene.begun) == server.LOGIN_THREADS)
                for asked in ("/healthz", "/api/quick"):
                    wire = await connect()
                    wire.ask(asked)
                    assert (await wire.answer())[0] == 200
                assert scene.begun.count("/login") == server.LOGIN_THREADS

        go(play())

    def test_a_full_queue_refuses_whoever_has_the_most(self, settings: Any) -> None:
        settings.WEB_MAX_WAITING = 4

        async def play() -> None:
            async with connecting() as connect:
                wires = await held_threads(connect, server.THREADS + 4)
                more = await connect()
                more.ask("/api/hold")
                status, headers, body = await more.answer()
                assert (status, headers["retry-after"]) == (503, "2")
                output = json.loads(body)
                assert (output["ok"], output["code"]) == (False, "too_busy")

                document = await connect()
                document.ask("/api/threads/hold")
                status, headers, body = await document.answer()
                assert headers["content-type"] == "application/vnd.api+json"
                assert json.loads(body)["errors"][0]["status"] == "503"

                # Of another caller one is taken all the same, in the place of the newest of the first.
                taken = [await connect() for _ in range(2)]
                for wire in taken:
                    wire.ask("/api/hold", "Cookie: sessionid=another")
                assert (await wires[-1].answer())[0] == 503
                scene_now.may_end.set()
                for wire in [*wires[:-1], *taken]:
                    assert (await wire.answer())[0] == 200

        go(play())


class TestTurns:
    def order(self, callers: list[ClientKey]) -> list[ClientKey]:
        """In which jobs that came in this order are begun, in one thread."""
        begun: list[ClientKey] = []
        may_begin = threading.Event()

        async def play() -> None:
            threads = Pool("test", 1)
            first = threads.submit(ClientKey("first"), may_begin.wait)
            jobs = [
                threads.submit(each, lambda each=each: begun.append(each))  # type: ignore[misc]
                for each in callers
            ]
            may_begin.set()
            await asyncio.gather(first, *jobs)

        asyncio.run(play())
        return begun

    def test_addresses_take_turns_and_so_do_the_callers_of_one(self) -> None:
        a1, a2, b = ClientKey("a", b"1"), ClientKey("a", b"2"), ClientKey("b", b"")
        assert self.order([a1, a1, a1, a1, a2, b, b]) == [a1, b, a1, b, a2, a1, a1] or self.order(
            [a1, a1, a1, a1, a2, b, b]
        ) == [a1, b, a2, b, a1, a1, a1]

    def test_what_goes_wrong_is_told_to_the_caller_and_ends_no_thread(self) -> None:
        def broken() -> None:
            raise LookupError

        async def play() -> None:
            threads = Pool("test", 1)
            for _ in range(3):
                with pytest.raises(LookupError):
                    await threads.submit(ClientKey("a"), broken)
            assert await threads.submit(ClientKey("a"), lambda: 1) == 1

        asyncio.run(play())

    def test_those_who_left_make_room_in_a_full_queue(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pool, "SEARCH_SECONDS", 0)
        may_begin = threading.Event()

        async def play() -> None:
            threads = Pool("test", 1, waiting=3)
            begun = threads.submit(ClientKey("a"), may_begin.wait)
            await until(lambda: threads.length == 0)
            left = [threads.submit(ClientKey("a"), may_begin.wait, lambda: True) for _ in range(3)]
            stays = threads.submit(ClientKey("a"), lambda: "stays")
            may_begin.set()
            assert await stays == "stays"
            for job in left:
                with pytest.raises(ClientLeft):
                    await job
            assert await begun

        asyncio.run(play())

    def test_no_number_of_jobs_takes_more_than_its_places(self) -> None:
        may_begin = threading.Event()
        at_once: set[int] = set()
        most: list[int] = []

        def work() -> None:
            at_once.add(threading.get_ident())
            most.append(len(at_once))
            may_begin.wait(60)
            at_once.discard(threading.get_ident())

        async def play() -> None:
            threads = Pool("test", 3, spare=2, waiting=100)
            jobs = [threads.submit(ClientKey("a"), work) for _ in range(150)]
            may_begin.set()
            results = await asyncio.gather(*jobs, return_exceptions=True)
            refused = [result for result in results if isinstance(result, QueueFull)]
            assert 47 <= len(refused) <= 50

        asyncio.run(play())
        assert max(most) <= 3


class TestWhoAsks:
    def test_the_address_that_a_proxy_tells(self, settings: Any) -> None:
        headers = [
            (b"x-forwarded-for", b"198.51.100.1, 203.0.113.9"),
            (b"cookie", b"a=b; sessionid=s"),
        ]
        assert client_key(("127.0.0.1", 1), headers) == ClientKey("127.0.0.1", b"s")
        settings.TRUSTED_PROXIES = 1
        assert client_key(("127.0.0.1", 1), headers) == ClientKey("203.0.113.9", b"s")

    def test_with_ipv6_one_has_a_whole_network(self) -> None:
        assert client_key(("2001:db8::1", 1), ()) == client_key(("2001:db8::2", 1), ())
        assert client_key(None, ()) == ClientKey("unknown")

    def test_shares_of_what_is_held(self, settings: Any) -> None:
        settings.WEB_MAX_HELD_BYTES = 80
        held, one, other, away = (
            HeldBytes(),
            ClientKey("a", b"1"),
            ClientKey("a", b"2"),
            ClientKey("b"),
        )
        held.add(one, 10)
        assert held.is_full_for(one)
        assert not held.is_full_for(other)
        held.add(other, 35)
        assert held.is_full_for(ClientKey("a", b"3"))
        assert not held.is_full_for(away)
        held.add(away, 35)
        assert held.is_full_for(ClientKey("c"))
        for caller, size in ((one, 10), (other, 35), (away, 35)):
            held.add(caller, -size)
        assert (held.total, dict(held._of_client)) == (0, {})

    def test_addresses_that_have_something_leave_room_for_others(self, settings: Any) -> None:
        settings.WEB_MAX_HELD_BYTES = 1000
        held = HeldBytes()
        many = [ClientKey(f"a{number}", b"") for number in range(10)]
        for _ in range(100):
            for caller in many:
                if not held.is_full_for(caller):
                    held.add(caller, 10)
        assert held.total == 750
        assert not held.is_full_for(ClientKey("b"))


async def drip(wire: Wire, drop: bytes) -> None:
    """Send on until the server has had enough."""
    with suppress(ConnectionError):
        async with asyncio.timeout(60):
            while True:
                wire.writer.write(drop)
                await wire.writer.drain()
                await asyncio.sleep(0.05)


class TestTime:
    @pytest.mark.parametrize(
        ("beginning", "status"),
        [
            (b"", b""),
            (b"\r\n\r\n", b""),
            (b"GET /api/quick HTTP/1.1\r\nHost: local", b"408"),
            (b"POST /api/hold HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{", b"408"),
        ],
        ids=["silent", "empty lines", "half a head", "half a body"],
    )
    def test_who_does_not_go_on_is_not_waited_for(
        self, settings: Any, scene: Scene, beginning: bytes, status: bytes
    ) -> None:
        settings.WEB_HEAD_SECONDS = settings.WEB_BODY_SECONDS = 0.3

        async def play() -> None:
            async with connecting() as connect:
                wire = await connect()
                wire.writer.write(beginning)
                assert status in (await wire.rest()).partition(b"\r\n")[0]

        go(play())
        assert not scene.begun

    def test_drip_by_drip_is_no_longer(self, settings: Any) -> None:
        settings.WEB_HEAD_SECONDS = 0.5

        async def play() -> None:
            async with connecting() as connect:
                wire = await connect()
                wire.writer.write(b"GET /api/quick HTTP/1.1\r\n")
                dripping = asyncio.create_task(drip(wire, b"X: y\r\n"))
                assert b" 408 " in await wire.rest()
                await dripping

        go(play())

    def test_nor_is_the_second_head_of_a_connection(self, settings: Any) -> None:
        settings.WEB_HEAD_SECONDS = 0.3

        async def play() -> None:
            async with connecting() as connect:
                wire = await connect()
                wire.ask("/api/quick")
                assert (await wire.answer())[0] == 200
                wire.writer.write(b"GET /api/qu")
                assert b" 408 " in await wire.rest()

        go(play())

    def test_a_body_that_never_ends_is_not_read_for_ever(self, settings: Any) -> None:
        settings.WEB_BODY_SECONDS = 0.5

        async def play() -> None:
            async with connecting() as connect:
                wire = await connect()
                wire.ask("/api/quick", "Transfer-Encoding: chunked", method="POST")
                dripping = asyncio.create_task(drip(wire, b"1\r\nx\r\n"))
                assert (await wire.rest()).startswith(b"HTTP/1.1 408")
                await dripping

        go(play())

    @pytest.mark.parametrize("path", ["/api/big", "/api/pieces"])
    def test_who_does_not_read_is_not_waited_for(self, settings: Any, path: str) -> None:
        settings.WEB_SEND_SECONDS = 0.3

        async def play() -> None:
            async with connecting() as connect:
                wires = [await connect(limit=1024) for _ in range(3)]
                for wire in wires:
                    wire.writer.transport.pause_reading()
                    wire.ask(path)
                await until(lambda: server.threads().answers.total)
                await until(lambda: not server.threads().answers.total)

        go(play())

    def test_who_reads_slowly_is_waited_for(self, settings: Any) -> None:
        settings.WEB_SEND_SECONDS = 1

        async def play() -> None:
            async with connecting() as connect:
                wire = await connect(limit=64 * 1024)
                wire.ask("/api/big")
                await wire.reader.readuntil(b"\r\n\r\n")
                read = 0
                while read < BIG:
                    read += len(await wire.reader.read(128 * 1024))
                    await asyncio.sleep(0.02)
                assert read == BIG

        go(play())


class TestMemory:
    def test_answers_that_are_made_side_by_side_have_one_share(
        self, settings: Any, scene: Scene
    ) -> None:
        settings.WEB_MAX_HELD_BYTES = 24 * BIG  # 3 of one caller

        async def play() -> None:
            async with connecting() as connect:
                wires: list[Any] = await held_threads(connect, server.THREADS, "/api/big-later")
                for wire in wires:
                    wire.writer.transport.pause_reading()
                scene.may_end.set()
                answers = server.threads().answers
                await until(lambda: server.threads().web._busy == 0)
                assert answers.total == 3 * BIG
                for wire in wires:
                    wire.writer.transport.resume_reading()
                heads = [await wire.reader.readline() for wire in wires]
                assert sum(b" 200 " in head for head in heads) == 3
                assert sum(b" 503 " in head for head in heads) == server.THREADS - 3

        go(play())

    def test_who_leaves_answers_unread_gets_no_more_of_them(self, settings: Any) -> None:
        settings.WEB_MAX_HELD_BYTES = 24 * BIG  # 3 of one caller, 12 where one has none

        async def play() -> None:
            async with connecting() as connect:
                for _ in range(server.THREADS):
                    wire = await connect(limit=1024)
                    wire.writer.transport.pause_reading()
                    wire.ask("/api/big")
                await until(lambda: server.threads().answers.total >= 3 * BIG)
                refused = await connect()
                refused.ask("/api/quick")
                assert (await refused.answer())[0] == 503
                other = await connect()
                other.ask("/api/quick", "Authorization: Bearer another")
                assert (await other.answer())[0] == 200

        go(play())

    def test_bodies_that_are_on_their_way_are_counted(self, settings: Any, scene: Scene) -> None:
        settings.WEB_MAX_HELD_BYTES = 1024 * 1024

        async def play() -> None:
            async with connecting() as connect:
                wire = await connect()
                wire.writer.write(
                    b"POST /api/hold HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900000\r\n\r\n"
                    + b"x" * 800_000
                )
                assert (await wire.answer())[0] == 503
                assert not server.threads().answers.total

        go(play())
        assert not scene.begun

    def test_a_stream_ends_with_its_client_whatever_follows_it(self, scene: Scene) -> None:
        async def play() -> None:
            async with connecting() as connect:
                wire = await connect()
                wire.ask("/api/events")
                wire.ask("/api/quick")
                await wire.reader.readuntil(b": \n\n")
                assert scene.streams == 1
                wire.leave()
                await until(lambda: not scene.streams)

        go(play())

    def test_requests_beyond_the_answers_have_an_end(self) -> None:
        async def play() -> None:
            async with connecting() as connect:
                wire = await connect()
                for _ in range(protocol.MAX_PIPELINED + 5):
                    wire.ask("/api/hold")
                await wire.rest()

        go(play())

    def test_headers_have_an_end(self) -> None:
        async def play() -> None:
            async with connecting() as connect:
                wire = await connect()
                wire.ask("/api/quick", *["a: b"] * (bridge.MAX_HEADERS + 1))
                assert (await wire.answer())[0] == 431

        go(play())

    def test_there_is_no_other_protocol_to_go_over_to(self) -> None:
        async def play() -> None:
            async with connecting() as connect:
                wire = await connect()
                wire.ask("/api/quick", "Connection: Upgrade", "Upgrade: websocket")
                wire.writer.write(b"x" * 1000)
                output = await wire.rest()
                assert output.startswith(b"HTTP/1.1 200")
                assert output.count(b"HTTP/1.1") == 1

        go(play())


class TestPlaces:
    def test_beyond_them_503_and_one_line(
        self, settings: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        settings.WEB_MAX_CONNECTIONS = 3
        monkeypatch.setattr(
            refusals,
            "log_warning",
            ratelimitedlog.RateLimitedLog(structlog.get_logger("test").warning),
        )

        async def play() -> None:
            async with connecting() as connect:
                first = [await connect() for _ in range(3)]
                for wire in first:
                    wire.ask("/api/quick")
                    assert (await wire.answer())[0] == 200
                for _ in range(5):
                    more = await connect()
                    more.ask("/api/quick")
                    status, headers, _ = await more.answer()
                    assert (status, headers["retry-after"]) == (503, "2")
                first.pop().leave()

                async def is_taken() -> bool:
                    again = await connect()
                    again.ask("/api/quick")
                    return bool((await again.answer())[0] == 200)

                async with asyncio.timeout(60):
                    while not await is_taken():
                        await asyncio.sleep(0.05)

        with capture_logs() as lines:
            go(play())
        refused = [line for line in lines if line.get("reason") == "too_many_connections"]
        assert len(refused) == 1

    def test_an_address_has_its_own_but_a_proxy_beside_the_server_has_all(
        self, settings: Any
    ) -> None:
        settings.WEB_MAX_CONNECTIONS_PER_ADDRESS = 2
        watch = protocol._Monitor(asyncio.new_event_loop())
        watch.of_network.update({"203.0.113.9": 2, "127.0.0.1": 2, "2001:db8::/64": 2})
        assert watch.refusal("203.0.113.9") == "too_many_connections_of_address"
        assert watch.refusal("2001:db8::/64") == "too_many_connections_of_address"
        assert watch.refusal("127.0.0.1") == watch.refusal("203.0.113.10") == ""
        settings.TRUSTED_PROXIES = 1
        assert watch.refusal("203.0.113.9") == ""
        watch.loop.close()
