"""What may stand in Celery's queue, where any program may have written it."""

import base64
import contextlib
import json
from copy import deepcopy
from typing import Any

import pytest
from celery import current_app

from agents import tasks
from config.server import messages
from config.server.messages import InvalidMessage
from tests.agents.conftest import Broker, _celery, broker  # noqa: F401
from tests.fuzz.examples import anything, tried


@pytest.fixture
def ours(redis: Any, broker: Any) -> dict[str, Any]:  # noqa: F811
    """As this house writes it."""
    tasks.execute.delay("run_1")
    return dict(json.loads(redis.lpop("agent_events:celery")))


def body(*parts: Any) -> str:
    return base64.b64encode(json.dumps(parts).encode()).decode()


def changed(message: dict[str, Any], path: str, value: Any) -> bytes:
    """With something else in one place; without it where the value is `...`."""
    message = deepcopy(message)
    *parents, last = path.split("/")
    place = message
    for name in parents:
        place = place[name]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return json.dumps(message).encode()


def test_our_own_pass(ours: dict[str, Any]) -> None:
    found = messages.task(json.dumps(ours).encode())

    assert found["headers"]["task"] == "agents.tasks.execute"
    assert found["headers"]["id"] == ours["headers"]["id"]
    assert found["body"] == ours["body"]
    assert found["properties"] == ours["properties"]


@pytest.mark.parametrize("name", [name for name in current_app.tasks if "celery" not in name])
def test_every_task_of_the_house_passes(redis: Any, broker: Any, name: str) -> None:  # noqa: F811
    task = current_app.tasks[name]
    task.delay(1 if name == "console.bulk.run" else "run_1")

    assert messages.task(redis.lpop("agent_events:celery"))


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"garbage",
        b"\xff\xfe",
        b"null",
        b"7",
        b"[]",
        b'"text"',
        b"{}",
        b"[" * 5000,
        b"1" * 5000,
    ],
)
def test_what_is_no_message(raw: bytes) -> None:
    for check in (messages.message, messages.task, messages.command, messages.unacknowledged):
        with pytest.raises(InvalidMessage):
            check(raw)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("headers", ...),
        ("headers", []),
        ("headers/task", ...),
        ("headers/task", "agents.tasks.unknown"),
        ("headers/task", ["agents.tasks.execute"]),
        ("headers/id", ...),
        ("headers/id", {}),
        ("headers/id", "x" * 300),
        ("headers/compression", "bzip2"),
        ("properties", ...),
        ("properties/delivery_tag", ...),
        ("properties/delivery_tag", []),
        ("properties/delivery_info", ...),
        ("properties/delivery_info", {"exchange": 1, "routing_key": "x"}),
        ("properties/delivery_info", {"exchange": "x"}),
        ("properties/body_encoding", "rot13"),
        ("properties/reply_to", {}),
        ("content-type", "application/x-python-serialize"),
        ("content-encoding", "utf-17"),
        ("body", ...),
        ("body", "not base64!"),
        ("body", base64.b64encode(b"not JSON").decode()),
        ("body", body()),
        ("body", body({}, {}, {})),
        ("body", body([], {}, {})),
        ("body", body(["run_1", "run_2"], {}, {})),
        ("body", body(["run_1"], {"other": 1}, {})),
        ("body", body(["run_1"], [], {})),
        ("body", body([["run_1"]], {}, {})),
        ("body", body(["run\u0000"], {}, {})),
        ("body", body(["run_1"], {}, {"chain": [{"task": "x"}]})),
        ("body", "eA==" * 100_000),
    ],
)
def test_a_message_that_this_worker_cannot_do(ours: dict[str, Any], path: str, value: Any) -> None:
    with pytest.raises(InvalidMessage) as refused:
        messages.task(changed(ours, path, value))

    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("eta", "garbage"),
        ("expires", "garbage"),
        ("timelimit", 7),
        ("retries", "many"),
        ("stamped_headers", 7),
        ("stamps", 7),
        ("shadow", {}),
        ("argsrepr", 7),
        ("lang", "c"),
    ],
)
def test_what_nobody_here_uses_is_not_heeded(ours: dict[str, Any], header: str, value: Any) -> None:
    found = messages.task(changed(ours, f"headers/{header}", value))

    assert found["headers"].get(header) != value


@pytest.mark.parametrize("clock", [2**64 - 1, 2**53, -1, 1.5, "1", []])
def test_a_clock_that_no_later_message_could_pass(ours: dict[str, Any], clock: Any) -> None:
    """The worker would adopt it, and send answers that are refused as these are."""
    command = changed(ours, "headers/clock", clock)
    for check in (messages.message, messages.command):
        with pytest.raises(InvalidMessage, match="clock"):
            check(command)


@tried(60, found=anything)
def test_nothing_but_that_is_raised(found: Any) -> None:
    raw = json.dumps(found).encode("utf-8", "surrogatepass")
    for check in (messages.message, messages.task, messages.command, messages.unacknowledged):
        with contextlib.suppress(InvalidMessage):
            check(raw)
