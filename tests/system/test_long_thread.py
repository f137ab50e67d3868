"""A thread of thirty messages at a model whose chat template refuses lists that are out of order."""

import subprocess
import sys
import threading
from typing import Any

import pytest

from tests.fakes.llm import Call, Failure, FakeLLM, Reply, SmallContext, Strict, held
from tests.system.stack import Stack
from tests.system.test_chat import ask, call, finished

pytestmark = pytest.mark.system

MESSAGES = 30
REDACT = "from agents.runs import corrections; corrections.redact([{run!r}])"


def is_summary(call: Call) -> bool:
    return call.last_user.startswith("You keep the memory")


class Model:
    """Refuses every fifth message, and answers every sixth until it is cancelled."""

    def __init__(self) -> None:
        self.never = threading.Event()

    def __call__(self, call: Call) -> Any:
        if is_summary(call):
            return Reply("They counted.")
        number = int(call.last_user.rpartition(" ")[2])
        if number % 5 == 3:
            return Failure(400)
        if number % 6 == 4:
            return held(Reply(delta_latency=0.01), self.never, 5)
        return Reply("  \n" if number == 7 else f"Number {number}.")


def redact(stack: Stack, run_id: str) -> None:
    subprocess.run(
        [sys.executable, "manage.py", "shell", "-v", "0", "-c", REDACT.format(run=run_id)],
        env=stack.env,
        check=True,
        timeout=60,
    )


def test_all_that_can_be_answered_is_answered(stack: Stack, llm: FakeLLM) -> None:
    model = Model()
    llm.default = Strict(SmallContext(100_000, model))
    thread: dict[str, str] = {}
    redacted_after = 0
    ends = {}
    for number in range(MESSAGES):
        told = ask(stack, f"secret{number}x message {number}", **thread)
        thread = {"threadId": told["threadId"]}
        if number % 6 == 4 and number % 5 != 3:
            wanted = f"message {number}"
            stack.wait("the answer", lambda w=wanted: llm.requests[-1].last_user.endswith(w))
            call(stack, "POST", f"/api/chat/runs/{told['runId']}/cancel")
        if number == 7:  # an answer of white space is tried again, until it is cancelled
            call(stack, "POST", f"/api/chat/runs/{told['runId']}/cancel")
        ends[number] = finished(stack, told["runId"])["status"]
        if number == 11:
            redact(stack, told["runId"])
            redacted_after = len(llm.requests)

    for number, status in ends.items():
        if number % 5 == 3:
            assert status == "failed", number
        elif number % 6 == 4 or number == 7:
            assert status == "cancelled", number
        else:
            assert status == "completed", number
    later = llm.requests[redacted_after:]
    assert len(later) > 15
    assert "secret11x" not in str([each.messages for each in later])
    assert any(is_summary(each) for each in later)
