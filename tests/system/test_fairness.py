"""A flood of one user and a question of another, on the real processes."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.fakes.llm import FakeLLM, Reply, held
from tests.system.stack import Stack
from tests.system.test_chat import call
from tests.system.test_matrix_stack import manage

pytestmark = pytest.mark.system

FLOOD = 80
URL = "/api/chat/messages"


def test_one_question_does_not_wait_for_a_flood_of_somebody_else(
    database: dict[str, str],
) -> None:
    settings = {"WORKER_CONCURRENCY": "5", "AGENT_USER_SHARE": "80", **database}
    with FakeLLM() as llm, Stack(llm.url, **settings) as stack:
        llm.reset()
        all_asked = threading.Event()
        llm.default = held(Reply("Well.", latency=0.3), all_asked)
        token = manage(stack, "realm_token", "@bob:localhost", "--create").stdout.strip()

        def ask(number: int) -> Any:
            return call(stack, "POST", URL, {"content": f"flood {number}"})[0]

        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(ask, range(FLOOD))) == {202}
        begun = len(llm.requests)
        assert begun < FLOOD / 2
        headers = {"authorization": f"Bearer {token}"}
        status, told = call(stack, "POST", URL, {"content": "one"}, **headers)
        assert status == 202, told
        all_asked.set()

        def ended() -> bool:
            _, answer = call(stack, "GET", f"/api/chat/runs/{told['runId']}", **headers)
            return bool(answer["run"]["status"] == "completed")

        stack.wait("an answer", ended)
        order = [each.last_user for each in llm.requests]
        place = order.index("one")
        # Behind what was handed over already, and what was begun while it was on its way.
        assert place <= begun + 20
        stack.wait("the flood to be answered", lambda: len(llm.requests) > FLOOD, 180)
        asked = [each.last_user for each in llm.requests]
        assert len(set(asked)) == len(asked) == FLOOD + 1
