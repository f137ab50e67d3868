"""What each model server's answers become: the table of docs/model-servers.md.

`UPDATE_DOCS=1` writes the table.
"""

import os
from pathlib import Path
from typing import Any

import pytest

from agents.llm import completions
from agents.llm.errors import LLMError
from agents.llm.replies import ModelReply
from tests.fakes.llm import FakeLLM
from tests.fakes.servers import ANSWER, REASONING, answer, answers, servers

DOCUMENT = Path(__file__).parents[2] / "docs/model-servers.md"
BEGIN, END = "<!-- table -->\n", "<!-- end of the table -->\n"
HEAD = """| server | case | result | retried | finish reason | usage | message |
| --- | --- | --- | --- | --- | --- | --- |
"""
QUESTION = [{"role": "user", "content": "Is the depot open?"}]
CASES = [(server, case) for server in servers() for case in answers(server)]
# What a case becomes, unless its server hides what it means.
EXPECTED = {
    "ok": "answer",
    "length": "answer",
    "thinking": "answer, reasoning",
    "exhausted": "output_limit",
    "tool": "1 tool call",
    "tools": "2 tool calls",
    "overflow": "too_long",
    "unknown": "unknown_model",
    "path": "unknown_path",
    "filter": "content_filter",
    "refusal": "refusal",
    "quota": "quota",
    "key": "key_refused",
    "roles": "refused",
}
HIDDEN = {
    ("transformers", "unknown"): "unavailable",
    ("transformers", "roles"): "unavailable",
    ("transformers", "error"): "broken",
}


def call(model: FakeLLM, server: str, case: str) -> tuple[ModelReply, LLMError | None, list[str]]:
    reply, shown = ModelReply(), []
    model.script(answer(server, case))
    options = completions.CallOptions(text=shown.append)
    try:
        completions.complete(QUESTION, model="nosuch", options=options, reply=reply)
    except LLMError as error:
        return reply, error, shown
    return reply, None, shown


def result_of(reply: ModelReply, error: LLMError | None) -> str:
    if error:
        return error.code
    if count := len(reply.tool_calls):
        return f"{count} tool call{'s' if count > 1 else ''}"
    return "refusal" if reply.is_refusal else "answer" + ", reasoning" * bool(reply.reasoning)


def row(model: FakeLLM, server: str, case: str) -> str:
    reply, error, _ = call(model, server, case)
    usage = "estimated" if reply.usage.is_estimated else "reported"
    cells = (
        server,
        case,
        result_of(reply, error),
        "" if error is None else "no" if error.permanent else "yes",
        reply.finish_reason,
        usage if reply.usage.prompt_tokens else "",
        str(error or ""),
    )
    return f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |")


@pytest.mark.parametrize(("server", "case"), CASES)
def test_an_answer_becomes_what_it_means(model: FakeLLM, server: str, case: str) -> None:
    reply, error, shown = call(model, server, case)
    expected = HIDDEN.get((server, case)) or EXPECTED.get(case) or "unavailable"
    assert result_of(reply, error) == expected
    assert "".join(shown) == reply.text
    if error:
        assert error.permanent == (expected not in ("unavailable", "broken"))
    if case in ("ok", "thinking"):
        assert reply.text == ANSWER
    if case in ("thinking", "exhausted") and server != "openai":
        assert reply.reasoning == REASONING
    for tool_call in reply.tool_calls:
        assert (tool_call.name, tool_call.arguments) == ("current_time", "{}")
    assert len({tool_call.id for tool_call in reply.tool_calls}) == len(reply.tool_calls)


def test_the_document_has_the_table(model: FakeLLM) -> None:
    table = HEAD + "".join(f"{row(model, server, case)}\n" for server, case in CASES)
    text = DOCUMENT.read_text()
    before, _, rest = text.partition(BEGIN)
    written, _, after = rest.partition(END)
    if os.environ.get("UPDATE_DOCS"):
        DOCUMENT.write_text(f"{before}{BEGIN}{table}{END}{after}")
    else:
        assert written == table, "Run this test with UPDATE_DOCS=1."


def test_an_error_is_logged_without_its_text(model: FakeLLM, caplog: Any) -> None:
    call(model, "vllm", "error")

    assert "(code 500, type InternalServerError" in caplog.text
    assert "EngineCore" not in caplog.text
