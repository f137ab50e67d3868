"""The second document's path on the real processes: web server, Redis, worker, model endpoint."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from http.cookiejar import CookieJar
from typing import Any
from urllib.parse import urlencode
from urllib.request import HTTPCookieProcessor, Request, build_opener

import pytest

from tests.fakes.llm import Call, Failure, FakeLLM, Reply, held
from tests.system.stack import Stack

pytestmark = pytest.mark.system


def call(stack: Stack, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", stack.port, timeout=60)
    try:
        raw = None if body is None else json.dumps(body)
        connection.request(method, path, raw, headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def ask(stack: Stack, content: str, **extra: str) -> dict[str, Any]:
    status, told = call(stack, "POST", "/api/chat/messages", {"content": content, **extra})
    assert status == 202, told
    return dict(told)


def run_of(stack: Stack, run_id: str) -> dict[str, Any]:
    return dict(call(stack, "GET", f"/api/chat/runs/{run_id}")[1]["run"])


def finished(stack: Stack, run_id: str, seconds: float = 180) -> dict[str, Any]:
    def look() -> dict[str, Any] | None:
        run = run_of(stack, run_id)
        return run if run["status"] in {"completed", "failed", "cancelled"} else None

    run = stack.wait(f"{run_id} to end", look, seconds)
    assert run
    return run


def history(stack: Stack, thread_id: str) -> list[str]:
    _, told = call(stack, "GET", f"/api/chat/threads/{thread_id}/messages")
    return [message["content"] for message in told["messages"]]


def told_on_stream(stack: Stack, run_id: str) -> list[str]:
    """Return the types of a run's events, in order."""
    with stack.redis as redis:
        entries = [fields[b"event"] for _, fields in redis.xrange("agent_events")]
    events = [json.loads(raw) for raw in entries if raw.startswith(b"{")]
    return [event["type"] for event in events if event["payload"].get("runId") == run_id]


def told_once(stack: Stack, run_id: str) -> list[str]:
    """As `told_on_stream`, once the outcome has been told: that is after it was written down."""

    def look() -> list[str]:
        told = told_on_stream(stack, run_id)
        return told if "agent.run.completed" in told else []

    return stack.wait("the outcome to be told", look)


def test_the_documents_curl_word_for_word(stack: Stack) -> None:
    command = f"""
curl -X POST http://localhost:{stack.port}/api/chat/messages \\
  -H "content-type: application/json" \\
  -d '{{"content":"Summarize current state", "model":"gpt-4o-mini"}}'
"""
    output = subprocess.run(
        command, shell=True, capture_output=True, text=True, timeout=120, check=True
    ).stdout
    told = json.loads(output)

    assert told["status"] == "accepted"
    run = finished(stack, told["runId"])
    assert run["status"] == "completed"
    assert run["output"] == "Answer to: Summarize current state"
    assert run["usage"]["totalTokens"] > 0
    assert history(stack, told["threadId"]) == ["Summarize current state", run["output"]]
    assert told_once(stack, told["runId"]) == ["agent.run.requested", "agent.run.completed"]


def test_waiting_for_the_outcome(stack: Stack) -> None:
    status, told = call(stack, "POST", "/api/chat/messages", {"content": "Hi"}, Prefer="wait=55")

    assert status == 200
    assert told["status"] == told["run"]["status"] == "completed"
    assert told["run"]["output"] == "Answer to: Hi"


def test_a_wait_that_is_too_short_is_no_error(stack: Stack, llm: FakeLLM) -> None:
    may_go_on = threading.Event()
    llm.script(held(Reply("Late"), may_go_on))

    status, told = call(stack, "POST", "/api/chat/messages", {"content": "Hi"}, Prefer="wait=1")

    may_go_on.set()
    assert (status, told["status"]) == (202, "accepted")
    assert finished(stack, told["runId"])["output"] == "Late"


def test_quick_messages_are_answered_one_by_one_each_with_its_own_answer(
    stack: Stack, llm: FakeLLM
) -> None:
    llm.default = lambda call: Reply(f"Answer to: {call.last_user}", latency=0.1)
    first = ask(stack, "message 0")
    # So few that no summary is due after them: the call for it would be taken for one of the next test.
    told = [first] + [ask(stack, f"message {n}", threadId=first["threadId"]) for n in range(1, 3)]
    for one in told:
        finished(stack, one["runId"])

    expected = [text for n in range(3) for text in (f"message {n}", f"Answer to: message {n}")]
    assert history(stack, first["threadId"]) == expected
    asked = [c for c in llm.requests if c.last_user.startswith("message")]
    assert [len(c.messages) for c in asked] == [1, 3, 5]


def test_an_attempt_that_fails_is_repeated(stack: Stack, llm: FakeLLM) -> None:
    llm.script(Failure(429, retry_after=1), Failure(500))

    run = finished(stack, ask(stack, "Hi")["runId"])

    assert run["output"] == "Answer to: Hi"
    assert [c.last_user for c in llm.requests] == ["Hi"] * 3


def test_a_request_of_another_program_is_answered(stack: Stack) -> None:
    run_id = f"other-{uuid.uuid4()}"
    event = {
        "id": str(uuid.uuid4()),
        "type": "agent.run.requested",
        "timestamp": "2026-01-01T00:00:00Z",
        "correlationId": "other-1",
        "payload": {"runId": run_id, "prompt": "Hi from outside"},
    }
    with stack.redis as redis:
        redis.xadd("agent_events", {"event": json.dumps(event)})
        redis.xadd("agent_events", {"event": "nonsense"})
        stack.wait("its outcome", lambda: "agent.run.completed" in told_on_stream(stack, run_id))
        stack.wait("the other", lambda: redis.xlen("agent_events:dead"))
        assert redis.xrevrange("agent_events:dead", count=1)[0][1][b"event"] == b"nonsense"
    assert finished(stack, run_id)["output"] == "Answer to: Hi from outside"


def test_a_killed_workers_run_is_completed_once(stack: Stack, llm: FakeLLM) -> None:
    llm.script(Reply("never finished", latency=60))
    told = ask(stack, "Hi")
    llm.wait_for_requests()
    started = time.monotonic()
    stack.kill("worker")

    run = finished(stack, told["runId"])

    assert run["output"] == "Answer to: Hi"
    assert history(stack, told["threadId"]) == ["Hi", "Answer to: Hi"]
    assert told_once(stack, told["runId"]).count("agent.run.completed") == 1
    assert time.monotonic() - started < 60
    assert len(llm.requests) == 2


def test_a_worker_that_stood_still_writes_nothing_late(stack: Stack, llm: FakeLLM) -> None:
    # Whichever of its threads wakes first: the one with the answer, or the heartbeat's.
    refused = re.compile(r"\(fenced\)|Run stopped")
    before = len(refused.findall(stack.log()))
    may_go_on = threading.Event()
    llm.script(held(Reply("too late"), may_go_on))
    told = ask(stack, "Hi")
    llm.wait_for_requests()
    frozen = stack.freeze("worker")
    may_go_on.set()
    second = start_worker(stack)
    try:
        run = finished(stack, told["runId"])
        os.kill(frozen, signal.SIGCONT)
        stack.wait(
            "the late outcome to be refused",
            lambda: len(refused.findall(stack.log())) > before,
        )
    finally:
        os.kill(frozen, signal.SIGCONT)
        second.terminate()
        second.wait(timeout=90)

    assert run["output"] == "Answer to: Hi"
    assert history(stack, told["threadId"]) == ["Hi", "Answer to: Hi"]
    assert told_once(stack, told["runId"]).count("agent.run.completed") == 1


def start_worker(stack: Stack, **env: str) -> subprocess.Popen[bytes]:
    """One more that reads: before that a signal ends it as it would any Python."""
    log = stack.directory / f"worker-{uuid.uuid4().hex}.log"
    with log.open("wb") as output:
        worker = subprocess.Popen(
            [sys.executable, "-m", "celery", "--quiet", "-A", "config", "worker"],
            env=stack.env | {"REDIS_URL": stack.redis_url} | env,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        stack.wait(
            "one more worker", lambda: f"worker-{worker.pid} consumes" in log.read_text(), 180
        )
    except BaseException:
        worker.kill()
        worker.wait()
        raise
    return worker


def test_redis_may_be_wiped_at_any_moment(stack: Stack, llm: FakeLLM) -> None:
    llm.default = lambda call: Reply(f"Answer to: {call.last_user}", latency=0.3)
    with stack.redis as redis:
        told = []
        for number in range(12):
            told.append(ask(stack, f"message {number}"))
            if number % 3 == 0:
                redis.flushall()
    for one in told:
        assert finished(stack, one["runId"])["status"] == "completed"


def test_redis_may_be_killed(stack: Stack) -> None:
    old = stack.kill("redis")
    during = [ask(stack, f"message {number}") for number in range(3)]
    stack.wait_restarted("redis", old)

    for one in during:
        assert finished(stack, one["runId"])["status"] == "completed"


def test_a_redis_that_swallows_everything_does_not_slow_the_requester(stack: Stack) -> None:
    finished(stack, ask(stack, "warm up")["runId"])
    redis_pid = stack.kill("redis", signal.SIGSTOP)
    try:
        took, asked = [], []
        for _ in range(10):
            started = time.monotonic()
            asked.append(ask(stack, "Is anybody there?"))
            took.append(time.monotonic() - started)
    finally:
        os.kill(redis_pid, signal.SIGCONT)

    # Each web process finds out once, and a busy machine is slow at times.
    assert max(took) < 10
    assert sorted(took)[2] < 0.5
    for told in asked:
        assert finished(stack, told["runId"])["status"] == "completed"


def test_many_at_once_are_all_answered(stack: Stack, llm: FakeLLM) -> None:
    told: list[dict[str, Any]] = []

    def client() -> None:
        told.extend(ask(stack, f"message {n}") for n in range(10))

    clients = [threading.Thread(target=client) for _ in range(8)]
    for one in clients:
        one.start()
    for one in clients:
        one.join(timeout=180)

    assert len(told) == 80
    for one in told:
        assert finished(stack, one["runId"])["status"] == "completed"
    assert len(llm.requests) == 80


def test_the_admin_shows_the_run(stack: Stack, llm: FakeLLM) -> None:
    told = ask(stack, "Can you be seen?")
    finished(stack, told["runId"])
    password = (stack.directory / "admin-password").read_text().strip()
    browser = build_opener(HTTPCookieProcessor(jar := CookieJar()))
    login = f"{stack.url}/admin/login/?next=/admin/"
    browser.open(login, timeout=60)
    token = next(c.value for c in jar if c.name == "csrftoken")
    form = {"username": "admin", "password": password, "csrfmiddlewaretoken": token}
    browser.open(Request(login, urlencode(form).encode(), {"Referer": login}), timeout=60)

    page = browser.open(f"{stack.url}/admin/agents/run/{told['runId']}/change/", timeout=60)
    text = page.read().decode()

    assert "Can you be seen?" in text
    assert "Answer to: Can you be seen?" in text
    assert "agent.run.completed" in text


def test_a_redis_that_refuses_what_it_is_told_ends_no_worker(stack: Stack) -> None:
    """As one does that is full, or that has become a replica."""
    worker, waits = stack.pid("worker"), "Redis refuses to write"
    before = stack.log().count(waits)
    with stack.redis as redis:
        redis.config_set("min-replicas-to-write", 1)
        told = ask(stack, "Hi")
        stack.wait("the worker to wait", lambda: stack.log().count(waits) > before)
        redis.config_set("min-replicas-to-write", 0)

    assert finished(stack, told["runId"])["status"] == "completed"
    assert stack.pid("worker") == worker


def test_what_dies_is_started_again(stack: Stack) -> None:
    for name in ("web", "worker", "redis"):
        old = stack.kill(name)
        stack.wait_restarted(name, old)
    stack.wait_ready()

    assert finished(stack, ask(stack, "Still there?")["runId"])["status"] == "completed"


def test_secrets_and_words_do_not_reach_the_log(stack: Stack, llm: FakeLLM) -> None:
    llm.script(Failure(401, message="Incorrect API key provided: sk-test"), Reply("canary-answer"))
    finished(stack, ask(stack, "canary-question")["runId"])
    finished(stack, ask(stack, "canary-question")["runId"])
    log = stack.log()

    for secret in ("sk-test", "canary-question", "canary-answer", stack.env["SECRET_KEY"]):
        assert secret not in log


def test_each_line_about_a_run_carries_its_ids(stack: Stack) -> None:
    told = ask(stack, "Hi", correlationId="find-me-4711")
    finished(stack, told["runId"])
    lines = stack.wait(
        "the line", lambda: [n for n in stack.log().splitlines() if "find-me-4711" in n]
    )

    line = json.loads(lines[0].partition(" | ")[2])
    assert (line["run"], line["thread"]) == (told["runId"], told["threadId"])


def test_summaries_are_made_behind_the_answers(stack: Stack, llm: FakeLLM) -> None:
    def talk(call: Call) -> Reply:
        return Reply("They talked.") if "You keep the memory" in call.last_user else Reply()

    llm.default = talk
    thread_id = ask(stack, "message 0")["threadId"]
    for number in range(1, 7):
        run_id = ask(stack, f"message {number}", threadId=thread_id)["runId"]
        finished(stack, run_id)

    def told_in_short() -> bool:
        last = [c for c in llm.requests if "You keep the memory" not in c.last_user][-1]
        [first, *_] = [each["content"] for each in last.messages if each["role"] == "user"]
        return "<summary>\nThey talked.\n</summary>" in first

    # It is made beside the next question, which may be asked before.
    while not told_in_short():
        number += 1
        assert number < 30, "No summary was sent."
        finished(stack, ask(stack, f"message {number}", threadId=thread_id)["runId"])
