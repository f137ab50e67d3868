"""What any program may write into a Redis that is shared: entries of the stream, news on a channel."""

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import strategies as st
from redis import Redis

from agents.events import publisher, stream, subscriber
from agents.events.schema import MalformedEvent, ParsedEvent
from agents.models import Run
from agents.worker.consumer import Consumer
from lib import revocations
from tests.agents.conftest import Broker, _celery, broker  # noqa: F401
from tests.agents.test_runtime import dead, pending
from tests.fuzz.examples import anything, objects, odd, tried, words

KINDS = ["agent.run.requested", "agent.run.completed", "agent.run.failed", "agent.run.cancelled"]
UUIDS = st.uuids().map(str)
PAYLOAD = objects(
    {"runId": st.one_of(words, st.sampled_from(["run-1", "run-2"])), "prompt": words},
    threadId=st.one_of(words, st.just("thread-1")),
    model=words,
)
EVENT = objects(
    {"id": UUIDS, "type": st.sampled_from(KINDS), "payload": PAYLOAD},
    correlationId=words,
    timestamp=words,
)
RAW = st.one_of(
    EVENT.map(lambda event: json.dumps(event).encode("utf-8", "surrogatepass")),
    anything.map(lambda event: json.dumps(event).encode("utf-8", "surrogatepass")),
    st.binary(max_size=40),
)


@tried(120, raw=st.one_of(st.none(), RAW))
def test_an_entry_is_an_event_or_is_not(raw: bytes | None) -> None:
    try:
        told = ParsedEvent.parse(raw)
    except MalformedEvent as error:
        assert str(error)
        return
    assert told.run_id is None or len(told.run_id) <= 64
    assert told.ended_thread is None or isinstance(told.ended_thread, str)


@pytest.mark.django_db(transaction=True)
@tried(30, raws=st.lists(RAW, min_size=1, max_size=5), field=st.sampled_from(["event", "x", ""]))
def test_a_worker_reads_on(redis: Redis, broker: Broker, raws: list[bytes], field: str) -> None:  # noqa: F811
    redis.flushall()
    stream.ensure_group()
    for raw in raws:
        redis.xadd("agent_events", {field: raw})
    consumer = Consumer("worker-1")
    consumer.read()
    consumer.mark_published()

    assert pending(redis) == 0
    kept = {entry.entry.raw for entry in stream.list_dead_letters()}
    if field != "event":
        assert len(dead(redis)) == len(raws)
    else:
        assert all(raw in raws for raw in kept)
    for run in Run.objects.all():
        run.full_clean(validate_unique=False, validate_constraints=False)
    assert len(broker.handed()) <= len(raws)


NEWS = objects(
    {
        "progress": odd(st.lists(odd(st.tuples(words, st.integers(), odd(st.lists(anything)))))),
        "event": odd(st.lists(words, min_size=3, max_size=3)),
    },
    announce=anything,
    subscribed=odd(st.lists(words, max_size=2)),
    stop=words,
)


def hub() -> subscriber.Subscriber:
    async def which_ended(run_ids: list[str]) -> list[str]:
        return []

    made = subscriber.Subscriber(which_ended)
    made._call = lambda run_ids: None  # type: ignore[method-assign]
    return made


@tried(80, news=st.one_of(NEWS, anything), raw=st.binary(max_size=20))
def test_news_that_make_no_sense_are_passed_by(news: Any, raw: bytes) -> None:
    hearing = hub()
    for told in (json.dumps(news).encode("utf-8", "surrogatepass"), raw):
        for channel in (stream.live_channel(), revocations.channel()):
            hearing._handle({"channel": channel.encode(), "data": told})


@tried(80, call=st.one_of(NEWS, anything))
def test_calls_that_make_no_sense_are_passed_by(redis_server: str, call: Any) -> None:
    running = publisher.Publisher()
    with suppress(TypeError, AttributeError):  # which `hear` says and passes by
        running.handle(call)
