"""Server-sent events, through the ASGI application, with a real Redis and a real model endpoint."""

import asyncio
import re
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest
from django.db import connections
from django.utils import timezone
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from agents.events import publisher, stream, subscriber
from agents.models import Attempt, Run, Step
from agents.runs import actions, execution
from agents.worker.bootstep import Loop
from chat.api import stream_access, streams
from chat.api.stream_access import StreamCaller
from chat.models import Message
from realm import tokens
from realm.access import Access
from tests.agents.test_runs import wait_for_words
from tests.chat.asgi_client import Event, go, request
from tests.factories import ask, conversation, user
from tests.fakes.llm import Failure, FakeLLM, Hang, Reply, held

pytestmark = pytest.mark.django_db(transaction=True)

TALK = Reply(("one ", "two ", "three ", "four "), delta_latency=0.1)


@pytest.fixture(autouse=True)
def _worker_hears(redis: Redis) -> Iterator[None]:
    loop = Loop("listener", publisher.current().listen)
    loop.start()
    until = time.monotonic() + 60
    while not dict(redis.pubsub_numsub(publisher.control_channel()))[
        publisher.control_channel().encode()
    ]:
        assert time.monotonic() < until
        time.sleep(0.01)
    yield
    for thread in threading.enumerate():
        if isinstance(thread, Worker):
            thread.join(60)
    loop.stopping.set()
    redis.publish(publisher.control_channel(), b"{}")
    loop.join(60)
    assert not loop.is_alive()


class Worker(threading.Thread):
    """Carries out a run beside the test."""

    def __init__(self, run: Run) -> None:
        super().__init__(daemon=True)
        self.run_id = run.pk

    def run(self) -> None:
        try:
            execution.execute(self.run_id)
        finally:
            connections.close_all()


def text_of(events: list[Event]) -> str:
    return "".join(event.data["text"] for event in events if event.type == "message.delta")


def numbers(events: list[Event], attempt: int = 1) -> list[int]:
    ids = [event.id.split("-") for event in events]
    return [int(number) for a, number in ids if a == str(attempt) and number != "end"]


def test_tokens_are_streamed_while_the_model_generates(model: FakeLLM) -> None:
    may_end = threading.Event()
    model.script(held(TALK, may_end, 5))
    run = ask("Hi")

    async def scene() -> None:
        async with request(f"/api/chat/runs/{run.pk}/events") as response:
            assert response.status == 200
            assert response.headers["content-type"] == "text/event-stream"
            first = await response.event()
            assert (first.id, first.type, first.data["status"]) == ("0-0", "run.status", "queued")
            worker = Worker(run)
            worker.start()
            events = await response.until("message.delta")
            assert worker.is_alive()
            may_end.set()
            events += await response.until("run.completed")
            await response.end()
        worker.join(60)
        assert text_of(events) == "one two three four "
        assert numbers(events) == list(range(1, len(events)))
        assert [e.type for e in events if e.type != "message.delta"] == [
            "run.status",
            "step.started",
            "step.finished",
            "run.completed",
        ]
        assert events[-1].id == "1-end"
        assert events[-1].data["run"]["output"] == "one two three four "

    go(scene())


def test_late_subscriber_gets_everything_streamed_so_far(model: FakeLLM) -> None:
    may_end = threading.Event()
    model.script(held(TALK, may_end, 5))
    run = ask("Hi")
    worker = Worker(run)

    async def scene() -> None:
        worker.start()
        await asyncio.to_thread(wait_for_words, run, "one two ")
        async with request(f"/api/chat/runs/{run.pk}/events") as response:
            first = await response.event()
            may_end.set()
            events = [first] + await response.until("run.completed")
        assert text_of(events) == "one two three four "
        assert numbers(events) == list(range(1, len(events) - 1))

    go(scene())
    worker.join(60)


def test_subscribers_are_notified_of_a_retry_at_once(model: FakeLLM) -> None:
    model.script(Failure(503, retry_after=30), Reply("Better."))
    run = ask("Hi")

    async def scene() -> None:
        async with request(f"/api/chat/runs/{run.pk}/events") as response:
            await response.event()
            Worker(run).start()
            events = await response.until("run.retrying")
            assert events[-1].id == f"1-{len(events)}"
            data = events[-1].data
            assert data["status"] == "queued"
            assert (data["attempt"], data["attempts"], data["maxAttempts"]) == (1, 1, 5)
            assert (data["error"], data["errorCode"]) == (
                "The model is not available.",
                "unavailable",
            )
            wait = datetime.fromisoformat(data["nextAttemptAt"]) - timezone.now()
            assert timedelta(seconds=20) < wait < timedelta(seconds=31)
            await asyncio.to_thread(due_now, run)
            Worker(run).start()
            events = await response.until("run.completed")
        assert (events[0].id, events[0].data["attempt"]) == ("2-1", 2)

    go(scene())


@pytest.mark.parametrize("after", ["", "?after=1-end", "?after=1-2"])
def test_a_stream_that_opens_before_a_retry_gets_it(model: FakeLLM, after: str) -> None:
    """Nothing was published, as the attempt had no subscribers."""
    model.script(Failure(503, retry_after=30), Reply("Better."))
    run = ask("Hi")
    execution.execute(run.pk)

    async def scene() -> None:
        async with request(f"/api/chat/runs/{run.pk}/events{after}") as response:
            retrying = (await response.until("run.retrying"))[-1]
            assert retrying.id == ""
            assert retrying.data["errorCode"] == "unavailable"
            await asyncio.to_thread(due_now, run)
            Worker(run).start()
            events = await response.until("run.completed")
        assert "run.retrying" not in [event.type for event in events]
        assert text_of(events) == "Better."

    go(scene())


def test_a_retry_is_reported_once_to_a_late_subscriber(model: FakeLLM) -> None:
    model.script(Failure(503, retry_after=30))
    run = ask("Hi")
    publisher.current().handle({"subscribed": [run.pk]})
    execution.execute(run.pk)

    async def scene() -> None:
        async with request(f"/api/chat/runs/{run.pk}/events") as response:
            events = await response.until("run.retrying")
            await asyncio.to_thread(cancelled, run)
            events += await response.until("run.cancelled")
        assert [event.type for event in events].count("run.retrying") == 1

    go(scene())


def cancelled(run: Run) -> None:
    actions.cancel(Run.objects.get(pk=run.pk))
    connections.close_all()


def due_now(run: Run) -> None:
    Run.objects.filter(pk=run.pk).update(due_at=timezone.now())
    connections.close_all()


def test_nothing_is_published_without_subscribers(model: FakeLLM, redis: Redis) -> None:
    run = ask("Hi")
    execution.execute(run.pk)
    assert not redis.exists(publisher.stream_key(run.pk))


def test_stream_resumes_after_any_event_in_any_process(model: FakeLLM) -> None:
    model.script(TALK)
    run = ask("Hi")
    seen: list[Event] = []

    async def first() -> None:
        async with request(f"/api/chat/runs/{run.pk}/events") as response:
            Worker(run).start()
            seen.extend((await response.until("message.delta"))[1:])

    async def second(last: str) -> list[Event]:
        # As header or as parameter.
        path = f"/api/chat/runs/{run.pk}/events"
        async with request(path, last_event_id=last) as response:
            events = await response.until("run.completed")
        async with request(f"{path}?after={last}") as response:
            assert await response.until("run.completed") == events
        # As a browser does that was sent off with the parameter and comes back with the header.
        async with request(f"{path}?after=0-0", last_event_id=last) as response:
            assert await response.until("run.completed") == events
        return events

    async def again() -> None:
        for cut in range(len(seen)):
            whole = seen[: cut + 1] + await second(seen[cut].id)
            assert text_of(whole) == "one two three four "
            assert numbers(whole) == list(range(1, len(whole)))

    go(first())
    go(again())


def test_client_with_the_outcome_gets_204(model: FakeLLM) -> None:
    run = ask("Hi")
    execution.execute(run.pk)

    async def scene() -> None:
        path = f"/api/chat/runs/{run.pk}/events"
        async with request(path) as response:
            outcome = (await response.until("run.completed"))[-1]
        async with request(path, last_event_id=outcome.id) as response:
            assert response.status == 204

    go(scene())


def test_events_lost_by_redis_are_a_gap(model: FakeLLM, redis: Redis) -> None:
    run = ask("Hi")
    publisher.current().handle({"subscribed": [run.pk]})
    execution.execute(run.pk)
    assert redis.exists(publisher.stream_key(run.pk))
    redis.flushall()

    async def scene() -> None:
        path = f"/api/chat/runs/{run.pk}/events"
        async with request(path, last_event_id="1-2") as response:
            gap, outcome = await response.until("run.completed")
        assert (gap.type, gap.data) == ("gap", {"from": "1-3", "to": "1-end"})
        assert outcome.data["run"]["output"]

    go(scene())


def test_missed_end_is_noticed(model: FakeLLM, redis: Redis) -> None:
    """Redis is wiped while the answer comes; whoever puts it together has only its beginning."""
    run = ask("Hi")
    may_end = threading.Event()
    model.script(held(TALK, may_end, 3))

    async def scene() -> None:
        async with request(f"/api/chat/runs/{run.pk}/events") as response:
            await response.event()
            working = asyncio.create_task(asyncio.to_thread(execution.execute, run.pk))
            *_, token = await response.until("message.delta")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(publisher.Publisher, "_send_batch", deaf)
                may_end.set()
                await working
            *_, gap, outcome = await response.until("run.completed")
        number = int(token.id.partition("-")[2])
        assert gap.type == "gap"
        assert gap.data == {"from": f"1-{number + 1}", "to": "1-end"}
        assert outcome.data["run"]["output"] == "one two three four "

    go(scene())


def deaf(publisher_: publisher.Publisher, news: Any) -> None:
    raise RedisConnectionError


def test_trimmed_events_are_a_gap(model: FakeLLM, redis: Redis) -> None:
    run = ask("Hi")
    execution.claim(run.pk)
    with publisher.current().feed(run.pk, 1, stop=lambda: None) as feed:
        feed.start()
        feed.publish("step.started", {})
        feed.publish("step.finished", {})
        feed.finish()
        redis.xtrim(publisher.stream_key(run.pk), minid="1-3", approximate=False)

        async def scene() -> None:
            path = f"/api/chat/runs/{run.pk}/events?after=1-1"
            async with request(path) as response:
                gap, last = await response.event(), await response.event()
            assert (gap.id, gap.type, gap.data) == ("1-2", "gap", {"from": "1-2", "to": "1-2"})
            assert last.id == "1-3"

        go(scene())


@pytest.mark.parametrize(("feeds", "seconds"), [(1, 0.04), (100, 0.1), (1000, 0.2)])
def test_more_publishers_send_larger_batches(feeds: int, seconds: float) -> None:
    assert publisher.tick_seconds(feeds) == seconds


def test_new_attempt_restarts_the_stream(model: FakeLLM) -> None:
    run = ask("Hi")

    async def scene() -> None:
        async with request(f"/api/chat/runs/{run.pk}/events") as response:
            await response.event()
            for attempt in (1, 2):
                with publisher.current().feed(run.pk, attempt, stop=lambda: None) as feed:
                    feed.text(f"from attempt {attempt}")
                    status, text = await response.event(), await response.event()
                    assert (status.id, status.data["attempt"]) == (f"{attempt}-1", attempt)
                    assert text.data["text"] == f"from attempt {attempt}"
            # The first worker is not dead, it was slow: it is not heard any more.
            with publisher.current().feed(run.pk, 1, stop=lambda: None) as feed:
                feed.start()
                feed.text("late")
            with publisher.current().feed(run.pk, 3, stop=lambda: None) as feed:
                assert (await response.event()).id == "3-1"

    go(scene())


@pytest.mark.parametrize(
    ("value", "status"),
    [
        *((v, 400) for v in ("x", "1", "1-", "-1", "1-x", "1-2-3", "99999999999-1", "1-²")),
        ("1-99999999999", 400),
        ("9-1", 404),
    ],
)
def test_invalid_event_id_is_rejected(value: str, status: int) -> None:
    run = ask("Hi")

    async def scene() -> None:
        async with request(f"/api/chat/runs/{run.pk}/events", last_event_id=value) as response:
            assert response.status == status
            assert b'"ok":false' in (await response.end()).body

    go(scene())


@pytest.mark.parametrize("what", ["runs/{run}/events", "threads/{thread}/events"])
def test_stream_is_visible_like_its_run(what: str, settings: Any) -> None:
    alice, bob = user("alice"), user("bob")
    run = ask("Hi", owner=alice)
    path = "/api/chat/" + what.format(run=run.pk, thread=run.thread_id)

    async def status(**headers: str) -> int:
        async with request(path, **headers) as response:
            return response.status

    async def scene() -> None:
        def bearer(who: Any) -> str:
            return f"Bearer {tokens.issue(who.matrix_user_id)}"

        hers = bearer(alice)
        assert await status(authorization=hers) == 200
        assert await status(authorization=bearer(bob)) == 404
        assert await status() == 404
        settings.CHAT_ALLOW_ANONYMOUS = False
        assert await status() == 401
        assert await status(authorization="Bearer nonsense") == 401
        await asyncio.to_thread(alice.revoke_tokens)
        assert await status(authorization=hers) == 401

    go(scene())


def test_message_is_answered_with_the_stream(model: FakeLLM) -> None:
    async def scene() -> None:
        async with request(
            "/api/chat/messages", "POST", {"content": "Hi"}, accept="text/event-stream"
        ) as response:
            assert response.status == 200
            accepted = await response.event()
            assert (accepted.id, accepted.type) == ("0-0", "run.accepted")
            assert accepted.data["status"] == "accepted"
            run = await asyncio.to_thread(Run.objects.get, pk=accepted.data["runId"])
            assert response.headers["location"] == f"/api/chat/runs/{run.pk}"
            Worker(run).start()
            events = await response.until("run.completed")
        assert text_of(events) == events[-1].data["run"]["output"]

    go(scene())


@pytest.mark.parametrize(
    ("accept", "status"),
    [
        ("*/*", 202),
        ("application/json", 202),
        ("application/json, text/event-stream", 202),
        ("application/json;q=0.5, text/event-stream", 200),
        ("text/event-stream;q=0", 202),
        ("text/event-stream;q=x", 202),
        ("text/event-stream, application/json", 200),
    ],
)
def test_accept_header_selects_the_stream(accept: str, status: int) -> None:
    async def scene() -> None:
        async with request(
            "/api/chat/messages", "POST", {"content": "Hi"}, accept=accept
        ) as response:
            assert response.status == status

    go(scene())


def test_disconnected_client_leaves_nothing_behind() -> None:
    run = ask("Hi")

    async def scene() -> None:
        hub = subscriber.current(streams.find_ended)
        async with request(f"/api/chat/runs/{run.pk}/events") as response:
            await response.event()
            await wait_for(lambda: run.pk in hub._runs)
        assert not hub._runs
        # One that takes nothing, too: the server waits in the middle of sending to it.
        async with request(f"/api/chat/runs/{run.pk}/events") as response:
            response.reading.clear()
            await asyncio.sleep(0.1)
            with publisher.current().feed(run.pk, 1, stop=lambda: None) as feed:
                feed.start()
                await asyncio.sleep(0.1)
        assert not hub._runs

    go(scene())


async def wait_for(condition: Any, seconds: float = 60) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


def test_slow_client_misses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subscriber, "MAX_PENDING", 5)
    monkeypatch.setattr(subscriber, "BATCH", 7)
    run = ask("Hi")

    async def scene() -> None:
        async with request(f"/api/chat/runs/{run.pk}/events") as response:
            await response.event()
            with publisher.current().feed(run.pk, 1, stop=lambda: None) as feed:
                feed.start()
                await response.event()
                response.reading.clear()
                for number in range(50):
                    feed.publish("step.started", {"step": number})
                    await asyncio.to_thread(feed.finish)
                response.reading.set()
                events = [await response.event() for _ in range(50)]
        assert [event.data["step"] for event in events] == list(range(50))

    go(scene())


def test_idle_stream_sends_keep_alives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "KEEP_ALIVE_SECONDS", 0.05)
    run = ask("Hi")
    asked: list[Any] = []
    unit = streams.unit

    async def counted(function: Any, *args: Any) -> Any:
        asked.append(function)
        return await unit(function, *args)

    monkeypatch.setattr(streams, "unit", counted)

    async def scene() -> None:
        async with request(f"/api/chat/runs/{run.pk}/events") as response:
            await wait_for(lambda: response.body.count(b"\n: \n\n") >= 3)
            before = len(asked)
            await wait_for(lambda: response.body.count(b"\n: \n\n") >= 10)
            others = [each for each in asked[before:] if each is not stream_access.look_up]
            assert not others, "an idle listener asks the database for more than its rights"

    go(scene())


def test_outcome_is_sent_without_redis(model: FakeLLM, settings: Any) -> None:
    run = ask("Hi")
    settings.REDIS_URL = "redis://127.0.0.1:1"

    async def scene() -> None:
        async with request(f"/api/chat/runs/{run.pk}/events") as response:
            await response.event()
            Worker(run).start()
            outcome = (await response.until("run.completed"))[-1]
        assert outcome.data["run"]["output"]

    go(scene())


def test_queued_run_is_cancelled_at_once() -> None:
    run = ask("Hi")

    async def scene() -> None:
        path = f"/api/chat/runs/{run.pk}"
        async with request(f"{path}/events") as listener:
            await listener.event()
            async with request(f"{path}/cancel", "POST") as response:
                assert response.status == 202
                assert b'"status":"cancelled"' in (await response.end()).body
            assert (await listener.event()).type == "run.cancelled"
            await listener.end()
        async with request(f"{path}/cancel", "POST") as response:
            assert response.status == 409

    go(scene())


def test_cancel_takes_effect_between_two_tokens(model: FakeLLM) -> None:
    model.script(Hang(2, Reply(("one ", "two ", "three "))))
    run = ask("Hi")
    worker = Worker(run)

    async def scene() -> None:
        async with request(f"/api/chat/runs/{run.pk}/events") as listener:
            worker.start()
            text = ""
            while text != "one two ":
                text += text_of(await listener.until("message.delta"))
            async with request(f"/api/chat/runs/{run.pk}/cancel", "POST") as response:
                assert response.status == 202
            async with asyncio.timeout(60):
                await listener.until("run.cancelled")
                await asyncio.to_thread(worker.join)
        model.wait_for_disconnects()
        step = await asyncio.to_thread(Step.objects.get, run=run)
        assert step.output == text
        attempt = await asyncio.to_thread(Attempt.objects.get, run=run)
        assert (attempt.result, attempt.completion_tokens) == ("cancelled", 2)

    go(scene())


def test_thread_events_follow_the_conversation(model: FakeLLM) -> None:
    thread = conversation(2)

    async def scene() -> None:
        path = f"/api/chat/threads/{thread.pk}/events"
        async with request(path) as response:
            events = [await response.event() for _ in range(4)]
            assert [event.id for event in events] == ["1", "2", "3", "4"]
            assert [event.type for event in events] == ["message.created", "run.completed"] * 2
            assert events[3].data["message"]["content"] == "answer 1"
            # Two questions at once: the second is batch when its turn has come.
            run = await asyncio.to_thread(ask, "And now?", thread_id=thread.pk)
            later = await asyncio.to_thread(ask, "And then?", thread_id=thread.pk)
            asked = await response.event()
            assert (asked.id, asked.data["message"]["content"]) == ("5", "And now?")
            for one in (run, later):
                worker = Worker(one)
                worker.start()
                await asyncio.to_thread(worker.join)
            ids = [(await response.event()).id for _ in range(3)]
            assert ids == ["6", "7", "8"]
        async with request(path, last_event_id="7") as response:
            assert (await response.event()).id == "8"

    go(scene())


def test_long_turns_are_read_in_small_batches() -> None:
    thread = conversation(5)
    Message.objects.filter(thread=thread, role="assistant").update(content="x" * 1_500_000)
    caller = StreamCaller(Access(), None)
    after, sizes, numbers = 0, [], []
    while True:
        batch = streams._next_frames(caller, thread.pk, after)
        assert batch
        frames, reached = batch
        if not frames:
            break
        sizes.append(len(frames) // 3_000_000)  # the message, and the output of its run
        numbers += re.findall(rb"id: (\d+)", frames)
        after = reached
    assert sizes == [2, 2, 1]
    assert numbers == [str(number).encode() for number in range(1, 11)]


def test_deleted_turns_are_a_gap() -> None:
    thread = conversation(3)
    Message.objects.get(thread=thread, position=2).delete()

    async def scene() -> None:
        async with request(f"/api/chat/threads/{thread.pk}/events?after=1") as response:
            events = [await response.event() for _ in range(3)]
        assert [event.id for event in events] == ["2", "4", "5"]
        assert events[1].data == {"from": "3", "to": "4"}

    go(scene())


@pytest.mark.parametrize("value", ["x", "-1", "1-1", "9999999999", "²"])
def test_invalid_number_is_rejected(value: str) -> None:
    thread = conversation(1)

    async def scene() -> None:
        async with request(
            f"/api/chat/threads/{thread.pk}/events", last_event_id=value
        ) as response:
            assert response.status == 400

    go(scene())


def test_breaker_skips_an_unavailable_redis(model: FakeLLM, settings: Any) -> None:
    run = ask("Hi")
    model.script(Reply(tuple("many words " * 20), delta_latency=0.005))
    publisher._publish_client.reset()
    settings.REDIS_URL = "redis://127.0.0.1:1"
    publisher.current().handle({"subscribed": [run.pk]})
    execution.execute(run.pk)
    run.refresh_from_db()
    assert run.status == "completed"
    stream._breaker.reset()
