"""What a model endpoint answers: an answer, or an error that says whether to try again."""

import json
from typing import Any

import orjson
import pytest
from hypothesis import strategies as st

from agents import tools
from agents.llm import completions, errors
from agents.llm.errors import UNSTORABLE, LLMError
from agents.llm.replies import ModelReply
from agents.llm.stream import MAX_TOKENS, AnswerReader
from tests.fakes.llm import FakeLLM, Raw
from tests.fuzz.examples import anything, numbers, objects, tried, words

CALLS = st.lists(
    objects(
        {"index": st.integers(-1, 3), "function": objects({"name": words, "arguments": words})},
        id=words,
    ),
    max_size=3,
)
USAGE = objects(
    {"prompt_tokens": numbers, "completion_tokens": numbers},
    prompt_tokens_details=objects({"cached_tokens": numbers}),
)
CHUNK = objects(
    {
        "choices": st.lists(
            objects(
                {"delta": objects({"content": words}, tool_calls=CALLS)},
                finish_reason=st.sampled_from(["stop", "tool_calls", None]),
            ),
            max_size=2,
        )
    },
    usage=USAGE,
    error=anything,
)
WHOLE = objects(
    {"choices": st.lists(objects({"message": objects({"content": words}, tool_calls=CALLS)}))},
    usage=USAGE,
)
LINES = st.lists(
    st.one_of(
        CHUNK.map(lambda data: b"data: " + dumps(data)),
        st.binary(max_size=40),
        st.sampled_from([b"data: [DONE]", b"data:", b": comment", b"event: x", b"\r", b"data: {"]),
    ),
    max_size=8,
)


def dumps(data: Any) -> bytes:
    """Also what JSON has no words for, as Python writes it."""
    return json.dumps(data).encode("utf-8", "surrogatepass")


def read(pieces: list[bytes]) -> None:
    reply = ModelReply()
    reader = AnswerReader("m")
    shown: list[str] = []
    try:
        for piece in pieces:
            shown += reader.feed(piece)
        shown += reader.end()
    except LLMError as error:
        assert error.code
    reader.fill(reply, 100)
    storable(reply)


def storable(reply: ModelReply) -> None:
    """All of it fits into columns."""
    texts = [
        reply.text,
        reply.reasoning,
        *(text for call in reply.tool_calls for text in vars(call).values()),
    ]
    for text in texts:
        assert isinstance(text, str)
        assert not UNSTORABLE.search(text)
    for count in vars(reply.usage).values():
        assert 0 <= count <= MAX_TOKENS


@tried(150, lines=LINES, cuts=st.lists(st.integers(1, 200), max_size=4))
def test_a_stream_is_an_answer_or_an_error(lines: list[bytes], cuts: list[int]) -> None:
    raw = b"\n\n".join(lines) + b"\n\n"
    pieces, start = [], 0
    for cut in cuts:
        pieces.append(raw[start : start + cut])
        start += cut
    read([*pieces, raw[start:]])


@tried(80, body=st.one_of(WHOLE.map(dumps), anything.map(dumps), st.binary(max_size=60)))
def test_a_whole_answer_is_an_answer_or_an_error(body: bytes) -> None:
    read([body])


@tried(100, value=st.one_of(words, numbers.map(str), st.datetimes().map(str)))
def test_a_wish_to_wait_is_a_time_or_none(value: str) -> None:
    seconds = errors.retry_after(value)
    assert seconds is None or 0 < seconds <= errors.MAX_RETRY_AFTER_SECONDS


ERROR = objects({"error": objects({"message": words, "code": words}, type=words)})
HEADER = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20)


@tried(
    40,
    status=st.sampled_from([200, 201, 204, 302, 400, 401, 404, 408, 409, 413, 429, 500, 599]),
    body=st.one_of(ERROR.map(dumps), anything.map(dumps), st.binary(max_size=60)),
    kind=st.sampled_from(["application/json", "text/event-stream", "text/html; charset=nope", ""]),
)
def test_a_refusal_over_the_wire_is_an_error(
    model: FakeLLM, status: int, body: bytes, kind: str
) -> None:
    model.reset(Raw(body, status, kind))
    try:
        storable(completions.complete([{"role": "user", "content": "Hi"}], model="m"))
    except completions.LLMError as error:
        assert error.code
        assert len(str(error)) < 200


@pytest.fixture
def _offered(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings.AGENT_TOOLS = ["repeat"]
    monkeypatch.setattr(tools, "TOOLS", dict(tools.TOOLS))

    @tools.tool(text={"type": "string"})
    def repeat(text: str) -> str:
        return str(text)


ARGUMENTS = objects({"text": words}, other=anything)


@pytest.mark.usefixtures("_offered")
@tried(
    60,
    name=st.sampled_from(["repeat", "current_time", "", "__class__"]),
    arguments=st.one_of(ARGUMENTS.map(dumps).map(bytes.decode), words, st.just("[" * 5000)),
)
def test_a_tool_call_is_carried_out_or_told_to_be_wrong(name: str, arguments: str) -> None:
    try:
        assert isinstance(tools.call(name, arguments), str)
        assert name == "repeat"
        assert set(orjson.loads(arguments)) == {"text"}
    except tools.ToolError as error:
        assert str(error)
