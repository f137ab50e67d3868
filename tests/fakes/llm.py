"""A model endpoint that speaks the OpenAI protocol over real HTTP and misbehaves on demand.

Tests hold it in a thread of their own process, to script answers and read what was asked:

    with FakeLLM() as llm:
        llm.script(Failure(429, retry_after=1), Reply("Hello"))
        ...
        assert llm.requests[1].last_user == "Hi"

Benchmarks run it as a process of its own (`LLMProcess`, or `python -m tests.fakes.llm`), so that it
does not compete for the interpreter lock of what drives the load.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import math
import os
import subprocess
import sys
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol, Self
from urllib.parse import urlsplit

import orjson

from tests.fakes.wire import LAST_CHUNK, Request, Server, Steps, chunk, head, response

_STREAM_HEAD = head(200, {"content-type": "text/event-stream", "transfer-encoding": "chunked"})
_DONE = b"data: [DONE]\n\n"
_ids = itertools.count(1)


class Call(Request):
    """A request for a completion."""

    __slots__ = ()

    @classmethod
    def of(cls, request: Request) -> Self:
        return cls(request.method, request.path, request.headers, request.body, request.at)

    @property
    def model(self) -> str:
        return str(self._fields.get("model", ""))

    @property
    def messages(self) -> list[dict[str, Any]]:
        return list(self._fields.get("messages", ()))

    @property
    def stream(self) -> bool:
        return bool(self._fields.get("stream"))

    @property
    def include_usage(self) -> bool:
        return bool((self._fields.get("stream_options") or {}).get("include_usage"))

    @property
    def last_user(self) -> str:
        """The text of the newest user message."""
        for message in reversed(self.messages):
            if message.get("role") == "user":
                return _text_of(message.get("content"))
        return ""

    @property
    def _fields(self) -> dict[str, Any]:
        return self.body if isinstance(self.body, dict) else {}


class Answer(Protocol):
    """What the endpoint does with one call."""

    def steps(self, call: Call) -> Steps: ...


Behaviour = Answer | Callable[[Call], Answer]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool that the model asks for; arguments given as a string are sent as they are."""

    name: str
    arguments: dict[str, Any] | str = "{}"
    id: str = "call_1"

    @property
    def json(self) -> str:
        if isinstance(self.arguments, str):
            return self.arguments
        return _dumps(self.arguments).decode()


@dataclass(frozen=True, slots=True)
class Reply:
    """A good answer.

    `text` is the answer, a function of the call, or a tuple of exactly the deltas to send; NUL and
    lone surrogates go out as JSON escapes. `latency` is waited before the headers, `delta_latency`
    before each delta (0: all in one write); both are seconds. `comment` is an SSE comment sent
    first, as routers do while the model thinks.
    """

    text: str | tuple[str, ...] | Callable[[Call], str] | None = None
    deltas: int = 8
    latency: float = 0
    delta_latency: float = 0
    tool_calls: tuple[ToolCall, ...] = ()
    finish_reason: str = ""
    comment: str = ""

    def steps(self, call: Call) -> Steps:
        if self.latency:
            yield self.latency
        if not call.stream:
            yield response(200, _dumps(self._completion(call)))
            return
        opening, deltas, closing = self.events(call)
        if not self.delta_latency:
            yield _STREAM_HEAD + chunk(opening + deltas + closing) + LAST_CHUNK
            return
        yield _STREAM_HEAD + chunk(opening)
        for delta in deltas:
            yield self.delta_latency
            yield chunk([delta])
        yield chunk(closing) + LAST_CHUNK

    def beginning(self, call: Call, deltas: int) -> bytes:
        """Return the bytes on the wire after `deltas` deltas."""
        opening, all_deltas, _ = self.events(call)
        return _STREAM_HEAD + chunk(opening + all_deltas[:deltas])

    def events(self, call: Call) -> tuple[list[bytes], list[bytes], list[bytes]]:
        """Return the server-sent events before the deltas, the deltas, and those after them."""
        pieces = self._pieces(call)
        envelope = _envelope(call, "chat.completion.chunk")
        opening = [f": {self.comment}\n\n".encode()] if self.comment else []
        opening.append(_event(envelope, {"role": "assistant", "content": ""}))
        deltas = [_event(envelope, {"content": piece}) for piece in pieces]
        deltas += [_event(envelope, {"tool_calls": [p]}) for p in self._tool_call_parts()]
        closing = [_event(envelope, {}, self._finish_reason), _DONE]
        if call.include_usage:
            closing.insert(1, _sse(envelope | {"choices": [], "usage": _usage(call, pieces)}))
        return opening, deltas, closing

    def _pieces(self, call: Call) -> list[str]:
        if isinstance(self.text, tuple):
            return list(self.text)
        text = self.text(call) if callable(self.text) else self.text
        if text is None:
            text = "" if self.tool_calls else f"Answer to: {call.last_user}"
        return _cut(text, self.deltas)

    def _tool_call_parts(self) -> Iterator[dict[str, Any]]:
        for index, tool in enumerate(self.tool_calls):
            function = {"name": tool.name, "arguments": ""}
            yield {"index": index, "id": tool.id, "type": "function", "function": function}
            for part in _cut(tool.json, 3):
                yield {"index": index, "function": {"arguments": part}}

    def _completion(self, call: Call) -> dict[str, Any]:
        pieces = self._pieces(call)
        message: dict[str, Any] = {"role": "assistant", "content": "".join(pieces) or None}
        if self.tool_calls:
            message["tool_calls"] = [
                {"id": t.id, "type": "function", "function": {"name": t.name, "arguments": t.json}}
                for t in self.tool_calls
            ]
        choice = {"index": 0, "message": message, "finish_reason": self._finish_reason}
        envelope = _envelope(call, "chat.completion")
        return envelope | {"choices": [choice], "usage": _usage(call, pieces)}

    @property
    def _finish_reason(self) -> str:
        return self.finish_reason or ("tool_calls" if self.tool_calls else "stop")


@dataclass(frozen=True, slots=True)
class Clock:
    """An answer whose deltas carry their time of sending (`time.monotonic()`, which processes of
    one machine share), as `@123.456789 `."""

    deltas: int = 8
    latency: float = 0
    delta_latency: float = 0.02

    def steps(self, call: Call) -> Steps:
        envelope = _envelope(call, "chat.completion.chunk")
        yield self.latency
        yield _STREAM_HEAD + chunk([_event(envelope, {"role": "assistant", "content": ""})])
        begun = time.monotonic()
        for number in range(1, self.deltas + 1):
            # As many a second as was asked for, on a machine that wakes late too.
            yield max(0.0, begun + number * self.delta_latency - time.monotonic())
            yield chunk([_event(envelope, {"content": f"@{time.monotonic():.6f} "})])
        yield chunk([_event(envelope, {}, "stop"), _DONE]) + LAST_CHUNK


@dataclass(frozen=True, slots=True)
class Failure:
    """An error status with OpenAI's error body; `retry_after` goes into the header as it is."""

    status: int
    code: str | None = None
    message: str = "The fake model refuses."
    retry_after: int | float | str | None = None
    latency: float = 0

    def steps(self, call: Call) -> Steps:
        if self.latency:
            yield self.latency
        headers = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        yield response(self.status, _error(self.message, self.code), headers=headers)


@dataclass(frozen=True, slots=True)
class Hang:
    """Silence on an open connection: before the headers, or `after` so many deltas."""

    after: int | None = None
    reply: Reply = Reply()

    def steps(self, call: Call) -> Steps:
        if self.after is not None:
            yield self.reply.beginning(call, self.after)
        yield math.inf


@dataclass(frozen=True, slots=True)
class Paced:
    """An answer that takes a step of that number, from 0, only when it may."""

    answer: Answer
    may: Callable[[int], bool]

    def steps(self, call: Call) -> Steps:
        for number, step in enumerate(self.answer.steps(call)):
            while not self.may(number):
                yield 0.02
            yield step


def held(answer: Answer, may_go_on: threading.Event, steps_before: int = 0) -> Paced:
    """Pause an answer after so many of its steps, until it may continue. Of a `Reply` with
    `delta_latency` and no `latency`, `1 + 2 * n` are the steps of the first n deltas."""
    return Paced(answer, lambda step: step < steps_before or may_go_on.is_set())


@dataclass(frozen=True, slots=True)
class Cut:
    """The connection goes away: without an answer, or `after` so many deltas.

    `clean` ends the HTTP message properly instead, as proxies do when the model behind them dies:
    only the missing finish reason shows that the answer is incomplete.
    """

    after: int | None = None
    clean: bool = False
    reply: Reply = Reply()

    def steps(self, call: Call) -> Steps:
        beginning = b"" if self.after is None else self.reply.beginning(call, self.after)
        if self.clean and beginning:
            yield beginning + LAST_CHUNK
            return
        yield beginning
        # A moment for the client to read: a reset discards what it has not read yet.
        yield 0.02
        yield None


@dataclass(frozen=True, slots=True)
class StreamError:
    """A 200 whose stream turns into an error `after` so many deltas, as routers and vLLM do."""

    after: int = 0
    message: str = "The model behind this endpoint failed."
    reply: Reply = Reply()

    def steps(self, call: Call) -> Steps:
        event = b"data: %b\n\n" % _error(self.message, "server_error")
        yield self.reply.beginning(call, self.after) + chunk([event]) + LAST_CHUNK


@dataclass(frozen=True, slots=True)
class Raw:
    """Any bytes as the body; they may depend on the call (`call.stream`)."""

    body: bytes | Callable[[Call], bytes]
    status: int = 200
    content_type: str = ""
    headers: dict[str, str] | None = None

    def steps(self, call: Call) -> Steps:
        body = self.body(call) if callable(self.body) else self.body
        usual = "text/event-stream" if call.stream else "application/json"
        yield response(self.status, body, self.content_type or usual, self.headers)


def call_tool(name: str, /, **arguments: Any) -> Reply:
    """Return a reply that calls one tool and has no text."""
    return Reply(tool_calls=(ToolCall(name, arguments),))


def template_error(messages: list[dict[str, Any]]) -> str:
    """Return what a strict chat template (Mistral, Gemma, Llama 2) raises for a message list; empty
    where it takes it. Tool rounds do not count, as there."""
    talk = [m for m in messages if m["role"] != "tool" and not m.get("tool_calls")]
    if talk and talk[0]["role"] == "system":
        talk = talk[1:]
    if any(not _text_of(message.get("content")).strip() for message in talk):
        return "A message has no content."
    wanted = itertools.cycle(["user", "assistant"])
    if any(message["role"] != role for message, role in zip(talk, wanted, strict=False)):
        return "After the optional system message, roles must alternate user/assistant/..."
    if not talk or talk[-1]["role"] != "user":
        return "The last message must be the user's."
    return ""


@dataclass(frozen=True, slots=True)
class Strict:
    """An endpoint whose chat template refuses message lists that break its rule."""

    answer: Behaviour = Reply()

    def __call__(self, call: Call) -> Answer:
        if error := template_error(call.messages):
            return Failure(400, message=error)
        return self.answer(call) if callable(self.answer) else self.answer


CONTEXT_TOO_LONG = Failure(
    400,
    code="context_length_exceeded",
    message="This model's maximum context length is 128000 tokens.",
)


@dataclass(frozen=True, slots=True)
class SmallContext:
    """An endpoint whose context takes so many characters of messages."""

    characters: int
    answer: Behaviour = Reply()

    def __call__(self, call: Call) -> Answer:
        if sum(len(_text_of(each.get("content"))) for each in call.messages) > self.characters:
            return CONTEXT_TOO_LONG
        return self.answer(call) if callable(self.answer) else self.answer


def _truncated(call: Call) -> bytes:
    body = _whole_body(call)
    return body[: body.index(b'"choices"') + 20]


def _without_choices(call: Call) -> bytes:
    envelope = _envelope(call, "chat.completion.chunk" if call.stream else "chat.completion")
    body = envelope | {"choices": []}
    return _sse(body) + _DONE if call.stream else _dumps(body)


def _whole_body(call: Call) -> bytes:
    if call.stream:
        return b"".join(itertools.chain(*Reply("Answer").events(call)))
    return _dumps(Reply("Answer")._completion(call))


# Answers of status 200 that no client should believe, by name, for parametrized tests.
GARBAGE: dict[str, Raw] = {
    "html": Raw(b"<!doctype html><title>Sign in</title><h1>Sign in</h1>", content_type="text/html"),
    "wrong content type": Raw(b"hello", content_type="application/octet-stream"),
    "truncated json": Raw(_truncated),
    "no choices": Raw(_without_choices),
    "invalid utf-8": Raw(lambda call: _whole_body(call).replace(b'"A', b'"\xff\xfe\xc3(')),
    "json of another shape": Raw(lambda call: b"data: [1]\n\n" if call.stream else b"[1]"),
    "null": Raw(lambda call: b"data: null\n\n" if call.stream else b"null"),
    "nothing": Raw(b""),
}


class FakeLLM:
    """The endpoint in a thread of this process.

    Calls take the scripted behaviours in order of arrival, then `default`. A behaviour is an
    answer, or a function of the call that returns one, for calls whose order is not certain.
    """

    def __init__(self, default: Behaviour = Reply(), *, port: int = 0) -> None:
        self.default = default
        self.models = ["gpt-4o-mini", "gpt-4o"]
        self.requests: list[Call] = []
        self.disconnects: list[Call] = []
        self._script: deque[Behaviour] = deque()
        self._changed = threading.Condition()
        self._server = Server(self._answer, self._gone, port=port)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.port}/v1"

    @property
    def connections(self) -> int:
        """How many were made so far, to see whether clients keep them."""
        return self._server.accepted

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.stop()

    def script(self, *behaviours: Behaviour) -> None:
        """Queue these for the next calls."""
        with self._changed:
            self._script.extend(behaviours)

    def reset(self, default: Behaviour = Reply()) -> None:
        """Forget the script and the records."""
        with self._changed:
            self.default = default
            self._script.clear()
            self.requests.clear()
            self.disconnects.clear()

    def wait_for_requests(self, count: int = 1, seconds: float = 60) -> list[Call]:
        """Wait for `count` requests and return all so far."""
        return self._wait(self.requests, count, seconds)

    def wait_for_disconnects(self, count: int = 1, seconds: float = 60) -> list[Call]:
        """Wait for `count` calls whose client left before the answer's end; return them."""
        return self._wait(self.disconnects, count, seconds)

    def _wait(self, records: list[Call], count: int, seconds: float) -> list[Call]:
        with self._changed:
            if not self._changed.wait_for(lambda: len(records) >= count, seconds):
                raise TimeoutError(f"{len(records)} of {count} within {seconds} s")
            return list(records)

    def _answer(self, request: Request) -> Steps:
        call = Call.of(request)
        if refusal := _refusal(call, self.models):
            return refusal.steps(call)
        with self._changed:
            behaviour = self._script.popleft() if self._script else self.default
            self.requests.append(call)
            self._changed.notify_all()
        answer = behaviour(call) if callable(behaviour) else behaviour
        return answer.steps(call)

    def _gone(self, request: Request) -> None:
        with self._changed:
            self.disconnects.append(Call.of(request))
            self._changed.notify_all()


class LLMProcess:
    """The endpoint as a process of its own, for measurements: one answer for every call."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.fakes.llm", "--attached"]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # at Ctrl-C what asks it is stopped first
        )
        assert self._process.stdout
        self.url = self._process.stdout.readline().strip()
        if not self.url:
            raise RuntimeError("the fake model did not start")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.terminate()
        self._process.communicate(timeout=10)

    def configure(
        self, *, latency: float, deltas: int = 8, delta_latency: float = 0, clock: bool = False
    ) -> None:
        """Answer like this from now on (see Reply, or Clock), and count from zero."""
        reply = {"latency": latency, "deltas": deltas, "delta_latency": delta_latency}
        reply |= {"clock": clock}
        self._control("POST", orjson.dumps(reply))

    def stats(self) -> dict[str, float]:
        """Return the calls, the seconds from whole request to whole answer, and CPU seconds."""
        return dict(self._control("GET"))

    def _control(self, method: str, body: bytes | None = None) -> Any:
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=10)
        try:
            connection.request(method, "/control", body)
            return orjson.loads(connection.getresponse().read())
        finally:
            connection.close()


class _Process:
    """What runs inside that process; it keeps times, not requests."""

    def __init__(self, reply: Reply | Clock) -> None:
        self.reply = reply
        self.seconds = array("d")

    def answer(self, request: Request) -> Steps:
        call = Call.of(request)
        if call.path == "/control":
            return self._control(call).steps(call)
        if refusal := _refusal(call, ["gpt-4o-mini"]):
            return refusal.steps(call)
        return self._timed(call)

    def _timed(self, call: Call) -> Steps:
        yield from self.reply.steps(call)
        self.seconds.append(time.monotonic() - call.at)

    def _control(self, call: Call) -> Raw:
        if call.method == "POST":
            clock = call.body.pop("clock", False)
            self.reply = Clock(**call.body) if clock else Reply(**call.body)
            self.seconds = array("d")
        seconds = self.seconds or [0.0]
        stats = {
            "calls": len(self.seconds),
            "p50": median(seconds),
            "max": max(seconds),
            "cpu": time.process_time(),
        }
        return Raw(orjson.dumps(stats))


def _refusal(call: Call, models: list[str]) -> Raw | Failure | None:
    if call.path.endswith("/models"):
        data = [{"id": m, "object": "model", "created": 0, "owned_by": "fake"} for m in models]
        return Raw(orjson.dumps({"object": "list", "data": data}))
    if not call.path.endswith("/chat/completions"):
        return Failure(404, message=f"Unknown request URL: {call.method} {call.path}.")
    if not isinstance(call.body, dict):
        return Failure(400, message="We could not parse the JSON body of your request.")
    return None


def _envelope(call: Call, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{next(_ids)}",
        "object": kind,
        "created": int(time.time()),
        "model": call.model,
    }


def _event(envelope: dict[str, Any], delta: dict[str, Any], finish: str | None = None) -> bytes:
    return _sse(envelope | {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})


def _sse(body: dict[str, Any]) -> bytes:
    return b"data: %b\n\n" % _dumps(body)


def _dumps(body: Any) -> bytes:
    try:
        return orjson.dumps(body)
    except orjson.JSONEncodeError:
        # orjson refuses lone surrogates, which a model's endpoint may well send as escapes.
        return json.dumps(body).encode()


def _error(message: str, code: str | None) -> bytes:
    error = {"message": message, "type": "fake_error", "param": None, "code": code}
    return orjson.dumps({"error": error})


def _usage(call: Call, pieces: list[str]) -> dict[str, int]:
    prompt = sum(len(_text_of(message.get("content"))) for message in call.messages) // 4 + 1
    completion = max(1, len(pieces))
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def _text_of(content: Any) -> str:
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content)
    return content or ""


def _cut(text: str, count: int) -> list[str]:
    size = max(1, math.ceil(len(text) / max(1, count)))
    return [text[i : i + size] for i in range(0, len(text), size)]


def _end_with_stdin() -> None:
    """Whoever started this process may be killed without a chance to end it."""
    sys.stdin.read()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description="A fake model endpoint; prints its URL.")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--latency-ms", type=float, default=0)
    parser.add_argument("--deltas", type=int, default=8)
    parser.add_argument("--delta-latency-ms", type=float, default=0)
    parser.add_argument("--attached", action="store_true", help="end when stdin is closed")
    options = parser.parse_args()
    reply = Reply(
        latency=options.latency_ms / 1000,
        deltas=options.deltas,
        delta_latency=options.delta_latency_ms / 1000,
    )
    server = Server(_Process(reply).answer, port=options.port)
    if options.attached:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    server.run(lambda: os.write(1, f"http://127.0.0.1:{server.port}/v1\n".encode()))


if __name__ == "__main__":
    main()
