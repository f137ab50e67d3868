"""The checker sees what it is there to see."""

import sqlite3
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from tests.fakes.llm import Call
from tests.faults.client import Asked, Request
from tests.faults.invariants import Allowed, Violated, check

TABLES = """
CREATE TABLE agents_run (id, thread_id, position, status, attempt, attempt_base DEFAULT 0,
    error_code DEFAULT '', message_id, answer_id, retries DEFAULT 0, lease_expires_at);
CREATE TABLE chat_message (id INTEGER PRIMARY KEY, thread_id, position, content);
CREATE TABLE agents_attempt (id INTEGER PRIMARY KEY, run_id, number, result);
CREATE TABLE agents_event (id INTEGER PRIMARY KEY, run_id, type, published_at DEFAULT 'then');
"""
FIRST = """
INSERT INTO chat_message VALUES (1, 't', 0, 'q0'), (2, 't', 1, 'Answer to: q0');
INSERT INTO agents_run (id, thread_id, position, status, attempt, message_id, answer_id)
    VALUES ('r0', 't', 0, 'completed', 1, 1, 2);
INSERT INTO agents_attempt VALUES (1, 'r0', 1, 'completed');
INSERT INTO agents_event (run_id, type) VALUES ('r0', 'agent.run.completed');
"""
SECOND = """
INSERT INTO chat_message VALUES (3, 't', 2, 'q1'), (4, 't', 3, 'Answer to: q1');
INSERT INTO agents_run (id, thread_id, position, status, attempt, message_id, answer_id)
    VALUES ('r1', 't', 2, 'completed', 1, 3, 4);
INSERT INTO agents_attempt VALUES (2, 'r1', 1, 'completed');
INSERT INTO agents_event (run_id, type) VALUES ('r1', 'agent.run.completed');
"""


def called(*said: str) -> Call:
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(said)]
    return Call("POST", "/v1/chat/completions", {}, {"messages": messages}, 0.0)


@pytest.fixture
def database() -> Any:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.executescript(TABLES + FIRST + SECOND)
    yield connection
    connection.close()


@pytest.fixture
def plant(database: sqlite3.Connection) -> SimpleNamespace:
    """Two questions of a thread, answered as they should be."""
    return SimpleNamespace(
        vendor="sqlite",
        recovery=0.0,
        database=SimpleNamespace(rows=lambda query: database.execute(query).fetchall()),
        client=SimpleNamespace(
            asked=[Asked("t", 0, "q0", "r0"), Asked("t", 1, "q1", "r1")],
            requests=[Request(202, 0.1, True, "", "")] * 2,
            refusals=0,
        ),
        llm=SimpleNamespace(requests=[called("q0"), called("q0", "Answer to: q0", "q1")]),
        stack=SimpleNamespace(down=list),
        endings=Counter,
    )


def violations(plant: Any, **options: Any) -> list[str]:
    try:
        return check(plant, "a scenario", **options).violations
    except Violated as violated:
        return list(violated.args[1].violations)


def test_a_system_that_holds_has_a_row_without_violations(plant: Any) -> None:
    row = check(plant, "a scenario")

    assert (row.accepted, row.outcomes, row.lost, row.duplicates, row.disorder) == (2, 2, 0, 0, 0)
    assert (row.extra_calls, row.violations) == (0, [])


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        ("DELETE FROM agents_run WHERE id = 'r1'", "I1 r1 was accepted"),
        ("UPDATE agents_run SET status = 'queued' WHERE id = 'r1'", "I1 r1 has not ended"),
        ("UPDATE chat_message SET content = 'else' WHERE id = 3", "I1 r1 has another question"),
        ("UPDATE chat_message SET content = 'else' WHERE id = 4", "I1 r1 has the answer of"),
        ("UPDATE agents_run SET status = 'failed' WHERE id = 'r1'", "I1 r1 failed"),
        (SECOND.split(";")[0].replace("3, 't', 2", "5, 't', 2").replace("4,", "6,", 1), "I2 t has"),
        (SECOND.strip().split(";")[3], "I2 r1 has 2 outcome events"),
        ("UPDATE agents_attempt SET number = 2 WHERE id = 2", "I2 r1 stands at attempt 1"),
        ("UPDATE agents_attempt SET result = 'lost' WHERE id = 2", "I2 r1 is completed"),
        ("UPDATE agents_run SET position = -2 WHERE id = 'r1'", "I3 t: r1 stands before r0"),
        ("UPDATE agents_attempt SET id = 0 WHERE id = 2", "I3 t: r1 was attempted before"),
        (
            "UPDATE agents_run SET status = 'processing', lease_expires_at = '2026-01-01'",
            "I4 r0 is processing",
        ),
        ("UPDATE agents_event SET published_at = NULL WHERE id = 2", "I5 the event 2"),
        ("UPDATE agents_run SET attempt = 7", "I6 r0 was attempted 7 times"),
    ],
)
def test_what_is_wrong_in_the_database_is_told(
    plant: Any, database: sqlite3.Connection, damage: str, expected: str
) -> None:
    database.execute(damage)

    assert any(line.startswith(expected) for line in violations(plant)), violations(plant)


def test_a_model_that_is_asked_too_often_or_knows_too_little_is_told(plant: Any) -> None:
    plant.llm.requests.append(called("q1"))

    told = violations(plant)

    assert "I6 3 calls of the model for 2 questions" in told
    assert any(line.startswith("I3 the model was asked 'q1'") for line in told)
    assert violations(plant, allowed=Allowed(extra_calls=1)) == [
        line for line in told if line.startswith("I3")
    ]


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (Request(500, 0.1, True, "", ""), "I7 status 500"),
        (Request(404, 0.1, False, "<h1>", ""), "I7 status 404: <h1>"),
        (Request(503, 0.1, True, "", "1"), "I7 status 503"),
        (Request(503, 0.1, True, "", ""), "I7 status 503: "),
        (Request(0, 0.1, False, "", ""), "I7 a connection broke"),
    ],
)
def test_a_request_that_went_wrong_is_told(plant: Any, request_: Request, expected: str) -> None:
    plant.client.requests.append(request_)

    assert any(line.startswith(expected) for line in violations(plant))


def test_slow_requests_are_told(plant: Any) -> None:
    plant.client.requests *= 0
    plant.client.requests += [Request(202, 5.0, True, "", "")] * 3

    assert violations(plant) == ["I7 p99 of the requests is 5.0 s"]


def test_programs_that_are_down_or_end_by_themselves_are_told(plant: Any) -> None:
    plant.stack.down = lambda: ["bot (FATAL)"]
    plant.endings = lambda: Counter(
        {("worker", "exit status 1"): 2, ("web", "terminated by SIGKILL"): 1}
    )

    assert violations(plant) == [
        "I9 bot (FATAL) is not running",
        "I9 worker ended by itself 2 times: exit status 1",
    ]


def test_an_answer_that_is_twice_in_a_room_is_told(plant: Any) -> None:
    assert violations(plant, answers={"$a": 1, "$b": 2}) == ["I8 $b was answered 2 times"]
