"""The answers of model servers in the form in which tests use them."""

import json
from typing import Any

import pytest

from tests.fakes.llm import Raw
from tests.fakes.servers import ANSWER, answer, answers, servers

CASES = [(server, case) for server in servers() for case in answers(server)]


def test_each_server_is_there() -> None:
    assert {"llamacpp", "litellm", "transformers", "vllm"} <= set(servers())


@pytest.mark.parametrize(("server", "case"), CASES)
def test_an_answer_is_what_it_says(server: str, case: str) -> None:
    raw = answer(server, case)
    assert isinstance(raw.body, bytes)
    if "event-stream" in raw.content_type:
        assert (raw.status, raw.body.endswith(b"\n\n") or not raw.body) == (200, True)
        assert all(isinstance(event, dict) for event in _events(raw))
    elif "json" in raw.content_type:
        assert isinstance(json.loads(raw.body), dict)


@pytest.mark.parametrize("server", servers())
def test_ok_is_the_same_answer_everywhere(server: str) -> None:
    choices = [choice for event in _events(answer(server, "ok")) for choice in event["choices"]]
    assert "".join(choice["delta"].get("content") or "" for choice in choices) == ANSWER


def _events(raw: Raw) -> list[Any]:
    assert isinstance(raw.body, bytes)
    data = [line[5:] for line in raw.body.decode().splitlines() if line.startswith("data:")]
    return [json.loads(each) for each in data if each.strip() != "[DONE]"]
