"""Streams of the real processes, while these are killed and emptied under them."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.fakes.llm import Failure, FakeLLM, Hang, Reply, held
from tests.ports import free_port
from tests.system.stack import Stack

pytestmark = pytest.mark.system

WORDS = tuple(f"word{number} " for number in range(30))
TALK = Reply(WORDS, delta_latency=0.1)


class Listener:
    """A client of a stream, over HTTP."""

    def __init__(
        self, port: int, path: str, method: str = "GET", body: Any = None, **headers: str
    ) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=90)
        raw = None if body is None else json.dumps(body)
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self._connection.request(method, path, raw, headers)
        self.response = self._connection.getresponse()
        assert self.response.status == 200, self.response.read()

    def __enter__(self) -> "Listener":
        return self

    def __exit__(self, *exc: object) -> None:
        self._connection.close()
        self.response.close()

    def __iter__(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        fields: dict[str, str] = {}
        for raw in self.response:
            line = raw.decode().rstrip("\n")
            if line:
                name, _, value = line.partition(": ")
                fields[name] = value
                continue
            if "event" in fields:
                yield fields["id"], fields["event"], json.loads(fields["data"])
            fields = {}

    def until(self, kind: str) -> list[tuple[str, str, dict[str, Any]]]:
        found = []
        for event in self:
            found.append(event)
            if event[1] == kind:
                return found
        raise AssertionError(f"The stream ended without {kind}: {found}")


def ask(stack: Stack, port: int = 0) -> Listener:
    """Ask, and listen to the answer."""
    body = {"content": "Talk"}
    return Listener(
        port or stack.port, "/api/chat/messages", "POST", body, accept="text/event-stream"
    )


def cancel(stack: Stack, run_id: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", stack.port, timeout=60)
    connection.request("POST", f"/api/chat/runs/{run_id}/cancel")
    assert connection.getresponse().status == 202
    connection.close()


def text_of(events: list[tuple[str, str, dict[str, Any]]]) -> str:
    return "".join(data["text"] for _, kind, data in events if kind == "message.delta")


@contextlib.contextmanager
def second_web(stack: Stack) -> Iterator[int]:
    port = free_port()
    command = f"-m uvicorn config.asgi:application --port {port} --lifespan off --ws none"
    process = subprocess.Popen(
        [sys.executable, *command.split()],
        env=stack.env | {"REDIS_URL": stack.redis_url, "HTTPS": "false"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:

        def answers() -> bool:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=5).close()
            except OSError:
                return False
            return True

        stack.wait("the second web server", answers, 180)
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) in (0, -signal.SIGTERM)


def test_tokens_come_through_both_ports_and_go_on_in_another_process(
    stack: Stack, llm: FakeLLM
) -> None:
    llm.script(TALK)
    with second_web(stack) as other:
        with ask(stack, stack.realm_port) as listener:
            seen = listener.until("message.delta")
            run_id = seen[0][2]["runId"]
        for port in (other, stack.port, other):
            path = f"/api/chat/runs/{run_id}/events"
            with Listener(port, path, last_event_id=seen[-1][0]) as listener:
                seen += listener.until("message.delta")
        with Listener(other, path, last_event_id=seen[-1][0]) as listener:
            seen += listener.until("run.completed")
    assert text_of(seen) == "".join(WORDS) == seen[-1][2]["run"]["output"]
    assert [event[0] for event in seen[1:-1]] == [f"1-{n}" for n in range(1, len(seen) - 1)]


def test_a_killed_workers_tokens_are_taken_back(stack: Stack, llm: FakeLLM) -> None:
    llm.script(Hang(4), TALK)
    with ask(stack) as listener:
        seen = listener.until("message.delta")
        old = stack.kill("worker")
        seen += listener.until("run.completed")
    stack.wait_restarted("worker", old)
    again = next(n for n, event in enumerate(seen) if event[0] == "2-1")
    assert seen[again][1:] == ("run.status", {"status": "processing", "attempt": 2})
    assert text_of(seen[again:]) == "".join(WORDS) == seen[-1][2]["run"]["output"]


def test_redis_forgets_everything_in_the_middle(stack: Stack, llm: FakeLLM) -> None:
    may_go_on = threading.Event()
    llm.script(held(TALK, may_go_on, 21))
    with ask(stack) as listener:
        seen = listener.until("message.delta")
        run_id = seen[0][2]["runId"]
        stack.redis.flushall()
        may_go_on.set()
        seen += listener.until("message.delta")
        path = f"/api/chat/runs/{run_id}/events"
        # Who did not listen the whole time is told what it cannot have any more.
        with Listener(stack.port, path, last_event_id="1-1") as late:
            told = late.until("run.completed")
        seen += listener.until("run.completed")
    assert text_of(seen) == "".join(WORDS) == seen[-1][2]["run"]["output"]
    assert told[0][1] == "gap"
    assert told[0][2]["from"] == "1-2"
    assert told[-1][2]["run"]["output"] == "".join(WORDS)


def test_redis_dies_in_the_middle(stack: Stack, llm: FakeLLM) -> None:
    llm.script(TALK)
    with ask(stack) as listener:
        listener.until("message.delta")
        old = stack.kill("redis")
        told = listener.until("run.completed")
    stack.wait_restarted("redis", old)
    assert told[-1][2]["run"]["output"] == "".join(WORDS)


def test_a_web_server_that_stops_ends_its_streams(stack: Stack, llm: FakeLLM) -> None:
    may_go_on = threading.Event()
    llm.script(held(TALK, may_go_on, 21))
    with ask(stack) as listener:
        seen = listener.until("message.delta")
        run_id = seen[0][2]["runId"]
        old = stack.kill("web", signal.SIGTERM)
        # It ends as a response should, and not in the middle of a chunk, as after the grace.
        seen += list(listener)
    may_go_on.set()
    stack.wait_restarted("web", old)
    stack.wait_ready()
    with Listener(
        stack.port, f"/api/chat/runs/{run_id}/events", last_event_id=seen[-1][0]
    ) as listener:
        seen += listener.until("run.completed")
    assert text_of(seen) == "".join(WORDS)


def test_a_cancel_frees_the_worker_between_two_tokens(stack: Stack, llm: FakeLLM) -> None:
    def seconds() -> float:
        llm.reset()
        llm.script(Hang(4))
        with ask(stack) as listener:
            run_id = listener.until("message.delta")[0][2]["runId"]
            began = time.monotonic()
            cancel(stack, run_id)
            listener.until("run.cancelled")
            llm.wait_for_disconnects()
            return time.monotonic() - began

    # A busy machine is slow at times, but not each time.
    assert any(seconds() < 1 for _ in range(5))


def test_listeners_that_vanish_leave_nothing_behind(stack: Stack, llm: FakeLLM) -> None:
    llm.script(Hang(2))
    with ask(stack) as listener:
        run_id = listener.until("message.delta")[0][2]["runId"]
        pids = stack.processes()["web"]
        before = sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)
        path = f"/api/chat/runs/{run_id}/events"
        with contextlib.ExitStack() as crowd:
            for _ in range(50):
                crowd.enter_context(Listener(stack.port, path))

        def freed() -> bool:
            return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids) <= before + 20

        stack.wait("the connections to be freed", freed, 10)
    cancel(stack, run_id)


def test_the_same_conversation_in_a_terminal(stack: Stack, llm: FakeLLM) -> None:
    separated = Reply(("Here\u2028and", " there\x1b[2J.\u202e"))
    llm.script(TALK, Failure(503), separated)

    def chat(question: str, *options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "manage.py", "chat", *options]
        return subprocess.run(
            command, input=question, env=stack.env, capture_output=True, text=True, timeout=180
        )

    done = chat("Talk\nAgain\n", "--thread", "terminal-1", "--model", "gpt-4o-mini")

    assert done.returncode == 0, done.stderr
    first, retry, *rest = done.stdout.splitlines()
    assert first == "".join(WORDS)
    assert re.fullmatch(r"\(The model is not available\. Trying again after .*\)", retry)
    assert rest == ["Here", "and there\ufffd[2J.\ufffd"]
    assert "terminal-1" in done.stderr
    assert [call.last_user for call in llm.requests] == ["Talk", "Again", "Again"]

    refused = chat("x\n", "--thread", "no such id")
    assert refused.returncode == 1
    assert "threadId" in refused.stderr


def test_a_terminal_goes_on_when_the_web_server_is_replaced(stack: Stack, llm: FakeLLM) -> None:
    llm.script(TALK)
    command = [sys.executable, "manage.py", "chat", "--url", stack.url]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=stack.env, text=True
    ) as chat:
        assert chat.stdin
        assert chat.stdout
        chat.stdin.write("Talk\n")
        chat.stdin.close()
        said = chat.stdout.read(12)
        old = stack.kill("web", signal.SIGTERM)
        said += chat.stdout.read()
    stack.wait_restarted("web", old)
    assert said == "".join(WORDS) + "\n"
