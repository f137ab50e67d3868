"""What other programs may have written where Celery and the listeners read: a worker goes on."""

import base64
import json
import time
from typing import Any

import httpx2
import pytest

from tests.fakes.llm import FakeLLM
from tests.system.stack import Stack

pytestmark = pytest.mark.system

QUEUE = "agent_events:celery"


def message(body: str = "", **headers: Any) -> bytes:
    return json.dumps(
        {
            "body": body,
            "content-type": "application/json",
            "content-encoding": "utf-8",
            "headers": headers,
            "properties": {
                "delivery_tag": "a-tag",
                "delivery_info": {"exchange": "", "routing_key": QUEUE},
                "body_encoding": "base64",
            },
        }
    ).encode()


TASK = {"task": "agents.tasks.execute", "id": "an-id"}
UNUSABLE = [
    b"garbage",
    b"\xff\xfe\x00",
    b"null",
    b"[1, 2, 3]",
    b"{}",
    b"[" * 100_000,
    b'{"body": "x", "headers": [], "properties": 7}',
    message(),
    message(task="agents.tasks.unknown", id="an-id"),
    message(**TASK),
    message("%%%", **TASK),
    message(base64.b64encode(b"[[],{},{}]").decode(), **TASK),
    message(base64.b64encode(b'[["run_1"],{},{"chain":[{}]}]').decode(), **TASK),
    message("A" * 5_000_000, **TASK),
]
COMMANDS = [
    b"garbage",
    b"[]",
    b"{}",
    message(),
    message(base64.b64encode(b"[]").decode()),
    message(base64.b64encode(b'{"method": "ping", "reply_to": 7}').decode()),
]


def test_a_worker_sets_aside_what_is_no_message() -> None:
    with (
        FakeLLM() as llm,
        Stack(llm.url) as stack,
        httpx2.Client(base_url=f"{stack.url}/api/chat", timeout=60) as client,
        stack.redis as redis,
    ):
        wait = {"Prefer": "wait=30"}
        worker = stack.pid("worker")
        assert client.post("/messages", json={"content": "before"}, headers=wait).status_code == 200

        for raw in UNUSABLE:
            redis.lpush(QUEUE, raw)
        redis.lpush(f"{QUEUE}\x06\x163", b"garbage")
        redis.hset("unacked", mapping={"a": b"garbage", "b": b'[{}, "", "agent_events"]'})
        redis.zadd("unacked_index", {"a": 1, "b": 1})
        for raw in COMMANDS:
            redis.publish("/0.celery.pidbox", raw)
        for channel in ("agent_events:live", "agent_events:live:called"):
            for raw in (b"garbage", b"[]", b'{"told": [["run", "x", [[{}, 1, 2]]]], "called": 7}'):
                redis.publish(channel, raw)

        began = time.monotonic()
        answer = client.post("/messages", json={"content": "after"}, headers=wait)
        took = time.monotonic() - began

        assert answer.status_code == 200
        assert answer.json()["status"] == "completed"
        assert took < 10
        dead = f"{QUEUE.partition(':')[0]}:dead"
        stack.wait("all to be set aside", lambda: redis.xlen(dead) >= len(UNUSABLE) + 3, 30)
        assert redis.xlen(dead) == len(UNUSABLE) + 3
        assert redis.llen(QUEUE) == 0
        assert not redis.hexists("unacked", "a")
        assert stack.pid("worker") == worker
        log = stack.log()
        assert log.count("is unusable") == len(UNUSABLE) + 3
        assert log.count("Invalid command on") == len(COMMANDS)
        assert "Traceback" not in log
