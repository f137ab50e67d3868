"""The reader of a model's answer, without I/O: bytes in, text out, and a reply at the end.

An answer is a stream of server-sent events or one JSON document, whatever its content type says.
Servers differ in all that the protocol leaves open, and in more: tests/fakes/servers has samples.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import orjson

from agents.llm import errors
from agents.llm.errors import ErrorReport
from agents.llm.reasoning import ReasoningFilter
from agents.llm.replies import (
    BYTES_PER_TOKEN,
    FINISH_REASONS,
    ModelReply,
    TokenUsage,
    storable,
)
from agents.llm.sse import BOM, EventReader
from agents.llm.toolcalls import ToolCallCollector

# More than any call uses; a wrong count of the endpoint must not overflow a column.
MAX_TOKENS = 50_000_000
HALF_SURROGATE_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")
# Even the longest tokens of a text have fewer bytes on average.
MAX_BYTES_PER_TOKEN = 16
# Counted in deltas or bytes, tokens are only about right.
CAP_SLACK_TOKENS = 8
SYNONYMS = {
    "function_call": "tool_calls",
    "tool_use": "tool_calls",
    "max_tokens": "length",
    "max_output_tokens": "length",
    "model_length": "length",
    "refusal": "content_filter",
    "safety": "content_filter",
    "recitation": "content_filter",
    "content-filter": "content_filter",
    "eos": "stop",
    "eos_token": "stop",
    "end_turn": "stop",
    "stop_sequence": "stop",
}
FAILED_REASONS = ("error", "abort", "engine_error")
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking", "reasoning_details")
DONE = object()
# Of shapes that no case foresees: a schema would cost too much per token.
UNEXPECTED = (AttributeError, IndexError, KeyError, TypeError, ValueError, RecursionError)


class OutputLimitReached(Exception):
    """The answer exceeds the limit that was sent: the server does not keep it."""


class AnswerReader:
    """Reads one answer. `max_tokens` ends it where the server does not; 0: no limit."""

    def __init__(self, model: str = "", *, max_tokens: int = 0) -> None:
        self.is_complete = False  # even if the connection is lost afterwards
        self.is_finished = False  # a finish reason has come
        self.finish_reason = ""
        self.usage: TokenUsage | None = None
        self._model = model
        self._cap = max_tokens and max_tokens + max(CAP_SLACK_TOKENS, max_tokens // 4)
        self._calls = ToolCallCollector()
        self._filter = ReasoningFilter()
        self._reasoning: list[str] = []
        self._out: list[str] = []
        self._deltas = 0
        self._characters = 0
        self._events = EventReader(_parsed, self._take)
        # The beginning, until it shows what the body is; then all of a document.
        self._start: list[bytes] = []
        self._is_undecided = True
        self._is_document = False
        self._size = 0
        self._is_refusal = False

    def feed(self, chunk: bytes) -> list[str]:
        """Return the new text of the answer. Raises `LLMError` and `OutputLimitReached`."""
        self._size += len(chunk)
        if self._is_undecided:
            chunk = self._decide(chunk)
        if self._is_document:
            self._start.append(chunk)
            return []
        if chunk and not self.is_complete:
            # Not by a context manager: this is done for each token.
            try:
                self._events.feed(chunk)
            except UNEXPECTED as error:
                if not self.is_finished and not self.is_complete:
                    raise errors.UNREADABLE.error() from error
        if self._cap and not self.is_finished and self._exceeds_cap():
            raise OutputLimitReached
        out, self._out = self._out, []
        return out

    def end(self) -> list[str]:
        """Take the end of the body. Raises `LLMError` unless the answer is whole."""
        with _readable():
            if self._is_document:
                self._whole(b"".join(self._start))
            elif not self.is_complete:
                if self._start:
                    self._events.feed(b"".join(self._start))
                self._end_events()
        if self._is_silent:
            # llama-cpp-python's answer to a context that is too long.
            raise errors.LLMError(
                "The model gave no answer at all: the conversation may be too long for it.",
                code=errors.TOO_LONG.code,
                permanent=True,
            )
        if not self.is_finished and not (self.is_complete and self.has_answer):
            raise errors.BROKEN.error()
        return self._finish()

    def cut(self) -> list[str]:
        """End the answer at the output limit, as a server would have."""
        self.is_finished = self.is_complete = True
        self.finish_reason = "length"
        return self._finish()

    @property
    def _is_silent(self) -> bool:
        """Return whether nothing came but white space and comments."""
        return not (self._is_document or self._events.count or self._events.has_other)

    @property
    def has_answer(self) -> bool:
        return bool(self._filter.text or self._calls)

    def fill(self, reply: ModelReply, prompt_bytes: int) -> None:
        """Put what has come into the reply, whole or not."""
        reply.text = "".join(self._filter.text)
        parts = ("".join(self._reasoning), "".join(self._filter.reasoning).strip())
        reply.reasoning = "\n\n".join(part for part in parts if part)
        reply.finish_reason, reply.is_refusal = self.finish_reason, self._is_refusal
        if self.is_finished or self.is_complete:
            reply.tool_calls = self._calls.calls()
        reply.usage = self.usage or TokenUsage()
        if self._size:
            prompt = reply.usage.prompt_tokens or prompt_bytes // BYTES_PER_TOKEN + 1
            completion = reply.usage.completion_tokens or self._estimated_output(reply)
            if (prompt, completion) != (reply.usage.prompt_tokens, reply.usage.completion_tokens):
                cached = reply.usage.cached_tokens
                reply.usage = TokenUsage(prompt, completion, cached, is_estimated=True)

    def _estimated_output(self, reply: ModelReply) -> int:
        size = len(reply.text.encode()) + len(reply.reasoning.encode()) + self._calls.size
        return min(max(self._deltas, -(-size // BYTES_PER_TOKEN)), MAX_TOKENS)

    def _decide(self, chunk: bytes) -> bytes:
        """Decide what the body is by its first characters. Raises `LLMError` for a web page."""
        start = b"".join([*self._start, chunk])
        text = start.removeprefix(BOM).lstrip()
        if not text or BOM.startswith(start):
            self._start = [start[-len(BOM) :]]
            return b""
        self._start, self._is_undecided = [], False
        self._is_document = text[:1] in (b"{", b"[") or text.startswith(b"null")
        if text.startswith(b"<"):
            raise errors.WEB_PAGE.error()
        return start

    def _end_events(self) -> None:
        try:
            self._events.end()
        except ValueError:
            if self.is_finished:
                return
            if self._events.count:
                raise errors.BROKEN.error() from None
            raise

    def pending(self) -> list[str]:
        """Return the text that was read before an error."""
        out, self._out = self._out, []
        return out

    def _exceeds_cap(self) -> bool:
        size = self._characters + self._calls.size
        likely = min(self._deltas, size // BYTES_PER_TOKEN)
        return max(likely, size // MAX_BYTES_PER_TOKEN) > self._cap

    def _finish(self) -> list[str]:
        if held := self._filter.end():
            self._out.append(held)
        self._filter.separate_lone_block()
        return self.pending()

    def _take(self, name: str, chunk: Any) -> None:
        """Take the data of an event."""
        if self.is_complete:
            return  # the rest is read, so that the connection can be reused
        if chunk is DONE:
            self.is_complete = True
            return
        if not isinstance(chunk, dict):
            return
        if (error := chunk.get("error")) or name == "error" or chunk.get("object") == "error":
            if not self.is_finished:
                report = ErrorReport.of(chunk if error else {"error": chunk})
                raise errors.from_answer(report, self._model)
            self.is_complete = True
            return
        if usage := chunk.get("usage"):
            self._note_usage(usage)
        if (choices := chunk.get("choices")) and isinstance(choices, list):
            self._choice(choices[0])
        elif not self.is_finished and _is_bare_error(chunk):
            raise errors.from_answer(ErrorReport.of({"error": chunk}), self._model)

    def _choice(self, choice: Any) -> None:
        if not isinstance(choice, dict) or choice.get("index"):
            return
        if delta := choice.get("delta"):
            self._delta(delta)
        elif (message := choice.get("message")) and not self.has_answer:
            self._delta(message)
        if reason := choice.get("finish_reason"):
            if error := choice.get("error"):
                raise errors.from_answer(ErrorReport.of({"error": error}), self._model)
            self._finished(reason)

    def _delta(self, delta: dict[str, Any]) -> None:
        if content := delta.get("content"):
            self._deltas += 1
            if isinstance(content, str):
                self._text(content)
            else:
                self._parts(content)
        if len(delta) > 1 or not content:
            self._other(delta)

    def _other(self, delta: dict[str, Any]) -> None:
        for name in REASONING_FIELDS:
            if value := delta.get(name):
                self._deltas += 0 if delta.get("content") else 1
                self._reason(_text_of(value))
                break
        if refusal := delta.get("refusal"):
            self._deltas += 1
            self._refuse(_text_of(refusal))
        calls = delta.get("tool_calls")
        if calls:
            self._deltas += 1
            for fragment in calls if isinstance(calls, list) else [calls]:
                self._calls.add(fragment)
        elif function := delta.get("function_call"):
            self._deltas += 1
            self._calls.add_legacy(function)

    def _text(self, piece: str) -> None:
        piece = storable(piece)
        self._characters += len(piece)
        if text := self._filter.feed(piece):
            self._out.append(text)

    def _reason(self, piece: str) -> None:
        self._characters += len(piece)
        self._reasoning.append(storable(piece))

    def _refuse(self, piece: str) -> None:
        """Take the text of a refusal: it is the answer."""
        self._characters += len(piece)
        if piece := storable(piece):
            self._is_refusal = True
            self._filter.text.append(piece)
            self._out.append(piece)

    def _parts(self, parts: Any) -> None:
        """Take content that is a list of parts."""
        for part in parts if isinstance(parts, list) else [parts]:
            if isinstance(part, str):
                self._text(part)
                continue
            if not isinstance(part, dict):
                continue
            kind = part.get("type", "text")
            if kind in ("thinking", "reasoning", "reasoning_content"):
                self._reason(_text_of(part))
            elif kind == "refusal":
                self._refuse(_text_of(part))
            elif kind in ("text", "output_text"):
                self._text(_text_of(part.get("text")))

    def _finished(self, reason: Any) -> None:
        reason = str(reason).lower()
        if reason in FAILED_REASONS:
            raise errors.BROKEN.error()
        self.is_finished = True
        reason = SYNONYMS.get(reason, reason)
        self.finish_reason = reason if reason in FINISH_REASONS else ""

    def _whole(self, data: bytes) -> None:
        """Take an answer in one JSON document."""
        body = _parsed(data)
        choices = body.get("choices") if isinstance(body, dict) else None
        if not choices and _has_error(body):
            raise errors.from_answer(ErrorReport.of(body), self._model)
        choice = choices[0] if isinstance(choices, list) and choices else None
        if not isinstance(choice, dict):
            raise ValueError("no choice")
        message = choice.get("message") or choice.get("delta")
        if not isinstance(message, dict):
            raise ValueError("no message")
        calls = message.get("tool_calls") or []
        numbered = [
            {**call, "index": number} for number, call in enumerate(calls) if isinstance(call, dict)
        ]
        self._delta({**message, "tool_calls": numbered})
        self._note_usage(body.get("usage"))
        if reason := choice.get("finish_reason"):
            self._finished(reason)
        self.is_complete = self.is_finished = True

    def _note_usage(self, usage: Any) -> None:
        """Note the reported tokens. What cannot be read counts as not reported."""
        if not isinstance(usage, dict):
            return
        prompt = _count(usage, "prompt_tokens")
        completion = _count(usage, "completion_tokens")
        details = usage.get("prompt_tokens_details")
        cached = _count(details, "cached_tokens") if isinstance(details, dict) else 0
        if prompt or completion:
            prompt = prompt or max(0, _count(usage, "total_tokens") - completion)
            self.usage = TokenUsage(prompt, completion, min(cached, prompt))


def _is_bare_error(chunk: dict[str, Any]) -> bool:
    """Return whether an event without a choice is an error that is not marked as one."""
    return bool(chunk.get("detail") or (chunk.get("message") and chunk.get("code")))


def _has_error(body: Any) -> bool:
    if isinstance(body, list):
        return bool(body) and _has_error(body[0])
    return isinstance(body, dict) and bool(
        body.get("error") or body.get("object") == "error" or body.get("detail")
    )


def _text_of(value: Any) -> str:
    """Return the text in a value: a text, an object with a text, or a list of them."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "".join(map(_text_of, value))
    if isinstance(value, dict):
        names = ("text", "thinking", "reasoning", "content", "summary", "refusal")
        return next((_text_of(value[name]) for name in names if value.get(name)), "")
    return ""


@contextmanager
def _readable() -> Iterator[None]:
    """Convert errors of unexpected shapes to `LLMError`."""
    try:
        yield
    except UNEXPECTED as error:
        raise errors.UNREADABLE.error() from error


def _parsed(data: bytes) -> Any:
    """Parse JSON of an endpoint. Some cut an answer within a character and escape the halves of its
    surrogate pair: orjson refuses those, and the run would fail for one emoji. Raises `ValueError`."""
    if data == b"[DONE]":
        return DONE
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        if not HALF_SURROGATE_PAIR.search(data):
            raise
    try:
        return json.loads(data, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("too deep") from error


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _count(usage: dict[str, Any], name: str) -> int:
    try:
        return min(max(0, int(usage.get(name) or 0)), MAX_TOKENS)
    except (TypeError, ValueError, OverflowError):
        return 0
