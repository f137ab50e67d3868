"""What SIGTERM costs: nothing that was accepted, and no more time than the grace."""

import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.fakes.llm import FakeLLM, Reply, held
from tests.system.stack import Stack
from tests.system.test_chat import ask, call, finished, start_worker

pytestmark = pytest.mark.system
GRACE, LEASE = 12, 120


@pytest.fixture(scope="module")
def llm() -> Iterator[FakeLLM]:
    with FakeLLM() as server:
        yield server


@pytest.fixture(scope="module")
def running(llm: FakeLLM, database: dict[str, str]) -> Iterator[Stack]:
    # A second attempt that counted would fail the run; a lease that had to lapse, the test.
    limits = {
        "AGENT_MAX_ATTEMPTS": "1",
        "AGENT_LEASE_SECONDS": str(LEASE),
        "WORKER_GRACE_SECONDS": str(GRACE),
    }
    with Stack(llm.url, **limits, **database) as stack:
        yield stack


@pytest.fixture
def stack(running: Stack, llm: FakeLLM) -> Stack:
    llm.reset()
    running.wait_ready()
    return running


def test_a_worker_that_is_told_to_stop_finishes_what_it_has_in_hand(
    stack: Stack, llm: FakeLLM
) -> None:
    llm.script(Reply("just in time", latency=2))
    told = ask(stack, "Hi")
    llm.wait_for_requests()
    old = stack.kill("worker", signal.SIGTERM)

    assert finished(stack, told["runId"])["output"] == "just in time"
    stack.wait_restarted("worker", old)
    assert len(llm.requests) == 1
    assert "Released" not in stack.log()


def test_what_takes_longer_than_the_grace_is_handed_to_another_worker(
    stack: Stack, llm: FakeLLM
) -> None:
    llm.script(Reply("never heard", latency=120))
    told = ask(stack, "Hi")
    llm.wait_for_requests()
    second = start_worker(stack)
    try:
        started = time.monotonic()
        old = stack.kill("worker", signal.SIGTERM)
        run = finished(stack, told["runId"])
        took = time.monotonic() - started
        stack.wait_restarted("worker", old)
    finally:
        second.terminate()
        assert second.wait(timeout=90) == 0

    assert (run["status"], run["output"]) == ("completed", "Answer to: Hi")
    assert GRACE <= took < LEASE / 2
    assert len(llm.requests) == 2
    # What it says comes through a pipe.
    stack.wait("word of it", lambda: "Released 1 runs" in stack.log())
    stack.wait("the exit", lambda: "exit status 0" in stack.log())


def test_a_worker_without_work_stops_at_once(stack: Stack) -> None:
    worker = start_worker(stack, WORKER_GRACE_SECONDS="600")
    try:
        worker.terminate()

        assert worker.wait(timeout=90) == 0
    finally:
        worker.kill()
        worker.wait()


def test_a_web_server_that_is_told_to_stop_answers_what_it_was_asked(
    stack: Stack, llm: FakeLLM
) -> None:
    may_go_on = threading.Event()
    llm.script(held(Reply("worth waiting for"), may_go_on))
    answers: list[Any] = []

    def post() -> None:
        answers.append(
            call(stack, "POST", "/api/chat/messages", {"content": "Hi"}, Prefer="wait=55")
        )

    requester = threading.Thread(target=post)
    requester.start()
    llm.wait_for_requests()
    old = stack.kill("web", signal.SIGTERM)
    time.sleep(0.5)  # of the three seconds that it has: until the signal is through
    may_go_on.set()
    requester.join(timeout=120)
    stack.wait_restarted("web", old)

    [(status, told)] = answers
    assert (status, told["run"]["output"]) == (200, "worth waiting for")
