"""Requests with `Prefer: wait`, on the real server and over real sockets."""

import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from typing import Any

import pytest
from django.db import connections
from redis import Redis

from agents.events import subscriber
from agents.models import Run
from agents.runs import actions, execution
from chat.api import streams, waiting
from chat.api.waiting import open_waits
from config.server import threads as server
from tests.chat.asgi_client import go
from tests.chat.serving import serving

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def _settings(settings: Any) -> None:
    settings.CHAT_ALLOW_ANONYMOUS = True
    settings.CHAT_MAX_WAIT_SECONDS = 60
    for name in ("MESSAGES_PER_MINUTE", "RUNS_UNFINISHED", "BYTES_PER_DAY"):
        setattr(settings, f"LIMIT_USER_{name}", 0)


Answer = tuple[int, dict[str, str], dict[str, Any]]


class Server:
    def __init__(self, url: str) -> None:
        self.port = int(url.rpartition(":")[2])

    async def connect(self, content: str, wait: str, *fields: str) -> Any:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        body = json.dumps({"content": content})
        lines = [
            "POST /api/chat/messages HTTP/1.1",
            "Host: localhost",
            f"Prefer: {wait}",
            f"Content-Length: {len(body)}",
            *fields,
        ]
        writer.write("\r\n".join([*lines, "", body]).encode())
        return reader, writer

    async def ask(self, content: str = "Hello", wait: str = "wait=30", *fields: str) -> Answer:
        reader, writer = await self.connect(content, wait, *fields)
        async with asyncio.timeout(90):
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            answered = dict(line.lower().split(": ", 1) for line in head[1:] if line)
            body = await reader.readexactly(int(answered["content-length"]))
        writer.close()
        return int(head[0].split()[1]), answered, json.loads(body)


def play(scene: Callable[[Server], Awaitable[None]]) -> None:
    async def all_of_it() -> None:
        async with serving() as url:
            try:
                await scene(Server(url))
            finally:
                await asyncio.to_thread(connections.close_all)
                await streams.current_subscriber().close()

    go(all_of_it())


def in_thread(work: Callable[[], Any]) -> Awaitable[Any]:
    def run() -> Any:
        try:
            return work()
        finally:
            connections.close_all()

    return asyncio.to_thread(run)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


def execute_all() -> None:
    for pk in Run.objects.unfinished().values_list("pk", flat=True):
        execution.execute(pk)


@pytest.mark.parametrize("count", [1, 10, 200])
def test_all_clients_wait_at_once(redis: Redis, count: int) -> None:
    """And no thread does."""

    async def scene(server_: Server) -> None:
        asking = [asyncio.create_task(server_.ask(f"q{n}")) for n in range(count)]
        await until(lambda: open_waits.taken.total() == count)
        await until(lambda: not server.threads().web._busy)
        assert not any(each.done() for each in asking)
        await in_thread(execute_all)
        for status, fields, body in await asyncio.gather(*asking):
            assert (status, body["status"]) == (200, "completed")
            assert body["run"]["output"]
            assert fields["preference-applied"] == "wait=30"
            assert fields["content-type"] == "application/json"
            assert fields["location"] == f"/api/chat/runs/{body['runId']}".lower()
        await until(lambda: not open_waits.taken)

    play(scene)


def test_many_waits_none_of_which_ends_early(redis: Redis) -> None:
    """Runs finish while their requests are about to wait, in all orders."""
    at_once = 50
    rounds = int(os.environ.get("TEST_WAITS", "400")) // at_once

    async def scene(server_: Server) -> None:
        done = False

        async def worker() -> None:
            while not done:
                await in_thread(execute_all)

        working = asyncio.create_task(worker())
        for number in range(rounds):
            asked = time.monotonic()
            answers = await asyncio.gather(*(server_.ask(f"{number}-{n}") for n in range(at_once)))
            assert {status for status, *_ in answers} == {200}, number
            assert time.monotonic() - asked < 30
        done = True
        await working

    play(scene)


def test_an_outcome_that_redis_does_not_deliver_is_found(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subscriber.Subscriber, "_deliver", lambda self, message: None)

    async def scene(server_: Server) -> None:
        asking = asyncio.create_task(server_.ask())
        await until(lambda: bool(open_waits.taken))
        await in_thread(execute_all)
        began = time.monotonic()
        assert (await asking)[0] == 200
        assert time.monotonic() - began < 20

    play(scene)


def test_without_redis_a_request_waits_too() -> None:
    async def scene(server_: Server) -> None:
        asking = asyncio.create_task(server_.ask())
        await until(lambda: bool(open_waits.taken))
        await in_thread(execute_all)
        assert (await asking)[0] == 200

    play(scene)


def test_a_run_that_takes_longer_is_202(redis: Redis) -> None:
    async def scene(server_: Server) -> None:
        status, fields, body = await server_.ask(wait="wait=1")
        assert (status, body["status"]) == (202, "accepted")
        assert "preference-applied" not in fields
        assert not open_waits.taken

    play(scene)


def test_nobody_waits_for_longer_than_is_allowed(redis: Redis, settings: Any) -> None:
    async def scene(server_: Server) -> None:
        settings.CHAT_MAX_WAIT_SECONDS = 1
        began = time.monotonic()
        assert (await server_.ask(wait="wait=" + "9" * 300))[0] == 202
        assert 1 <= time.monotonic() - began < 30
        settings.CHAT_MAX_WAIT_SECONDS = 0
        assert (await server_.ask(wait="wait=60"))[0] == 202

    play(scene)


def test_an_outcome_of_the_last_moment_is_sent(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither Redis nor a lookup has seen it."""
    monkeypatch.setattr(subscriber.Subscriber, "_deliver", lambda self, message: None)
    monkeypatch.setattr(waiting._Lookups, "watch", lambda *_: nullcontext())

    async def scene(server_: Server) -> None:
        asking = asyncio.create_task(server_.ask(wait="wait=2"))
        await until(lambda: bool(open_waits.taken))
        await in_thread(execute_all)
        assert (await asking)[0] == 200

    play(scene)


@pytest.mark.parametrize(("limit", "waits"), [(0, 0), (4, 2), (3, 2)])
def test_beyond_the_bound_the_answer_is_202_at_once(
    redis: Redis, settings: Any, limit: int, waits: int
) -> None:
    settings.CHAT_MAX_WAITS = limit

    async def scene(server_: Server) -> None:
        first = [asyncio.create_task(server_.ask()) for _ in range(waits)]
        await until(lambda: open_waits.taken.total() == waits)
        began = time.monotonic()
        status, fields, body = await server_.ask(wait="wait=50")
        assert (status, body["status"]) == (202, "accepted")
        assert fields["preference-applied"] == "wait=0"
        assert fields["location"]
        assert time.monotonic() - began < 20
        await in_thread(execute_all)
        assert [status for status, *_ in await asyncio.gather(*first)] == [200] * waits

    play(scene)


def test_a_client_that_leaves_frees_its_place(redis: Redis) -> None:
    async def scene(server_: Server) -> None:
        connected = [await server_.connect(f"q{n}", "wait=50") for n in range(20)]
        await until(lambda: open_waits.taken.total() == 20)
        for _, writer in connected:
            writer.transport.abort()
        await until(lambda: not open_waits.taken)
        await until(lambda: not streams.current_subscriber()._ends)

    play(scene)


def test_a_cancelled_run_ends_the_wait(redis: Redis) -> None:
    async def scene(server_: Server) -> None:
        asking = asyncio.create_task(server_.ask())
        await until(lambda: bool(open_waits.taken))
        await in_thread(lambda: actions.cancel(Run.objects.get()))
        status, _, body = await asking
        assert (status, body["status"]) == (200, "cancelled")

    play(scene)


def test_the_connection_goes_on_after_a_wait(redis: Redis) -> None:
    async def scene(server_: Server) -> None:
        reader, writer = await server_.connect("Hello", "wait=30")
        await until(lambda: bool(open_waits.taken))
        await in_thread(execute_all)
        async with asyncio.timeout(30):
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].split()[0])
            await reader.readexactly(length)
            writer.write(b"GET /api HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b" 200 " in await reader.readline()
        writer.close()

    play(scene)


def test_a_repeat_of_a_finished_message_is_200_at_once(redis: Redis) -> None:
    async def scene(server_: Server) -> None:
        key = "Idempotency-Key: k"
        assert (await server_.ask("Hello", "wait=0", key))[0] == 202
        await in_thread(execute_all)
        status, fields, body = await server_.ask("Hello", "wait=30", key)
        assert (status, body["status"]) == (200, "completed")
        assert fields["idempotency-replayed"] == "true"

    play(scene)


def test_a_server_whose_time_to_stop_is_over_answers_202(redis: Redis) -> None:
    async def scene(server_: Server) -> None:
        asking = asyncio.create_task(server_.ask())
        await until(lambda: bool(open_waits.taken) and bool(requests()))
        for request in requests():
            request.cancel()  # as uvicorn does then
        assert (await asking)[0] == 202

    def requests() -> list[asyncio.Task[Any]]:
        tasks = asyncio.all_tasks()
        return [task for task in tasks if task.get_coro().__name__ == "run_asgi"]  # type: ignore[union-attr]

    play(scene)
