"""A flood of one user and a question of another, on the real processes."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.fakes.llm import FakeLLM, Reply
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
        llm.default = Reply("Well.", latency=0.3)
        token = manage(stack, "realm_token", "@bob:localhost", "--create").stdout.strip()

        def ask(number: int) -> Any:
            return call(stack, "POST", URL, {"content": f"flood {number}"})[0]

        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(ask, range(FLOOD))) == {202}
        begun = len(llm.requests)
        assert begun < FLOOD / 2
        status, answer = call(
            stack,
            "POST",
            URL,
            {"content": "one"},
            authorization=f"Bearer {token}",
            prefer="wait=60",
        )
        assert (status, answer["status"]) == (200, "completed")
        order = [each.last_user for each in llm.requests]
        place = order.index("one")
        # Behind what was handed over already, and what was begun while it was on its way.
        assert place <= begun + 20
        stack.wait("the flood to be answered", lambda: len(llm.requests) > FLOOD, 60)
        asked = [each.last_user for each in llm.requests]
        assert len(set(asked)) == len(asked) == FLOOD + 1
