"""The reader of model answers: bytes that are cut anywhere, in all shapes that servers send."""

import itertools
import time
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.llm.errors import LLMError
from agents.llm.replies import ModelReply
from agents.llm.stream import AnswerReader, OutputLimitReached

FINISHED = b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'


def event(delta: Any, reason: str | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    return b"data: " + orjson.dumps({"choices": [choice], **more}) + b"\n\n"


def calls(*fragments: Any) -> bytes:
    return b"".join(event({"tool_calls": [fragment]}) for fragment in fragments) + FINISHED


def read(*chunks: bytes, model: str = "m") -> tuple[ModelReply, str]:
    reader, reply = AnswerReader(model), ModelReply()
    try:
        shown = [piece for chunk in chunks for piece in reader.feed(chunk)]
        shown += reader.end()
    finally:
        reader.fill(reply, 40)
    return reply, "".join(shown)


def failure(*chunks: bytes) -> tuple[str, bool]:
    with pytest.raises(LLMError) as caught:
        read(*chunks)
    return caught.value.code, caught.value.permanent


def texts(*pieces: str) -> bytes:
    return b"".join(event({"content": piece}) for piece in pieces) + FINISHED


class TestEvents:
    @pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
    @pytest.mark.parametrize("size", [1, 2, 7, 10_000])
    def test_lines_end_in_any_way_and_chunks_anywhere(self, end: bytes, size: int) -> None:
        body = b"\xef\xbb\xbf: hello\n\n" + texts("Gr\u00fc\u00dfe", ", 世界", " 🎉")
        body = body.replace(b"\n", end)
        chunks = [body[at : at + size] for at in range(0, len(body), size)]
        assert read(*chunks)[1] == "Grüße, 世界 🎉"

    @given(cuts=st.lists(st.integers(0, 400), max_size=6))
    def test_where_a_chunk_ends_changes_nothing(self, cuts: list[int]) -> None:
        body = b"event: message\r\nid: 1\r\n" + texts("<think>why", "</think>One ", "<two>")
        edges = [0, *sorted(min(cut, len(body)) for cut in cuts), len(body)]
        reply, shown = read(*(body[a:b] for a, b in itertools.pairwise(edges)))
        assert (reply.text, shown, reply.reasoning) == ("One <two>", "One <two>", "why")

    def test_data_may_have_several_lines(self) -> None:
        body = b'data: {"choices": [{"delta":\ndata: {"content": "Hi"},\ndata:  "finish_reason": '
        assert read(body + b'"stop"}]}\n\n')[1] == "Hi"

    def test_events_may_lack_the_empty_line_between_them(self) -> None:
        assert read(texts("a", "b").replace(b"\n\n", b"\n"))[1] == "ab"

    @pytest.mark.parametrize(
        "chunk",
        [
            b'event: ping\ndata: {"type":"ping"}',
            b'data: {"usage":{"prompt_tokens":3,"completion_tokens":2}}',
            b'data: {"choices":null}',
            b'data: {"choices":[]}',
            b"data: {}",
            b"data: null",
            b"data:",
            b'data: {"choices":[null]}',
            b'data: {"choices":[{"index":1,"delta":{"content":"no"}}]}',
        ],
    )
    def test_a_chunk_without_a_choice_is_skipped(self, chunk: bytes) -> None:
        assert read(chunk + b"\n\n" + texts("Hi"))[1] == "Hi"
        assert read(texts("Hi")[: -len(b"data: [DONE]\n\n")] + chunk + b"\n\n")[1] == "Hi"

    def test_what_follows_a_whole_answer_is_ignored(self) -> None:
        assert read(texts("Hi") + b"data: {oops\n\n")[1] == "Hi"
        error = b'data: {"error": {"code": 500}}\n\n'
        assert read(texts("Hi").replace(b"data: [DONE]\n\n", error))[1] == "Hi"

    def test_done_without_a_finish_reason_ends_a_whole_answer(self) -> None:
        assert read(event({"content": "Hi"}) + b"data: [DONE]\n\n")[1] == "Hi"
        assert failure(event({"content": "Hi"})) == ("broken", False)
        assert failure(event({"role": "assistant"}) + b"data: [DONE]\n\n") == ("broken", False)

    @pytest.mark.parametrize("body", [b"", b"\n\n", b": ping\n\n"])
    def test_nothing_at_all_means_too_long(self, body: bytes) -> None:
        assert failure(body) == ("too_long", True)


class TestDocuments:
    def test_a_document_is_read_as_an_answer(self) -> None:
        message = {"content": "Hi", "tool_calls": None, "refusal": None}
        body = orjson.dumps({"choices": [{"message": message, "finish_reason": "length"}]})
        reply, shown = read(b"  " + body[:9], body[9:])
        assert (reply.text, shown, reply.finish_reason) == ("Hi", "Hi", "length")

    def test_calls_of_a_document_need_no_id(self) -> None:
        call = {"function": {"name": "now", "arguments": {"a": 1}}}
        body = orjson.dumps({"choices": [{"message": {"tool_calls": [call, call]}}]})
        found = read(body)[0].tool_calls
        assert [(call.name, call.arguments) for call in found] == [("now", '{"a":1}')] * 2
        assert len({call.id for call in found}) == 2

    @pytest.mark.parametrize(
        ("body", "expected"),
        [
            (b'{"error":{"code":402,"message":"Pay"}}', ("quota", True)),
            (b'{"error":{"message":"No","code":"insufficient_quota"}}', ("quota", True)),
            (b'[{"error":{"code":429,"status":"RESOURCE_EXHAUSTED"}}]', ("rate_limited", False)),
            (
                b'{"object":"error","type":"NotFoundError","message":"The model x"}',
                ("unknown_model", True),
            ),
            (b'{"detail":"Rate limit exceeded"}', ("rate_limited", False)),
            (b'{"error":"what?"}', ("broken", False)),
            (b"<!doctype html><title>Sign in</title>", ("not_an_api", True)),
            (b"[1]", ("unreadable", False)),
            (b'{"choices":[]}', ("unreadable", False)),
        ],
    )
    def test_an_error_is_judged(self, body: bytes, expected: tuple[str, bool]) -> None:
        assert failure(body) == expected

    @pytest.mark.parametrize(
        ("error", "expected"),
        [
            ({"code": 400, "message": "maximum context length is 8"}, ("too_long", True)),
            ({"code": 500, "message": "maximum context length is 8"}, ("too_long", True)),
            ({"code": "rate_limit_exceeded"}, ("rate_limited", False)),
            ({"code": 429, "message": "slow down"}, ("rate_limited", False)),
            ({"type": "overloaded_error"}, ("unavailable", False)),
            ({"type": "invalid_request_error", "message": "no"}, ("refused", True)),
            ({"code": "502"}, ("unavailable", False)),
            ({"code": None, "message": "?"}, ("broken", False)),
        ],
    )
    def test_an_error_within_a_stream_is_judged(
        self, error: Any, expected: tuple[str, bool]
    ) -> None:
        data = orjson.dumps({"error": error})
        assert failure(event({"content": "Hi"}) + b"data: " + data + b"\n\n") == expected
        bare = b"event: error\ndata: " + orjson.dumps(error) + b"\n\n"
        assert failure(bare) == expected

    def test_an_error_may_be_bare_or_in_the_choice(self) -> None:
        assert failure(b'data: {"detail":"Rate limit exceeded"}\n\n') == ("rate_limited", False)
        assert failure(b'data: {"message":"no","code":402}\n\n') == ("quota", True)
        choice = b'{"choices":[{"delta":{},"error":{"code":429},"finish_reason":"error"}]}'
        assert failure(b"data: " + choice + b"\n\n") == ("rate_limited", False)

    @pytest.mark.parametrize(
        ("message", "code"),
        [
            ("context deadline exceeded", "unavailable"),
            ("context size exceeded: 600 > 512", "too_long"),
            ("Requested tokens (600) exceed context window of 512", "too_long"),
            ("missing key: 'content'", "refused"),
            ("This model does not support tools", "refused"),
            ("'tools' is not supported with this model", "refused"),
            ("The model gpt-9 is not supported", "unknown_model"),
            ("No models loaded. Please load a model", "unknown_model"),
        ],
    )
    def test_the_text_decides_if_nothing_else_does(self, message: str, code: str) -> None:
        status = 500 if code == "unavailable" else 400
        error = orjson.dumps({"error": {"code": status, "message": message}})
        assert failure(b"data: " + error + b"\n\n")[0] == code


class TestWork:
    """What an endpoint sends costs no more than it is long."""

    @pytest.mark.parametrize(
        "delta",
        [
            {"content": " "},
            {"content": "<"},
            {"content": "\n<think>"},
            {"content": "`"},
            {"tool_calls": [{"function": {"name": "a", "arguments": "{}"}}]},
            {"tool_calls": [{"function": {"name": "a", "arguments": "{}}"}}]},
        ],
        ids=str,
    )
    def test_many_deltas(self, delta: Any) -> None:
        reader, data = AnswerReader(), event(delta)
        began = time.process_time()
        for _ in range(20_000):
            reader.feed(data)
        reader.cut()
        reader.fill(ModelReply(), 40)
        assert time.process_time() - began < 4

    def test_a_long_beginning_of_white_space(self) -> None:
        reader = AnswerReader()
        began = time.process_time()
        for _ in range(50_000):
            reader.feed(b"\n")
        assert time.process_time() - began < 2


class TestFinish:
    @pytest.mark.parametrize(
        ("sent", "kept"),
        [
            ("stop", "stop"),
            ("length", "length"),
            ("max_tokens", "length"),
            ("MAX_TOKENS", "length"),
            ("function_call", "tool_calls"),
            ("SAFETY", "content_filter"),
            ("something_new", ""),
        ],
    )
    def test_the_reason_is_kept_by_its_usual_name(self, sent: str, kept: str) -> None:
        assert read(event({"content": "Hi"}, sent))[0].finish_reason == kept

    def test_an_error_as_the_reason_breaks_the_answer(self) -> None:
        assert failure(event({"content": "Hi"}, "error")) == ("broken", False)

    def test_a_refusal_is_the_answer(self) -> None:
        reply, shown = read(
            event({"content": None, "refusal": "I "}), event({"refusal": "won't"}), FINISHED
        )
        assert (reply.text, shown, reply.is_refusal) == ("I won't", "I won't", True)


class TestToolCalls:
    def found(self, *fragments: Any) -> list[tuple[str, str]]:
        reply, _ = read(calls(*fragments))
        ids = [call.id for call in reply.tool_calls]
        assert len(set(ids)) == len(ids)
        assert all(ids)
        return [(call.name, call.arguments) for call in reply.tool_calls]

    def fragment(self, name: str | None, arguments: Any, **more: Any) -> dict[str, Any]:
        return {"function": {"name": name, "arguments": arguments}, **more}

    def test_pieces_by_index(self) -> None:
        assert self.found(
            self.fragment("a", "", index=0, id="x"),
            self.fragment("b", "", index=1, id="y"),
            self.fragment(None, '{"n":', index=1),
            self.fragment(None, "1}", index="1"),
            self.fragment(None, "{}", index=0),
        ) == [("a", "{}"), ("b", '{"n":1}')]

    @pytest.mark.parametrize("index", [{}, {"index": 0}, {"index": None}])
    def test_a_new_id_is_a_new_call(self, index: Any) -> None:
        assert self.found(
            self.fragment("now", "{}", id="x", **index), self.fragment("now", "{}", id="y", **index)
        ) == [("now", "{}"), ("now", "{}")]

    @pytest.mark.parametrize("index", [{}, {"index": 0}])
    def test_a_repeated_name_and_id_are_not_added(self, index: Any) -> None:
        assert self.found(
            self.fragment("now", "{", id="x", **index),
            self.fragment("now", '"a":', id="x", **index),
            self.fragment("now", "1}", id="x", **index),
        ) == [("now", '{"a":1}')]

    def test_whole_calls_without_id_and_index(self) -> None:
        assert self.found(
            self.fragment("a", '{"n":1}'), self.fragment("a", '{"n":2}'), self.fragment("b", {})
        ) == [("a", '{"n":1}'), ("a", '{"n":2}'), ("b", "{}")]

    def test_pieces_without_id_and_index(self) -> None:
        assert self.found(
            self.fragment("a", ""), self.fragment(None, '{"n"'), self.fragment("a", ":1}")
        ) == [("a", '{"n":1}')]

    def test_whole_calls_at_one_index(self) -> None:
        assert self.found(
            self.fragment("a", {"n": 1}, index=0), self.fragment("a", {"n": 2}, index=0)
        ) == [("a", '{"n":1}'), ("a", '{"n":2}')]

    @pytest.mark.parametrize(("sent", "kept"), [({}, "{}"), ({"a": 1}, '{"a":1}'), (None, "{}")])
    def test_arguments_may_be_an_object(self, sent: Any, kept: str) -> None:
        assert self.found(self.fragment("now", sent, index=0, id="x")) == [("now", kept)]

    def test_made_ids_are_long_enough(self) -> None:
        (call,) = read(calls(self.fragment("now", "{}")))[0].tool_calls
        assert len(call.id) == 9
        assert call.id.isalnum()

    def test_the_legacy_form_is_read(self) -> None:
        reply, _ = read(
            event({"function_call": {"name": "now", "arguments": "{"}}),
            event({"function_call": {"arguments": "}"}}, "function_call"),
        )
        assert [(call.name, call.arguments) for call in reply.tool_calls] == [("now", "{}")]
        assert reply.finish_reason == "tool_calls"


class TestReasoning:
    @pytest.mark.parametrize(
        "delta",
        [
            {"reasoning": "why"},
            {"reasoning_content": "why", "content": None},
            {"reasoning": "why", "reasoning_content": "why", "content": ""},
            {"reasoning_details": [{"type": "reasoning.text", "text": "why"}]},
            {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "why"}]}]},
            {"content": [{"type": "thinking", "thinking": "why"}]},
        ],
    )
    def test_it_is_kept_apart(self, delta: Any) -> None:
        reply, shown = read(event(delta), texts("Hi"))
        assert (reply.reasoning, reply.text, shown) == ("why", "Hi", "Hi")

    @pytest.mark.parametrize(
        ("pieces", "text", "reasoning"),
        [
            (["<think>why</think>Hi"], "Hi", "why"),
            (["\n<thi", "nk>\nwh", "y\n</th", "ink>\n", "\nHi"], "Hi", "why"),
            (["<think></think>\n\nHi"], "Hi", ""),
            (["<THINK>why</Think>Hi"], "Hi", "why"),
            (["[THINK]why[/THINK]Hi"], "Hi", "why"),
            (["<think>a</think>Hi\n<think>b</think>you"], "Hi\nyou", "a\n\nb"),
            (["Hi\n", "<think>", "b", "</think>", "you"], "Hi\nyou", "b"),
            (["why\n</think>\n\nHi"], "Hi", "why"),
            (["<think>never ends"], "", "never ends"),
        ],
    )
    def test_tags_are_taken_out(self, pieces: list[str], text: str, reasoning: str) -> None:
        reply, _ = read(texts(*pieces))
        assert (reply.text, reply.reasoning) == (text, reasoning)

    @pytest.mark.parametrize(
        "text",
        [
            "The tag `<think>` begins reasoning, and `</think>` ends it.",
            "```xml\n<think>why</think>\n```\nSo it is.",
            "```\na\n</think>\nb\n```",
            "One\n<think> is a tag without an end.",
            "a < b, <b>bold</b> and <thin",
            "[1] and [think about it]",
            "  indented",
            "<",
        ],
    )
    def test_an_answer_about_them_stays_whole(self, text: str) -> None:
        for pieces in ([text], list(text)):
            reply, shown = read(texts(*pieces))
            assert (reply.text, shown, reply.reasoning) == (text, text, "")


class TestParts:
    def test_texts_are_joined_and_others_left_out(self) -> None:
        parts = ["One ", {"type": "text", "text": "two "}, {"type": "image_url"}, {"text": "three"}]
        assert read(event({"content": parts}), FINISHED)[1] == "One two three"


class TestUsage:
    @pytest.mark.parametrize(
        "usage", [None, {}, [], "x", {"prompt_tokens": "many"}, {"prompt_tokens": 0}]
    )
    def test_what_is_not_reported_is_estimated(self, usage: Any) -> None:
        reply, _ = read(event({"content": "word " * 8}, usage=usage), FINISHED)
        assert reply.usage.is_estimated
        assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (11, 10)

    def test_a_part_may_be_missing(self) -> None:
        reply, _ = read(event({"content": "Hi"}, "stop", usage={"completion_tokens": 7}))
        assert reply.usage.completion_tokens == 7
        assert reply.usage.is_estimated

    def test_an_answer_that_breaks_off_is_estimated(self) -> None:
        reader, reply = AnswerReader(), ModelReply()
        reader.feed(event({"reasoning": "why " * 40}))
        reader.fill(reply, 40)
        assert reply.usage.is_estimated
        assert reply.usage.completion_tokens == 40


class TestOutputLimit:
    def test_an_answer_is_ended_if_its_server_does_not(self) -> None:
        reader, shown = AnswerReader(max_tokens=5), []

        def feed_all() -> None:
            for _ in range(500):
                shown.extend(reader.feed(event({"content": "word "})))

        with pytest.raises(OutputLimitReached):
            feed_all()
        shown += reader.cut()
        reply = ModelReply()
        reader.fill(reply, 40)
        assert reply.finish_reason == "length"
        assert reply.text == "".join(shown)
        assert 5 <= reply.usage.completion_tokens <= 20

    def test_a_single_delta_is_counted_by_its_length(self) -> None:
        reader = AnswerReader(max_tokens=5)
        with pytest.raises(OutputLimitReached):
            reader.feed(event({"content": "x" * 1000}))

    @pytest.mark.parametrize("pieces", [list("five long words of text"), ["five long words"]])
    def test_an_answer_within_the_limit_is_left_alone(self, pieces: list[str]) -> None:
        reader = AnswerReader(max_tokens=5)
        shown = [text for piece in pieces for text in reader.feed(event({"content": piece}))]
        assert "".join(shown) == "".join(pieces)
