from __future__ import annotations

import time
from collections.abc import Iterator

import openai
import pytest
from openai import OpenAI

from tests.fakes.llm import (
    CONTEXT_TOO_LONG,
    GARBAGE,
    Cut,
    Failure,
    FakeLLM,
    Hang,
    LLMProcess,
    Raw,
    Reply,
    StreamError,
    ToolCall,
    call_tool,
)


@pytest.fixture(scope="module")
def server() -> Iterator[FakeLLM]:
    with FakeLLM() as llm:
        yield llm


@pytest.fixture
def llm(server: FakeLLM) -> FakeLLM:
    server.reset()
    return server


@pytest.fixture(scope="module")
def client(server: FakeLLM) -> Iterator[OpenAI]:
    with OpenAI(api_key="sk-test", base_url=server.url, max_retries=0, timeout=5) as client:
        yield client


def ask(client: OpenAI, content: str = "Hi", timeout: float = 5):
    return client.chat.completions.create(
        model="gpt-4o-mini", messages=[{"role": "user", "content": content}], timeout=timeout
    )


def stream(client: OpenAI, content: str = "Hi", timeout: float = 5):
    return client.chat.completions.create(
        model="gpt-4o-mini",
        messages=[{"role": "user", "content": content}],
        stream=True,
        stream_options={"include_usage": True},
        timeout=timeout,
    )


def text_of(chunks) -> str:
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)


def test_answers_the_last_user_message(llm, client):
    completion = ask(client, "What now?")
    assert completion.choices[0].message.content == "Answer to: What now?"
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage.total_tokens > 0


def test_streams_role_deltas_finish_and_usage(llm, client):
    llm.script(Reply("abcdefghij", deltas=5))
    first, *deltas, last, usage = stream(client)
    assert first.choices[0].delta.role == "assistant"
    assert [d.choices[0].delta.content for d in deltas] == ["ab", "cd", "ef", "gh", "ij"]
    assert last.choices[0].finish_reason == "stop"
    assert usage.choices == []
    assert usage.usage.completion_tokens == 5


def test_records_what_was_asked(llm, client):
    ask(client, "Hi")
    (call,) = llm.requests
    assert call.model == "gpt-4o-mini"
    assert call.headers["authorization"] == "Bearer sk-test"
    assert call.messages == [{"role": "user", "content": "Hi"}]
    assert not call.stream


def test_the_script_comes_before_the_default(llm, client):
    llm.default = Reply(lambda call: call.last_user.upper())
    llm.script(Reply("one"), lambda call: Reply(call.model))
    answers = [ask(client, "x").choices[0].message.content for _ in range(3)]
    assert answers == ["one", "gpt-4o-mini", "X"]


def test_lists_models(llm, client):
    assert [m.id for m in client.models.list()] == ["gpt-4o-mini", "gpt-4o"]
    assert llm.requests == []


def test_an_unknown_path_is_404(llm, client):
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="m", input="x")


@pytest.mark.parametrize("retry_after", [3, "Wed, 21 Oct 2026 07:28:00 GMT", "soon"])
def test_429_carries_retry_after_as_given(llm, client, retry_after):
    llm.script(Failure(429, retry_after=retry_after))
    with pytest.raises(openai.RateLimitError) as caught:
        ask(client)
    assert caught.value.response.headers["retry-after"] == str(retry_after)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 500, 502, 503, 529])
def test_failures_have_their_status_and_the_connection_lives_on(llm, client, status):
    llm.script(Failure(status, message="No."))
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client)
    assert caught.value.status_code == status
    assert caught.value.body["message"] == "No."
    assert ask(client).choices


def test_context_too_long_has_its_code(llm, client):
    llm.script(CONTEXT_TOO_LONG)
    with pytest.raises(openai.BadRequestError) as caught:
        stream(client)
    assert caught.value.code == "context_length_exceeded"


def test_latency_comes_before_headers_and_between_deltas(llm, client):
    llm.script(Reply("abc", deltas=3, latency=0.05, delta_latency=0.03))
    started = time.monotonic()
    chunks = stream(client)
    assert time.monotonic() - started >= 0.05
    assert text_of(chunks) == "abc"
    assert time.monotonic() - started >= 0.05 + 3 * 0.03


def test_hang_before_headers_times_out_and_the_disconnect_is_seen(llm, client):
    llm.script(Hang())
    with pytest.raises(openai.APITimeoutError):
        ask(client, timeout=0.5)
    assert len(llm.wait_for_disconnects()) == 1


def test_hang_between_deltas(llm, client):
    llm.script(Hang(after=2, reply=Reply("abcd", deltas=4)))
    chunks = stream(client, timeout=1)
    seen = [next(chunks) for _ in range(3)]
    assert text_of(seen) == "ab"
    with pytest.raises(openai.APITimeoutError):
        next(chunks)


def test_cut_without_an_answer(llm, client):
    llm.script(Cut())
    with pytest.raises(openai.APIConnectionError):
        ask(client)


def test_cut_mid_stream(llm, client):
    llm.script(Cut(after=2))
    with pytest.raises(openai.APIConnectionError):
        list(stream(client))


def test_clean_cut_lacks_only_the_finish_reason(llm, client):
    llm.script(Cut(after=2, clean=True, reply=Reply("abcd", deltas=4)))
    chunks = list(stream(client))
    assert text_of(chunks) == "ab"
    assert all(c.choices[0].finish_reason is None for c in chunks)


def test_error_inside_the_stream(llm, client):
    llm.script(StreamError(after=1))
    with pytest.raises(openai.APIError, match="failed"):
        list(stream(client))


@pytest.mark.parametrize("call", [ask, stream])
@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_is_never_a_good_answer(llm, client, name, call):
    llm.script(GARBAGE[name])
    try:
        answer = call(client)
        chunks = [answer] if call is ask else list(answer)
        finished = any(c.choices[0].finish_reason == "stop" for c in chunks)
        damaged = name == "invalid utf-8"
    except Exception:
        return
    assert damaged or not finished


@pytest.mark.parametrize("text", ["nul \0 byte", "half \ud800 pair"])
def test_awkward_characters_go_out_as_escapes(llm, client, text):
    llm.script(Reply((text,)), Reply(text))
    assert text_of(stream(client)) == text
    assert ask(client).choices[0].message.content == text


def test_a_huge_answer(llm, client):
    llm.script(Reply(("x" * 5_000_000,)))
    assert len(text_of(stream(client))) == 5_000_000


def test_tool_calls_stream_in_fragments(llm, client):
    two = (ToolCall("add", {"a": 1, "b": 2}), ToolCall("now", id="call_2"))
    llm.script(Reply(tool_calls=two))
    chunks = list(stream(client))
    parts = [p for c in chunks if c.choices for p in c.choices[0].delta.tool_calls or ()]
    assert [p.function.name for p in parts if p.id] == ["add", "now"]
    arguments = "".join(p.function.arguments for p in parts if p.index == 0)
    assert arguments == '{"a":1,"b":2}'
    assert sum(p.index == 0 for p in parts) == 4
    assert any(c.choices and c.choices[0].finish_reason == "tool_calls" for c in chunks)


def test_tool_calls_whole_and_with_bad_arguments(llm, client):
    llm.script(call_tool("add", a=1), Reply(tool_calls=(ToolCall("add", '{"a": '),)))
    first, second = (ask(client).choices[0].message.tool_calls[0].function for _ in range(2))
    assert (first.name, first.arguments) == ("add", '{"a":1}')
    assert second.arguments == '{"a": '


def test_connections_are_kept_and_counted(llm):
    with OpenAI(api_key="k", base_url=llm.url, max_retries=0) as client:
        before = llm.connections
        for _ in range(3):
            ask(client)
        assert llm.connections == before + 1


def test_raw_bytes(llm, client):
    llm.script(Raw(b"busy", status=503, content_type="text/plain"))
    with pytest.raises(openai.InternalServerError):
        ask(client)


def test_comments_are_skipped_by_clients(llm, client):
    llm.script(Reply("Hi", comment="PROCESSING"))
    assert text_of(stream(client)) == "Hi"


def test_waiting_for_requests_that_do_not_come_fails(llm):
    with pytest.raises(TimeoutError):
        llm.wait_for_requests(1, seconds=0.01)


def test_as_a_process_of_its_own():
    with LLMProcess() as llm, OpenAI(api_key="k", base_url=llm.url, max_retries=0) as client:
        llm.configure(latency=0.02, deltas=4)
        assert text_of(stream(client, "Hi")) == "Answer to: Hi"
        stats = llm.stats()
        assert stats["calls"] == 1
        assert stats["p50"] >= 0.02
