"""Each open stream takes memory: there is an end to how many are open, in all and of one caller."""

import asyncio
import contextlib
import gc
import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from redis import Redis

from agents.models import Run
from chat.api import streams
from lib.limiter import Limiter
from realm import tokens
from tests.chat.asgi_client import go, request
from tests.factories import ask, user

pytestmark = pytest.mark.django_db(transaction=True)


def bearer(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {tokens.issue(user(name).matrix_user_id)}"}


@pytest.fixture(autouse=True)
def _no_open_streams(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Of other tests somebody may hold a response still.
    monkeypatch.setattr(streams, "open_streams", Limiter())
    yield
    gc.collect()
    assert not streams.open_streams.taken


def test_limit_per_user(settings: Any) -> None:
    settings.CHAT_MAX_STREAMS_PER_USER = 2
    settings.CHAT_ALLOW_ANONYMOUS = True
    run = ask()
    of_run, of_thread = (
        f"/api/chat/runs/{run.pk}/events",
        f"/api/chat/threads/{run.thread_id}/events",
    )
    alice, bob = bearer("alice"), bearer("bob")
    before = Run.objects.count()

    async def scene() -> None:
        async with (
            request(of_run, **alice) as first,
            request(of_thread, **alice) as second,
            request(of_thread, **alice) as third,
        ):
            await first.event()
            await second.event()
            refused = await third.end()
            data = json.loads(refused.body)
            assert (refused.status, refused.headers["retry-after"]) == (429, "5")
            assert (data["ok"], data["code"]) == (False, "too_many_streams")
            assert "CHAT_MAX_STREAMS_PER_USER" not in data["error"]
            assert "Close one, or poll the run." in data["error"]
            accept = {"accept": "text/event-stream", **alice}
            async with request("/api/chat/messages", "POST", {"content": "Hi"}, **accept) as asked:
                assert asked.status == 429
            for others in (bob, {}):
                async with request(of_run, **others) as other:
                    await other.event()
                    assert other.status == 200
        await until(lambda: not streams.open_streams.taken)
        async with request(of_run, **alice) as again:
            await again.event()
            assert again.status == 200

    go(scene())
    assert Run.objects.count() == before


def test_limit_per_network_of_anonymous_callers(settings: Any) -> None:
    settings.CHAT_MAX_STREAMS_PER_USER = 1
    settings.TRUSTED_PROXIES = 1
    path = f"/api/chat/runs/{ask().pk}/events"

    async def status(address: str) -> int:
        async with request(path, x_forwarded_for=address) as found:
            return found.status

    async def scene() -> None:
        async with request(path, x_forwarded_for="2001:db8::1") as first:
            await first.event()
            # One has a whole /64 of them.
            assert await status("2001:db8::2") == 429
            assert await status("2001:db8:1::1") == 200
            assert await status("192.0.2.1") == 200

    go(scene())


def test_limit_holds_for_concurrent_requests(settings: Any) -> None:
    settings.CHAT_MAX_STREAMS_PER_USER = 5
    path = f"/api/chat/runs/{ask().pk}/events"

    async def scene() -> None:
        async with contextlib.AsyncExitStack() as crowd:
            opening = [crowd.enter_async_context(request(path)) for _ in range(30)]
            found = await asyncio.gather(*opening)
            assert Counter(each.status for each in found) == {200: 5, 429: 25}

    go(scene())


def test_zero_is_no_limit(settings: Any) -> None:
    settings.CHAT_MAX_STREAMS_PER_USER = 0
    seated = [streams.StreamSlot("user:1") for _ in range(200)]
    assert streams.open_streams.taken["user:1"] == len(seated)


def test_unread_stream_releases_its_slot() -> None:
    """HEAD, and a client that has left before the first frame."""
    run = ask()

    async def scene() -> None:
        async with request(f"/api/chat/runs/{run.pk}/events", "HEAD") as head:
            await head.end()

    go(scene())
    gc.collect()
    assert not streams.open_streams.taken


def test_rejected_stream_submits_nothing(settings: Any) -> None:
    settings.CHAT_MAX_STREAMS = 1
    run = ask()
    before = Run.objects.count()

    async def scene() -> None:
        async with request(f"/api/chat/runs/{run.pk}/events") as first:
            await first.event()
            for path in (f"runs/{run.pk}/events", f"threads/{run.thread_id}/events"):
                async with request(f"/api/chat/{path}") as second:
                    await second.begun()
                    assert (second.status, second.headers["retry-after"]) == (503, "5")
            question = {"content": "Hello"}
            accept = {"accept": "text/event-stream"}
            async with request("/api/chat/messages", "POST", question, **accept) as asked:
                await asked.begun()
                assert asked.status == 503
        await until(lambda: not streams.open_streams.taken)
        async with request(f"/api/chat/runs/{run.pk}/events") as again:
            await again.event()
            assert again.status == 200

    go(scene())
    assert Run.objects.count() == before


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)
