import functools
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from agents import tools
from agents.llm import completions, errors, loop, transport
from agents.runs.history import Prompt
from tests.fakes.llm import (
    GARBAGE,
    Call,
    Cut,
    Failure,
    FakeLLM,
    Hang,
    Raw,
    Reply,
    Steps,
    StreamError,
    ToolCall,
    call_tool,
    chunk,
)

QUESTION = [{"role": "user", "content": "What time is it?"}]


def complete() -> completions.ModelReply:
    return completions.complete(QUESTION, model="gpt-4o-mini")


class TestAnswers:
    def test_a_streamed_answer_is_put_together(self, model: FakeLLM) -> None:
        model.script(Reply("Grüße, 世界! 🎉", deltas=12))

        reply = complete()

        assert reply.text == "Grüße, 世界! 🎉"
        assert reply.usage.prompt_tokens > 0
        assert model.requests[0].stream
        assert model.requests[0].include_usage

    def test_of_many_at_once_each_is_read_less_often_and_all_of_it(
        self, model: FakeLLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model.script(Reply("word " * 10, deltas=10, delta_latency=0.01))
        came: list[float] = []
        control = completions.CallOptions(text=lambda piece: came.append(time.monotonic()))
        monkeypatch.setattr(transport, "_reading", set(range(200)))

        reply = completions.complete(QUESTION, model="gpt-4o-mini", options=control)

        assert reply.text == "word " * 10
        together = sum(b - a < 0.005 for a, b in itertools.pairwise(came))
        assert together >= 3, "most of them come within the first rest"

    @pytest.mark.parametrize(("answers", "rest"), [(1, 0), (19, 0), (50, 0.025), (1000, 0.1)])
    def test_few_are_read_as_they_come(
        self, answers: int, rest: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(transport, "_reading", set(range(answers)))

        assert transport.rest_seconds() == rest

    def test_an_endpoint_that_cannot_stream_is_understood(self, model: FakeLLM) -> None:
        body = (
            b'{"choices": [{"message": {"role": "assistant", "content": "Hi"}}],'
            b' "usage": {"prompt_tokens": 3, "completion_tokens": 1}}'
        )
        model.script(Raw(body, content_type="application/json"))

        assert complete() == completions.ModelReply("Hi", [], completions.TokenUsage(3, 1))

    def test_comments_between_the_events_are_skipped(self, model: FakeLLM) -> None:
        model.script(Reply("Hi", comment="still thinking"))

        assert complete().text == "Hi"

    def test_usage_may_be_missing_and_is_estimated_then(self, model: FakeLLM) -> None:
        model.script(
            Raw(b'data: {"choices":[{"delta":{"content":"Hi"},"finish_reason":"stop"}]}\n\n')
        )

        reply = complete()

        assert (reply.text, reply.finish_reason) == ("Hi", "stop")
        assert reply.usage.is_estimated
        assert reply.usage.completion_tokens == 1
        assert 20 < reply.usage.prompt_tokens < 60

    def test_nul_is_dropped_because_no_database_can_keep_it(self, model: FakeLLM) -> None:
        model.script(Reply("a\0b"))

        assert complete().text == "ab"

    @pytest.mark.parametrize("stream", [True, False])
    def test_half_a_character_is_dropped_and_the_rest_kept(
        self, model: FakeLLM, stream: bool
    ) -> None:
        whole = b'{"choices": [{"message": {"content": "Half \\ud83d and \\ude00."}}]}'
        model.script(
            Reply(("Half \ud83d", " and ", "\ude00."))
            if stream
            else Raw(whole, content_type="application/json")
        )
        assert complete().text == "Half  and ."

    @pytest.mark.parametrize(
        "body", [b"[" * 100_000 + b'"\\ud83d"', b'{"usage": NaN, "choices": ["\\ud83d"]}']
    )
    def test_nor_does_it_let_garbage_in(self, model: FakeLLM, body: bytes) -> None:
        model.script(Raw(body, content_type="application/json"))
        with pytest.raises(completions.LLMError) as caught:
            complete()
        assert caught.value.code == "unreadable"

    def test_connections_are_kept(self, model: FakeLLM) -> None:
        complete()
        before = model.connections
        for _ in range(5):
            complete()

        assert model.connections == before

    def test_the_first_calls_of_a_process_may_come_at_once(
        self, model: FakeLLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """They all find no event loop yet, and must not make one each."""
        slow = functools.cache(_slowly(transport._loop.__wrapped__))
        transport.close()
        with monkeypatch.context() as patch, ThreadPoolExecutor(8) as pool:
            patch.setattr(transport, "_loop", slow)
            replies = list(pool.map(lambda _: complete(), range(8)))
            transport.close()
        slow().call_soon_threadsafe(slow().stop)

        assert len({reply.text for reply in replies}) == 1


def _slowly(make: Callable[[], Any]) -> Callable[[], Any]:
    def made() -> Any:
        time.sleep(0.05)
        return make()

    return made


class TestTrouble:
    @pytest.mark.parametrize("name", sorted(GARBAGE.keys() - {"html", "nothing"}))
    def test_garbage_is_no_answer_and_may_pass(self, model: FakeLLM, name: str) -> None:
        model.script(GARBAGE[name])

        with pytest.raises(completions.LLMError) as caught:
            complete()

        assert not caught.value.permanent
        assert caught.value.code in {"unreadable", "broken"}

    @pytest.mark.parametrize(("name", "code"), [("html", "not_an_api"), ("nothing", "too_long")])
    def test_garbage_that_will_not_pass(self, model: FakeLLM, name: str, code: str) -> None:
        """llama-cpp-python answers a context that is too long with an empty stream."""
        model.script(GARBAGE[name])

        with pytest.raises(completions.LLMError) as caught:
            complete()

        assert (caught.value.code, caught.value.permanent) == (code, True)

    @pytest.mark.parametrize(
        "behaviour",
        [Cut(after=2), Cut(after=2, clean=True), StreamError(after=2), Cut()],
        ids=repr,
    )
    def test_half_an_answer_is_none(self, model: FakeLLM, behaviour: Any) -> None:
        model.script(behaviour)

        with pytest.raises(completions.LLMError) as caught:
            complete()

        assert not caught.value.permanent

    def test_an_answer_without_end_is_cut(self, model: FakeLLM, monkeypatch: Any) -> None:
        monkeypatch.setattr(completions, "MAX_RESPONSE_BYTES", 50_000)
        model.script(Reply("x" * 100_000))

        with pytest.raises(completions.LLMError, match="too long"):
            complete()

    def test_nobody_listens(self, settings: Any) -> None:
        settings.OPENAI_BASE_URL = "http://127.0.0.1:1/v1"
        transport.close()

        with pytest.raises(completions.LLMError) as caught:
            complete()

        transport.close()
        assert caught.value.code == "connection"
        assert not caught.value.permanent

    def test_what_the_endpoint_says_is_not_repeated(self, model: FakeLLM, caplog: Any) -> None:
        model.script(Failure(401, message="Incorrect API key provided: sk-canary-0123456789"))

        with pytest.raises(completions.LLMError) as caught:
            complete()

        assert "canary" not in str(caught.value)
        assert "canary" not in caplog.text

    def test_the_wish_to_stop_is_heeded_between_chunks(self, model: FakeLLM) -> None:
        model.script(Reply("word " * 100, deltas=100, delta_latency=0.02))
        checks = iter([False] * 4)

        with pytest.raises(completions.Stopped):
            completions.complete(
                QUESTION,
                model="gpt-4o-mini",
                options=completions.CallOptions(stopped=lambda: next(checks, True)),
            )

        model.wait_for_disconnects()

    @pytest.mark.parametrize("after", [None, 3], ids=["no headers", "three words"])
    def test_a_call_is_cut_while_the_endpoint_is_silent(
        self, model: FakeLLM, after: int | None
    ) -> None:
        words = ("one ", "two ", "three ", "four")
        model.script(Hang(after, Reply(words)))
        came, cuts = threading.Semaphore(0), []

        @contextmanager
        def on_cancel(cut: Callable[[], None]) -> Iterator[None]:
            cuts.append(cut)
            yield

        def cut_when_silent() -> None:
            model.wait_for_requests()
            for _ in range(after or 0):
                came.acquire(timeout=60)
            cuts[0]()

        reply = completions.ModelReply()
        cutter = threading.Thread(target=cut_when_silent)
        cutter.start()
        with pytest.raises(completions.Stopped):
            completions.complete(
                QUESTION,
                model="gpt-4o-mini",
                options=completions.CallOptions(
                    on_cancel=on_cancel, text=lambda piece: came.release()
                ),
                reply=reply,
            )
        cutter.join()

        assert reply.text == "".join(words[: after or 0]), "what came before is kept"
        model.wait_for_disconnects()

    def test_time_is_up_while_the_endpoint_is_silent(self, model: FakeLLM) -> None:
        model.script(Hang(after=2, reply=Reply(("one ", "two ", "three"))))
        reply = completions.ModelReply()
        transport.warm_up()

        with pytest.raises(completions.LLMError) as caught:
            completions.complete(
                QUESTION,
                model="gpt-4o-mini",
                options=completions.CallOptions(deadline=time.monotonic() + 1.5),
                reply=reply,
            )

        assert caught.value.code == "deadline"
        assert reply.text == "one two "
        model.wait_for_disconnects()

    def test_an_endpoint_that_never_ends_its_answer_has_answered(
        self, model: FakeLLM, settings: Any
    ) -> None:
        """All is told with `[DONE]`, whatever becomes of the connection."""

        class Unended:
            def steps(self, call: Call) -> Steps:
                yield Reply("Answer").beginning(call, 8) + chunk(Reply().events(call)[2])
                yield math.inf

        settings.OPENAI_TIMEOUT_SECONDS = 0.3
        model.script(Unended())

        assert complete().text == "Answer"


class TestOverHTTP:
    def failure(self, model: FakeLLM, *behaviours: Any) -> completions.LLMError:
        model.script(*behaviours)
        with pytest.raises(completions.LLMError) as caught:
            complete()
        return caught.value

    @pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
    def test_redirects_are_not_followed(self, model: FakeLLM, status: int) -> None:
        """They would carry the key and the conversation to another address, or never end."""
        to_itself = {"location": f"{model.url}/chat/completions"}
        error = self.failure(model, Raw(b"", status, "text/html", to_itself))

        assert (error.code, error.permanent) == ("redirected", True)
        assert len(model.requests) == 1

    @pytest.mark.parametrize(
        ("status", "body", "code", "permanent"),
        [
            (402, b"{}", "quota", True),
            (403, b'{"error":{"code":"model_not_found"}}', "unknown_model", True),
            (404, b"<h1>Not found</h1>", "unknown_path", True),
            (404, b"", "unknown_path", True),
            (405, b'{"detail":"Method Not Allowed"}', "unknown_path", True),
            (400, b'{"error":{"type":"no_db_connection","code":"400"}}', "key_refused", True),
            (
                400,
                b'{"error":{"message":"API key not valid. Please pass one."}}',
                "key_refused",
                True,
            ),
            (413, b"<html>nginx</html>", "too_long", True),
            (422, b'{"detail":[{"msg":"field required"}]}', "refused", True),
            (400, b'{"message":"prompt is too long: 9 tokens > 8 maximum"}', "too_long", True),
            (400, b'{"error":"Input is too long for requested model."}', "too_long", True),
            (429, b'{"error":{"code":"rate_limit_exceeded"}}', "rate_limited", False),
            (502, b"<html>Bad Gateway</html>", "unavailable", False),
            (529, b'{"type":"error","error":{"type":"overloaded_error"}}', "unavailable", False),
        ],
    )
    def test_an_error_status_is_judged(
        self, model: FakeLLM, status: int, body: bytes, code: str, permanent: bool
    ) -> None:
        kind = "text/html" if body.startswith(b"<") else "application/json"
        error = self.failure(model, Raw(body, status, kind))

        assert (error.code, error.permanent) == (code, permanent)

    @pytest.mark.parametrize(
        ("headers", "seconds"),
        [
            ({"retry-after-ms": "1500", "retry-after": "30"}, 1.5),
            ({"retry-after-ms": "soon", "retry-after": "30"}, 30),
            ({"retry-after-ms": "-1"}, None),
        ],
    )
    def test_a_pause_may_be_in_milliseconds(
        self, model: FakeLLM, headers: dict[str, str], seconds: float | None
    ) -> None:
        error = self.failure(model, Raw(b"{}", 429, "application/json", headers))

        assert error.retry_after == seconds

    @pytest.mark.parametrize(
        ("value", "permanent"), [("true", False), ("false", True), ("", False)]
    )
    def test_the_endpoint_may_say_whether_to_retry(
        self, model: FakeLLM, value: str, permanent: bool
    ) -> None:
        error = self.failure(model, Raw(b"{}", 503, "application/json", {"x-should-retry": value}))

        assert error.permanent is permanent

    @pytest.mark.parametrize("kind", ["application/json", "text/plain", "text/html", ""])
    def test_a_stream_is_read_whatever_its_type(self, model: FakeLLM, kind: str) -> None:
        body = b"".join(itertools.chain(*Reply("Hi").events(Call("POST", "", {}, {}, 0))))
        model.script(Raw(body, 200, kind))

        assert complete().text == "Hi"

    @pytest.mark.parametrize("field", ["max_completion_tokens", "max_tokens"])
    def test_an_output_limit_that_the_server_ignores_is_kept(
        self, model: FakeLLM, settings: Any, field: str
    ) -> None:
        settings.AGENT_MAX_OUTPUT_TOKENS, settings.AGENT_MAX_OUTPUT_TOKENS_FIELD = 5, field
        model.script(Reply("word " * 500, deltas=500, delta_latency=0.002))

        reply = complete()

        assert model.requests[0].body[field] == 5  # type: ignore[index,call-overload]
        assert reply.finish_reason == "length"
        assert 5 <= len(reply.text.split()) <= 30
        assert reply.usage.is_estimated
        model.wait_for_disconnects()

    @pytest.mark.parametrize(
        ("reason", "code"), [("length", "output_limit"), ("content_filter", "content_filter")]
    )
    def test_no_text_at_all_has_its_reason(self, model: FakeLLM, reason: str, code: str) -> None:
        error = self.failure(model, Reply(" ", finish_reason=reason))

        assert (error.code, error.permanent) == (code, True)

    def test_a_filtered_answer_keeps_its_text_apart(self, model: FakeLLM) -> None:
        reply = completions.ModelReply()
        model.script(Reply("Some of it", finish_reason="content_filter"))
        with pytest.raises(completions.LLMError, match="content filter"):
            completions.complete(QUESTION, model="m", reply=reply)

        assert reply.text == "Some of it"


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("", None),
        ("7", 7),
        ("0.5", 0.5),
        ("0", None),
        ("-3", None),
        ("nan", None),
        ("soon", None),
        ("1e9", 900),
        ("inf", 900),
        ("Sat, 01 Jan 2000 00:00:00 GMT", None),
        ("Sat, 01 Jan 2000 00:00:00 +999999999999999", None),
    ],
)
def test_retry_after(header: str, seconds: float | None) -> None:
    assert errors.retry_after(header) == seconds


def test_retry_after_may_be_a_date() -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)

    assert errors.retry_after(date) == pytest.approx(25, abs=6)


class TestTools:
    @pytest.fixture(autouse=True)
    def _offered(self, settings: Any) -> None:
        settings.AGENT_TOOLS = ["current_time"]

    def run(self, *, max_iterations: int = 4) -> tuple[str, loop.Transcript]:
        transcript = loop.Transcript()
        answer = loop.run(
            Prompt(QUESTION, {}),
            model="gpt-4o-mini",
            max_iterations=max_iterations,
            options=completions.CallOptions(),
            transcript=transcript,
        )
        return answer, transcript

    def test_a_tool_is_carried_out_and_its_result_told(self, model: FakeLLM) -> None:
        model.script(call_tool("current_time"), Reply("Late."))

        answer, transcript = self.run()

        assert answer == "Late."
        assert [(step.kind, step.name) for step in transcript.steps] == [
            ("model", "gpt-4o-mini"),
            ("tool", "current_time"),
            ("model", "gpt-4o-mini"),
        ]
        offered = model.requests[0].body["tools"]  # type: ignore[index,call-overload]
        assert [tool["function"]["name"] for tool in offered] == ["current_time"]
        result = model.requests[1].messages[-1]
        assert result["role"] == "tool"
        assert result["tool_call_id"] == "call_1"
        assert result["content"] == transcript.steps[1].output

    @pytest.mark.parametrize(
        ("call", "error"),
        [
            (ToolCall("current_time", "{"), "The arguments are not JSON."),
            (ToolCall("current_time", "[1]"), "The arguments must be an object"),
            (ToolCall("current_time", {"zone": "CET"}), "The arguments must be an object"),
            (ToolCall("launch", {}), "There is no tool 'launch'."),
        ],
    )
    def test_a_call_that_makes_no_sense_is_told_the_model(
        self, model: FakeLLM, call: ToolCall, error: str
    ) -> None:
        model.script(Reply(tool_calls=(call,)), Reply("Never mind."))

        answer, transcript = self.run()

        assert answer == "Never mind."
        assert transcript.steps[1].error.startswith(error)
        assert error in model.requests[1].messages[-1]["content"]

    def test_a_model_that_never_comes_to_an_answer_is_stopped(self, model: FakeLLM) -> None:
        model.reset(call_tool("current_time"))

        with pytest.raises(completions.LLMError, match="3 times") as caught:
            self.run(max_iterations=3)

        assert caught.value.permanent
        assert len(model.requests) == 3

    def test_a_tool_that_breaks_is_the_models_to_work_around(
        self, model: FakeLLM, monkeypatch: Any, settings: Any, caplog: Any
    ) -> None:
        monkeypatch.setattr(tools, "TOOLS", dict(tools.TOOLS))

        @tools.tool(city={"type": "string"})
        def weather(city: str) -> str:
            """The weather of a city."""
            raise RuntimeError("canary")

        settings.AGENT_TOOLS = ["weather"]
        model.script(call_tool("weather", city="Paris"), Reply("No idea."))

        answer, transcript = self.run()

        assert answer == "No idea."
        assert "canary" not in str(model.requests[1].messages)
        assert "canary" in caplog.text
        assert transcript.steps[1].error == "The tool failed."

    def test_no_tool_is_called_for_a_run_that_was_lost(self, model: FakeLLM) -> None:
        model.script(Reply(tool_calls=tuple(ToolCall("current_time", {}) for _ in range(40))))
        transcript = loop.Transcript()
        # Lost between the answer of the model and the third tool.
        lost = lambda: len(transcript.steps) > 2  # noqa: E731

        with pytest.raises(completions.Stopped):
            loop.run(
                Prompt(QUESTION, {}),
                model="gpt-4o-mini",
                max_iterations=4,
                options=completions.CallOptions(stopped=lost),
                transcript=transcript,
            )

        assert [step.kind for step in transcript.steps] == ["model", "tool", "tool"]

    def test_none_is_offered_unless_it_is_named(self, model: FakeLLM, settings: Any) -> None:
        settings.AGENT_TOOLS = []
        self.run()

        assert "tools" not in model.requests[0].body  # type: ignore[operator]
