"""The worker's side of the stream, on a real Redis. Celery itself is met in tests/system; here, what
was handed to it is read from its queue."""

import time
import uuid
from datetime import timedelta
from typing import Any

import orjson
import pytest
from django.contrib.sessions.models import Session
from django.db.models.functions import Now
from django.utils import timezone
from redis import Redis
from redis.exceptions import RedisError

from agents.events import publisher, stream
from agents.events.log import emit_event
from agents.lifecycle import states
from agents.models import Event, Limit, Run
from agents.runs import actions, execution
from agents.usage import limits
from agents.worker import dispatch, maintenance
from agents.worker.consumer import Consumer
from agents.worker.maintenance import Maintenance
from chat.models import Message
from tests import factories
from tests.agents.conftest import Broker

pytestmark = pytest.mark.django_db(transaction=True)


def entries(redis: Redis) -> list[dict[str, Any]]:
    return [orjson.loads(fields[b"event"]) for _, fields in redis.xrange("agent_events")]


def dead(redis: Redis) -> list[str]:
    return [fields[b"reason"].decode() for _, fields in redis.xrange("agent_events:dead")]


def pending(redis: Redis) -> int:
    return int(redis.xpending("agent_events", "agent_runtime")["pending"])


def add(redis: Redis, event: Any) -> None:
    raw = event if isinstance(event, bytes) else orjson.dumps(event)
    redis.xadd("agent_events", {"event": raw})


def request(**payload: Any) -> dict[str, Any]:
    return {
        "id": str(uuid.uuid4()),
        "type": "agent.run.requested",
        "timestamp": "2026-01-01T00:00:00.000Z",
        "correlationId": "c-1",
        "payload": {"runId": "run-of-another", "prompt": "Hi"} | payload,
    }


class TestPublishing:
    def test_an_accepted_question_stands_on_the_stream(self, redis: Redis) -> None:
        run = factories.ask("Hi", correlation_id="c-1")

        event = Event.objects.get()
        assert entries(redis) == [
            {
                "id": str(event.pk),
                "type": "agent.run.requested",
                "timestamp": event.created_at.isoformat(timespec="milliseconds").replace(
                    "+00:00", "Z"
                ),
                "correlationId": "c-1",
                "payload": {
                    "runId": run.pk,
                    "threadId": run.thread_id,
                    "prompt": "Hi",
                    "model": "gpt-4o-mini",
                },
            }
        ]

    def test_so_does_its_outcome(self, redis: Redis) -> None:
        run = factories.ask("Hi")
        execution.execute(run.pk)

        told = entries(redis)[1]
        assert told["type"] == "agent.run.completed"
        assert told["payload"]["requestEventId"] == entries(redis)[0]["id"]

    def test_a_redis_that_is_away_costs_the_requester_nothing(self, settings: Any) -> None:
        run = factories.ask("Hi")

        assert Run.objects.get() == run
        assert Event.objects.unpublished().count() == 1


class TestReader:
    def test_a_run_is_handed_to_celery_and_the_entry_acknowledged(
        self, consumer: Consumer, redis: Redis, broker: Broker
    ) -> None:
        run = factories.ask()
        consumer.read()
        consumer.mark_published()

        assert broker.handed() == [run.pk]
        assert pending(redis) == 0
        assert Event.objects.get().published_at is not None

    def test_when_a_run_ends_the_next_of_its_thread_is_handed_over(
        self, consumer: Consumer, broker: Broker
    ) -> None:
        first = factories.ask("one")
        second = factories.ask("two", thread_id=first.thread_id)
        consumer.read()
        assert set(broker.handed()) == {first.pk, second.pk}

        execution.execute(first.pk)
        consumer.read()
        assert broker.handed() == [second.pk]

    def test_of_a_long_queue_in_a_thread_only_the_next_is_handed_over(
        self, consumer: Consumer, broker: Broker
    ) -> None:
        first = factories.ask("one")
        later = [factories.ask(f"{n}", thread_id=first.thread_id) for n in range(5)]
        consumer.read()
        broker.handed()
        actions.cancel(first)
        consumer.read()

        assert broker.handed() == [later[0].pk]

    def test_programs_are_limited_by_a_row_of_their_own_alone_and_then_wait(
        self, consumer: Consumer, redis: Redis, broker: Broker, settings: Any
    ) -> None:
        settings.LIMIT_USER_MESSAGES_PER_MINUTE = 1
        for number in range(3):
            add(redis, request(runId=f"run-{number}"))
        consumer.read()
        assert Run.objects.count() == 3

        Limit.objects.create(kind="user", name=limits.PROGRAMS, messages_per_minute=1)
        limits.limit_list.reset()
        for number in range(3, 5):
            add(redis, request(runId=f"run-{number}"))
        consumer.read()
        assert (Run.objects.count(), pending(redis)) == (4, 1)

        Limit.objects.all().delete()
        limits.limit_list.reset()
        consumer.handle(stream.claim_stale("worker-1", idle=timedelta()))
        assert (Run.objects.count(), pending(redis)) == (5, 0)

    def test_a_wiped_redis_gets_its_group_back(
        self, consumer: Consumer, redis: Redis, broker: Broker
    ) -> None:
        redis.flushall()
        consumer.read()
        run = factories.ask()
        consumer.read()

        assert broker.handed() == [run.pk]

    def test_what_came_before_the_group_counts_too(
        self, consumer: Consumer, redis: Redis, broker: Broker
    ) -> None:
        redis.flushall()
        run = factories.ask()
        consumer.read()
        consumer.read()

        assert broker.handed() == [run.pk]

    def test_entries_of_a_dead_worker_are_taken_over(
        self, consumer: Consumer, redis: Redis, broker: Broker
    ) -> None:
        run = factories.ask()
        assert len(stream.read("worker-0")) == 1  # and it died

        consumer.handle(stream.claim_stale("worker-1", idle=timedelta(0)))

        assert broker.handed() == [run.pk]
        assert pending(redis) == 0

    def test_an_entry_that_was_deleted_while_it_was_pending_is_passed_by(
        self, consumer: Consumer, redis: Redis, broker: Broker
    ) -> None:
        factories.ask()
        run = factories.ask()
        gone, _ = stream.read("worker-0")
        redis.xdel("agent_events", gone.id)

        consumer.handle(stream.claim_stale("worker-1", idle=timedelta(0)))

        assert broker.handed() == [run.pk]
        assert pending(redis) == 0


class TestOtherPrograms:
    def test_a_request_of_another_program_becomes_a_run(
        self, consumer: Consumer, redis: Redis, broker: Broker
    ) -> None:
        add(redis, request(prompt="  Hi  ", threadId="thread-of-another", model="gpt-4o"))
        consumer.read()

        run = Run.objects.get()
        assert (run.pk, run.thread_id, run.model) == (
            "run-of-another",
            "thread-of-another",
            "gpt-4o",
        )
        assert (run.source, run.correlation_id) == (Run.Source.STREAM, "c-1")
        assert Message.objects.get().content == "Hi"
        assert Event.objects.get().published_at is not None
        assert broker.handed() == ["run-of-another"]
        assert len(entries(redis)) == 1

    def test_its_outcome_names_its_event(
        self, consumer: Consumer, redis: Redis, broker: Broker
    ) -> None:
        event = request()
        add(redis, event)
        consumer.read()
        execution.execute("run-of-another")

        assert entries(redis)[-1]["payload"]["requestEventId"] == event["id"]

    def test_the_same_request_twice_is_one_run(
        self, consumer: Consumer, redis: Redis, broker: Broker
    ) -> None:
        event = request()
        add(redis, event)
        add(redis, event)
        consumer.read()
        add(redis, event)
        consumer.read()

        assert Run.objects.count() == 1
        assert dead(redis) == []

    @pytest.mark.parametrize(
        ("event", "reason"),
        [
            (b"{", "'event' is not JSON"),
            (b"[]", "'event' is not an object"),
            (b"\xff", "'event' is not JSON"),
            ({}, "'id' is not a UUID"),
            (request() | {"id": "1"}, "'id' is not a UUID"),
            (request() | {"id": 7}, "'id' is not a UUID"),
            (request() | {"type": None}, "'type' is not a string"),
            (request() | {"correlationId": 7}, "'correlationId' is not a string"),
            (request() | {"payload": []}, "'payload' is not an object"),
            (request(runId=None), "'payload.runId' is not a string"),
            (request(runId="a b"), "runId must be 1 to 64"),
            (request(runId="\0"), "runId must be 1 to 64"),
            (
                request() | {"type": "agent.run.failed", "payload": {"threadId": "\0"}},
                "threadId must be 1 to 64",
            ),
            (request(prompt=None), "'payload.prompt' is not a string"),
            (request(prompt=" "), "content must be at least 1 character"),
            (request(prompt="a\0b"), "content must not contain NUL"),
            (request(threadId=7), "'payload.threadId' is not a string"),
            (request(model="m" * 101), "model must be 1 to 100"),
            (request() | {"correlationId": "c" * 201}, "correlationId must be"),
            (request() | {"type": "agent.run.completed", "payload": {"threadId": 1}}, "threadId"),
        ],
    )
    def test_what_makes_no_sense_is_set_aside_with_its_reason(
        self, consumer: Consumer, redis: Redis, broker: Broker, event: Any, reason: str
    ) -> None:
        add(redis, event)
        run = factories.ask("in between")
        consumer.read()

        [told] = dead(redis)
        assert reason in told
        assert pending(redis) == 0
        assert broker.handed() == [run.pk]

    def test_an_entry_of_another_shape_is_set_aside(
        self, consumer: Consumer, redis: Redis, broker: Broker
    ) -> None:
        redis.xadd("agent_events", {"message": "hello"})
        consumer.read()

        assert dead(redis) == ["it has no field 'event'"]

    def test_a_request_for_the_thread_of_a_room_is_set_aside(
        self, consumer: Consumer, redis: Redis, broker: Broker
    ) -> None:
        asked = factories.ask("in the room", room_id="!room", place="!room")
        add(redis, request(prompt="planted", threadId=asked.thread_id))
        consumer.read()

        assert dead(redis) == [
            "its thread belongs to a Matrix room, which accepts messages from the room only"
        ]
        assert Message.objects.get().content == "in the room"
        assert pending(redis) == 0
        # Its own request is the room's.
        assert broker.handed() == [asked.pk]

    def test_a_refused_model_is_set_aside(
        self, consumer: Consumer, redis: Redis, broker: Broker, settings: Any
    ) -> None:
        settings.CHAT_ALLOWED_MODELS = ["gpt-4o-mini"]
        add(redis, request(model="o3"))
        consumer.read()

        assert dead(redis) == ["model 'o3' is not allowed. Allowed models: gpt-4o-mini."]

    def test_events_of_unknown_types_are_passed_by(
        self, consumer: Consumer, redis: Redis, broker: Broker
    ) -> None:
        add(redis, request() | {"type": "invoice.paid"})
        consumer.read()

        assert (pending(redis), dead(redis), broker.handed()) == (0, [], [])


class TestSweep:
    def test_a_run_that_redis_forgot_is_handed_over_again(
        self, consumer: Consumer, redis: Redis, broker: Broker
    ) -> None:
        run = factories.ask()
        redis.flushall()
        assert maintenance.sweep_runs() == 0

        Run.objects.update(dispatched_at=Now() - timedelta(minutes=1))
        assert maintenance.sweep_runs() == 1
        assert broker.handed() == [run.pk]
        assert maintenance.sweep_runs() == 0

    def test_a_run_whose_worker_died_is_handed_over(
        self, consumer: Consumer, broker: Broker
    ) -> None:
        run = factories.ask()
        execution.claim(run.pk)
        Run.objects.update(dispatched_at=Now() - timedelta(seconds=2))
        assert maintenance.sweep_runs() == 0

        Run.objects.update(lease_expires_at=Now() - timedelta(seconds=1))
        assert maintenance.sweep_runs() == 1
        assert broker.handed() == [run.pk]
        assert maintenance.sweep_runs() == 0

    def test_an_attempt_is_repeated_when_it_is_due(
        self, consumer: Consumer, broker: Broker
    ) -> None:
        run = factories.ask()
        Run.objects.update(dispatched_at=None, due_at=Now() + timedelta(minutes=1))
        assert maintenance.sweep_runs() == 0

        Run.objects.update(due_at=Now())
        assert maintenance.sweep_runs() == 1
        assert broker.handed() == [run.pk]

    def test_a_run_that_waits_for_an_earlier_one_is_left_alone(
        self, consumer: Consumer, broker: Broker
    ) -> None:
        first = factories.ask("one")
        factories.ask("two", thread_id=first.thread_id)
        Run.objects.update(dispatched_at=None)

        maintenance.sweep_runs()
        assert broker.handed() == [first.pk]

    def test_nothing_is_added_to_a_long_queue(
        self, consumer: Consumer, redis: Redis, broker: Broker
    ) -> None:
        factories.ask()
        Run.objects.update(dispatched_at=Now() - timedelta(minutes=1))
        redis.rpush("agent_events:celery", *[b"{}"] * dispatch.shortfall())
        assert maintenance.sweep_runs() == 0

        redis.lpop("agent_events:celery")
        assert maintenance.sweep_runs() == 1

    def test_a_chore_that_fails_does_not_keep_the_others_from_being_done(
        self, consumer: Consumer, redis: Redis, broker: Broker
    ) -> None:
        run = factories.ask()
        Run.objects.update(dispatched_at=None)
        redis.delete("agent_events")  # there is nothing to take over from, which is an error

        with pytest.raises(RedisError):
            Maintenance(consumer).tick()
        assert broker.handed() == [run.pk]

    def test_a_chore_that_took_long_once_is_done_again_soon(
        self, consumer: Consumer, broker: Broker, monkeypatch: Any
    ) -> None:
        """It may have waited for the database, and the runs that are left over then wait for it."""
        done: list[bool] = []

        def chore() -> None:
            done.append(True)
            time.sleep(0.2)

        monkeypatch.setattr(maintenance, "PERIODIC_JOBS", [(chore, 0.01)])
        monkeypatch.setattr(maintenance, "MAX_REST_SECONDS", 0.1)
        running = Maintenance(consumer)
        running.tick()
        time.sleep(0.2)
        running.tick()
        assert len(done) == 2

    def test_the_clock_of_the_requester_does_not_count(self, monkeypatch: Any) -> None:
        ahead = timezone.now() + timedelta(minutes=5)
        monkeypatch.setattr("django.utils.timezone.now", lambda: ahead)
        run = factories.ask()

        assert execution.claim(run.pk) is not None

    def test_what_is_old_goes_unless_the_workers_are_behind(
        self, consumer: Consumer, redis: Redis, broker: Broker
    ) -> None:
        Session.objects.create(session_key="old", session_data="", expire_date=timezone.now())
        redis.rpush("agent_events:celery", *[b"{}"] * maintenance.SWEEP_BATCH)
        Maintenance(consumer).tick()
        assert Session.objects.exists()

        redis.delete("agent_events:celery")
        Maintenance(consumer).tick()
        assert not Session.objects.exists()

    def test_the_keeper_is_one_worker(self, consumer: Consumer, broker: Broker) -> None:
        factories.ask()
        Run.objects.update(dispatched_at=None)
        assert stream.acquire_leadership("worker-2")

        Maintenance(consumer).tick()
        assert broker.handed() == []

        stream.resign("worker-1")
        Maintenance(consumer).tick()
        assert broker.handed() == []

        stream.resign("worker-2")
        Maintenance(consumer).tick()
        assert len(broker.handed()) == 1


class TestRelay:
    def age_events(self) -> None:
        Event.objects.update(created_at=timezone.now() - timedelta(minutes=1))

    def test_an_event_that_redis_did_not_take_is_added_later(
        self, consumer: Consumer, redis: Redis, broker: Broker
    ) -> None:
        run = factories.ask()
        redis.delete("agent_events")
        stream.ensure_group()
        assert maintenance.relay() == 0  # it may still be on its way

        self.age_events()
        assert maintenance.relay() == 1
        consumer.read()
        consumer.mark_published()
        assert broker.handed() == [run.pk]
        assert maintenance.relay() == 0

    def test_what_waits_on_the_stream_is_not_added_twice(
        self, consumer: Consumer, redis: Redis, broker: Broker
    ) -> None:
        redis.xadd("agent_events", {"event": b"{}"}, id="1000-0")
        consumer.read()
        factories.ask("the workers have not come to it yet")
        self.age_events()

        assert maintenance.relay() == 0


class TestTrim:
    def test_what_somebody_has_yet_to_read_or_acknowledge_is_kept(
        self, consumer: Consumer, redis: Redis, broker: Broker
    ) -> None:
        start = int((time.time() - 2 * 24 * 3600) * 1000)
        old = [
            redis.xadd("agent_events", {"event": b"{}"}, id=f"{start + n}-0") for n in range(2000)
        ]
        redis.xgroup_create("agent_events", "another", id=f"{start + 1500}-0")
        redis.xreadgroup("agent_runtime", "worker-0", {"agent_events": ">"}, count=2000)
        stream.trim()
        assert redis.xlen("agent_events") == 2000

        redis.xack("agent_events", "agent_runtime", *old)
        stream.trim()
        left = redis.xrange("agent_events", count=1)[0][0]
        assert 1400 < int(left.split(b"-")[0]) - start <= 1500

    def test_a_group_that_was_abandoned_long_ago_does_not_fill_the_memory(
        self, consumer: Consumer, redis: Redis, broker: Broker
    ) -> None:
        for number in range(1, 501):
            redis.xadd("agent_events", {"event": b"{}"}, id=f"{number}-0")
        redis.xgroup_create("agent_events", "abandoned", id="0")
        stream.trim()

        assert redis.xlen("agent_events") < 500

    def test_of_what_made_no_sense_the_last_is_kept(
        self, consumer: Consumer, redis: Redis, broker: Broker, settings: Any
    ) -> None:
        for length, most in ((100, 300), (0, 1000)):  # Redis drops whole nodes of a hundred
            redis.delete("agent_events:dead")
            settings.REDIS_STREAM_DEAD_LENGTH = length
            for number in range(500):
                stream.dead_letter(stream.Entry(f"{number}-0", b"{"), "nonsense")
            assert min(length or 500, 500) <= redis.xlen("agent_events:dead") <= most


class TestSize:
    """A stream that is held in memory for a day."""

    def test_a_long_text_is_cut_on_the_stream_and_whole_in_the_database(
        self, redis: Redis, settings: Any
    ) -> None:
        prompt = "é" * 20_000
        run = factories.ask(prompt)
        emit_event(run, states.EventType.COMPLETED, run.outcome_payload(output=prompt))

        asked, ended = (entry["payload"] for entry in entries(redis))
        assert asked["prompt"] == ended["output"] == "é" * 8192
        assert asked["promptTruncated"] is True
        assert ended["outputTruncated"] is True
        assert "output" not in asked
        kept = {event.type: event.payload for event in Event.objects.all()}
        assert kept[Event.Type.REQUESTED]["prompt"] == prompt
        assert kept[Event.Type.COMPLETED]["output"] == prompt
        assert redis.xinfo_stream("agent_events")["length"] == 2

    def test_a_text_of_just_that_size_is_whole(self, redis: Redis) -> None:
        factories.ask("a" * 16_384)

        [asked] = (entry["payload"] for entry in entries(redis))
        assert asked["prompt"] == "a" * 16_384
        assert "promptTruncated" not in asked

    def test_the_worker_asks_the_model_with_the_whole_of_it(
        self, consumer: Consumer, redis: Redis, broker: Broker
    ) -> None:
        run = factories.ask("a" * 50_000)
        consumer.read()

        assert broker.handed() == [run.pk]
        assert Run.objects.get().message.content == "a" * 50_000

    def test_a_cut_request_whose_run_is_gone_makes_no_run(
        self, consumer: Consumer, redis: Redis, broker: Broker
    ) -> None:
        run = factories.ask("a" * 50_000)
        run.thread.delete()
        consumer.read()

        assert not Run.objects.exists()
        assert dead(redis) == ["its prompt is truncated, and its run does not exist"]

    def test_a_long_request_of_another_program_is_taken_whole(
        self, consumer: Consumer, redis: Redis, broker: Broker
    ) -> None:
        add(redis, request(prompt="a" * 50_000))
        consumer.read()

        assert Run.objects.get().message.content == "a" * 50_000

    def fill(self, redis: Redis, count: int) -> list[bytes]:
        raw = orjson.dumps({"id": str(uuid.uuid4()), "type": "x", "payload": {"pad": "a" * 10_000}})
        return [redis.xadd("agent_events", {"event": raw}) for _ in range(count)]

    def test_the_oldest_go_when_it_is_too_large(
        self, consumer: Consumer, redis: Redis, broker: Broker, settings: Any
    ) -> None:
        settings.REDIS_STREAM_MAX_BYTES = 1_000_000
        redis.xgroup_create("agent_events", "slow", id="0")
        ids = self.fill(redis, 150)
        consumer.read()
        while stream.trim_bytes():
            pass

        assert redis.memory_usage("agent_events", samples=0) <= 800_000
        assert redis.xlen("agent_events") > 50
        assert redis.xrevrange("agent_events", count=1)[0][0] == ids[-1]

    def test_what_the_workers_need_stays(
        self, consumer: Consumer, redis: Redis, broker: Broker, settings: Any
    ) -> None:
        settings.REDIS_STREAM_MAX_BYTES = 1_000_000
        self.fill(redis, 100)
        assert stream.trim_bytes() == 0  # nobody has read it
        redis.xreadgroup("agent_runtime", "worker-0", {"agent_events": ">"}, count=60)
        assert stream.trim_bytes() == 0  # nobody has acknowledged it

        first = redis.xrange("agent_events", count=20)
        redis.xack("agent_events", "agent_runtime", *(entry_id for entry_id, _ in first))
        assert stream.trim_bytes() == 20
        assert redis.xlen("agent_events") == 80

    def test_dead_letters_are_bounded_too(
        self, consumer: Consumer, redis: Redis, broker: Broker, settings: Any
    ) -> None:
        settings.REDIS_STREAM_MAX_BYTES = 1_000_000
        for number in range(30):
            stream.dead_letter(stream.Entry(f"{number}-0", b"a" * 10_000), "nonsense")

        assert stream.trim_bytes() > 15
        assert stream.count_dead_letters() > 5

    def test_while_no_worker_reads_events_wait_in_the_database(
        self, consumer: Consumer, redis: Redis, broker: Broker, settings: Any
    ) -> None:
        settings.REDIS_STREAM_MAX_BYTES = 1_000_000
        self.fill(redis, 120)
        stream._gauge.reset()
        run = factories.ask("while it is full")
        assert redis.xlen("agent_events") == 120

        consumer.read()
        while stream.trim_bytes():
            pass
        stream._gauge.reset()
        Event.objects.update(created_at=timezone.now() - timedelta(minutes=1))
        assert maintenance.relay() == 1
        assert entries(redis)[-1]["payload"]["runId"] == run.pk


class TestTokens:
    def test_what_is_kept_of_an_attempt_is_bounded(self, redis: Redis) -> None:
        running = publisher.current()
        heard = redis.pubsub(ignore_subscribe_messages=True)
        heard.subscribe(stream.live_channel())
        heard.get_message(timeout=5)
        with running.feed("run_1", 1, stop=lambda: None) as feed:
            feed.start()
            for _ in range(8):
                feed.publish("message.delta", {"text": "a" * 250_000})
                running.flush(feed)
        told = []
        while message := heard.get_message(timeout=1):
            told += orjson.loads(message["data"]).get("progress", [])
        heard.close()

        assert 3 <= redis.xlen(publisher.stream_key("run_1")) <= 5
        assert [number for _, _, events in told for number, *_ in events] == list(range(1, 10))
