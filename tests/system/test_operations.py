"""What an operator sees of the real processes: two of the web server, one worker."""

import http.client
import json
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.fakes.llm import FakeLLM
from tests.system.stack import Stack

pytestmark = pytest.mark.system

SAID = "canary-words-of-a-person"


@pytest.fixture(scope="module")
def stack(database: dict[str, str]) -> Iterator[Stack]:
    with FakeLLM() as llm, Stack(llm.url, DEBUG="true", LOG_FORMAT="json", **database) as stack:
        yield stack


def get(stack: Stack, path: str, **headers: str) -> tuple[int, str]:
    """By a connection of its own: the next one may come to another process."""
    connection = http.client.HTTPConnection("127.0.0.1", stack.port, timeout=90)
    try:
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def samples(stack: Stack) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    status, text = get(stack, "/metrics")
    assert status == 200
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(stack: Stack, name: str, **labels: str) -> float:
    return samples(stack).get((name, frozenset(labels.items())), 0.0)


def deep(stack: Stack) -> dict[str, Any]:
    status, text = get(stack, "/healthz/deep")
    return {"status": status, **json.loads(text)["checks"]}


def test_the_probes_of_a_sound_system(stack: Stack) -> None:
    assert get(stack, "/healthz", Host="10.0.0.7:8000")[0] == 200
    assert get(stack, "/readyz", Host="10.0.0.7:8000")[0] == 200
    stack.wait("the worker to be seen", lambda: deep(stack)["status"] == 200)


def test_requests_of_all_web_processes_are_counted_together(stack: Stack) -> None:
    labels = {"method": "GET", "route": "/api/chat/models"}
    before = value(stack, "botrealm_http_requests_total", status="200", **labels)
    for _ in range(40):
        assert get(stack, "/api/chat/models")[0] == 200

    def counted() -> float:
        return value(stack, "botrealm_http_requests_total", status="200", **labels) - before

    # A request is counted after it was answered.
    stack.wait("all to be counted", lambda: counted() >= 40)
    told = [value(stack, "botrealm_http_requests_total", status="200", **labels) for _ in range(6)]

    assert [each - before for each in told] == [40] * 6
    assert value(stack, "botrealm_http_request_seconds_count", **labels) == 40


def test_from_outside_the_figures_are_not_to_be_had(stack: Stack) -> None:
    # As a proxy on this host passes it on.
    for path in ("/metrics", "/healthz/deep"):
        assert get(stack, path, **{"X-Forwarded-For": "203.0.113.9"})[0] == 403


def test_a_question_can_be_followed_by_its_id(stack: Stack) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", stack.port, timeout=90)
    headers = {"X-Request-ID": "r-canary-1", "Prefer": "wait=55"}
    connection.request("POST", "/api/chat/messages", json.dumps({"content": SAID}), headers)
    response = connection.getresponse()
    run = json.loads(response.read())["run"]
    connection.close()

    assert response.headers["X-Request-ID"] == "r-canary-1"
    assert run["status"] == "completed"

    def lines() -> dict[str, dict[str, Any]]:
        found = [
            line[line.find("{") :] for line in stack.log().splitlines() if "r-canary-1" in line
        ]
        return {told["message"]: told for told in map(json.loads, found)}

    def both() -> dict[str, dict[str, Any]] | None:
        with suppress(ValueError):  # half a line so far
            return told if len(told := lines()) == 2 else None
        return None

    told = stack.wait("both lines", both)
    assert told
    assert told["Request"]["route"] == "/api/chat/messages"
    assert told["Run completed"]["run"] == run["id"]
    assert SAID not in stack.log()
    outcome = {"model": "gpt-4o-mini", "source": "http", "status": "completed"}
    stack.wait("it to be counted", lambda: value(stack, "botrealm_runs_total", **outcome))


def test_a_worker_that_is_stopped_is_gone_and_one_that_is_killed_is_missed(stack: Stack) -> None:
    def alive() -> int:
        return int(deep(stack)["workers"].get("alive", 0))

    stack.wait("the worker to be seen", lambda: alive() == 1)
    with stack._supervisor() as supervisor:
        supervisor.stopProcess("worker")  # by a SIGTERM; a successor might come too soon to tell
        stack.wait("its row to go", lambda: alive() == 0)
        supervisor.startProcess("worker", False)
    stack.wait("its successor to be seen", lambda: alive() == 1, 180)
    new = stack.freeze("worker")  # there, and doing nothing
    try:
        stack.wait("it to be missed", lambda: deep(stack)["status"] == 503, 90)
    finally:
        os.kill(new, signal.SIGCONT)
    stack.wait("it to be back", lambda: deep(stack)["status"] == 200, 90)
