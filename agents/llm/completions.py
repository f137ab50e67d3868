"""Calls of the model: the OpenAI SDK with any endpoint that has `/chat/completions`.

Without a key and a base URL there is no model, and an echo answers (see `configured()`).
"""

import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Protocol

import orjson
from django.conf import settings

from agents.llm import transport

if TYPE_CHECKING:
    import openai

logger = logging.getLogger(__name__)

# One answer must not fill the memory of a worker that many runs share.
MAX_RESPONSE_BYTES = 16 * 1024 * 1024
MAX_RETRY_AFTER_SECONDS = 15 * 60
# More than any call uses; a wrong count of the endpoint must not overflow a column.
MAX_TOKENS = 50_000_000
FINISH_REASONS = ("stop", "length", "content_filter", "tool_calls")
UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
HALF_SURROGATE_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")


class LLMError(Exception):
    """A call without an answer. The message is safe to show to users.

    `permanent`: a retry cannot succeed. `retry_after`: seconds that the endpoint requested. `code`:
    stable, for grouping.
    """

    def __init__(
        self, message: str, *, code: str, permanent: bool, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.permanent = permanent
        self.retry_after = retry_after


class Stopped(Exception):
    """The run was cancelled, or taken from this worker."""


Cancel = Callable[[], None]


@dataclass(frozen=True)
class TokenUsage:
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0  # of the prompt tokens
    is_estimated: bool = False

    def __add__(self, other: "TokenUsage") -> "TokenUsage":
        return TokenUsage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.cached_tokens + other.cached_tokens,
            self.is_estimated or other.is_estimated,
        )


@dataclass(frozen=True)
class ToolCall:
    id: str
    name: str
    arguments: str  # JSON as the model wrote it: not to be trusted


@dataclass
class ModelReply:
    text: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    usage: TokenUsage = TokenUsage()
    reasoning: str = ""  # never a part of the answer, and not sent to a model again
    finish_reason: str = ""  # of FINISH_REASONS, or empty


class Budget(Protocol):
    """The budget that calls are paid from (agents.usage.limits)."""

    def reserve(self, model: str, size: int) -> None:
        """Reserve the most that a call with `size` bytes of input may use. Raises `LLMError`."""

    def note(self, reply: ModelReply, *, refused: bool) -> None:
        """Note the usage of the call. `refused`: the endpoint refused it before it started."""


class NoBudget:
    def reserve(self, model: str, size: int) -> None: ...

    def note(self, reply: ModelReply, *, refused: bool) -> None: ...


NO_BUDGET = NoBudget()


@dataclass(frozen=True)
class CallOptions:
    """Limits and callbacks of a call; checked between chunks, as nothing can interrupt a thread."""

    deadline: float = float("inf")  # time.monotonic()
    stopped: Callable[[], bool] = lambda: False
    # Checks before a further call of the run, by the database: what the first was sent may have been
    # redacted since. Raises `Stopped`.
    still_held: Callable[[], None] = lambda: None
    # Receives the text, piece by piece.
    text: Callable[[str], None] = lambda piece: None
    # Receives a function that cancels the call from another thread, so that it also ends between two
    # chunks.
    on_cancel: Callable[[Cancel], AbstractContextManager[None]] = lambda cancel: nullcontext()
    budget: Budget = NO_BUDGET

    def check(self) -> None:
        if self.stopped():
            raise Stopped
        if time.monotonic() > self.deadline:
            raise _too_late()


def _too_late() -> LLMError:
    return LLMError("The answer took too long.", code="deadline", permanent=True)


def configured() -> bool:
    return bool(settings.OPENAI_API_KEY or settings.OPENAI_BASE_URL)


def complete(
    messages: list[dict[str, Any]],
    *,
    model: str,
    tools: list[dict[str, Any]] | None = None,
    options: CallOptions = CallOptions(),
    reply: ModelReply | None = None,
) -> ModelReply:
    """Call `model` once. `reply` is filled as the answer arrives, so that a failure leaves a partial
    answer. Raises `LLMError` and `Stopped`."""
    options.check()
    reply = reply or ModelReply()
    if not configured():
        reply.text = f"Handled prompt: {messages[-1]['content']}"
        reply.finish_reason = "stop"
        options.text(reply.text)
        return reply
    body: dict[str, Any] = {
        "model": model,
        "messages": messages,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if tools:
        body["tools"] = tools
    if settings.AGENT_MAX_OUTPUT_TOKENS:
        body["max_completion_tokens"] = settings.AGENT_MAX_OUTPUT_TOKENS
    sent = orjson.dumps(body)
    options.budget.reserve(model, len(sent))

    import aiohttp
    import httpx2
    import openai

    lost = (openai.APIConnectionError, httpx2.HTTPError, httpx2.StreamError, aiohttp.ClientError)
    refused = False
    answer = _Answer(options, reply)
    try:
        try:
            transport.post(sent, answer, deadline=options.deadline, on_cancel=options.on_cancel)
        except lost as error:  # the SDK wraps only some of the errors before the first byte
            if not answer.is_complete:
                raise _lost(error) from error
        return answer.end()
    except CancelledError:
        raise Stopped from None
    except TimeoutError:
        raise _too_late() from None
    except openai.APIStatusError as error:
        refused = True
        raise _refusal(error, model) from error
    finally:
        answer.store()
        options.budget.note(reply, refused=refused)


def warm_up() -> None:
    """Load the SDK, so that the first run of a worker need not wait for it."""
    if configured():
        transport.warm_up()


def _lost(error: Exception) -> LLMError:
    import httpx2
    import openai

    if isinstance(error, openai.APITimeoutError) and error.__cause__:
        error = error.__cause__  # type: ignore[assignment]
    # An endpoint that hangs up before it answers appears as a time-out of the connection.
    if isinstance(error, openai.APITimeoutError | httpx2.TimeoutException) and not isinstance(
        error, httpx2.ConnectTimeout
    ):
        return LLMError("The model did not answer in time.", code="timeout", permanent=False)
    return LLMError("The connection to the model was lost.", code="connection", permanent=False)


class _Answer:
    """The parser of an answer: server-sent events, or JSON from an endpoint that cannot stream."""

    def __init__(self, options: CallOptions, reply: ModelReply) -> None:
        self.is_complete = False  # even if the connection is lost afterwards
        self._options = options
        self._reply = reply
        self._is_json = False
        self._is_finished = False
        self._size = 0
        self._rest: list[bytes] = []  # joined once, however many chunks a line has
        self._pieces: list[str] = []
        self._calls: dict[int, dict[str, str]] = {}

    def begin(self, content_type: str) -> None:
        self._is_json = "json" in content_type

    def feed(self, chunk: bytes) -> None:
        """Parse some of the body. Raises `LLMError` and `Stopped`."""
        self._options.check()
        self._size += len(chunk)
        if self._size > MAX_RESPONSE_BYTES:
            raise LLMError("The model's answer is too long.", code="too_long", permanent=True)
        if self._is_json or b"\n" not in chunk:
            self._rest.append(chunk)
            return
        *lines, rest = b"".join([*self._rest, chunk]).split(b"\n")
        self._rest = [rest]
        with _readable():
            for line in lines:
                # The rest after `[DONE]` is read as well, so that the connection can be reused.
                if line.startswith(b"data:") and not self.is_complete:
                    self._parse_event(line[5:].strip())

    def end(self) -> ModelReply:
        """Return the answer, at the end of the body. Raises `LLMError` and `Stopped`."""
        with _readable():
            if self._is_json:
                return _whole(_parsed(b"".join(self._rest)), self._options, self._reply)
        if not self._is_finished:
            self._options.check()
            raise _broken_off()
        self._reply.tool_calls = [_tool_call(call) for _, call in sorted(self._calls.items())]
        return self._reply

    def store(self) -> None:
        """Put the text so far into the reply, complete or not."""
        if self._is_json:
            return
        self._reply.text = "".join(self._pieces)
        if not self._is_finished and self._reply.usage == TokenUsage():
            # Roughly what was paid for: the usage comes at the end, which is missing.
            self._reply.usage = TokenUsage(completion_tokens=len(self._pieces))

    def _parse_event(self, data: bytes) -> None:
        if data == b"[DONE]":
            self.is_complete = True
            return
        chunk = _parsed(data)
        if chunk.get("error"):
            if not self._is_finished:
                raise _broken_off()
            self.is_complete = True
            return
        if chunk.get("usage"):
            self._reply.usage = _usage(chunk["usage"])
        for choice in chunk["choices"][:1]:
            delta = choice.get("delta") or {}
            if piece := storable(delta.get("content") or ""):
                self._pieces.append(piece)
                self._options.text(piece)
            for fragment in delta.get("tool_calls") or []:
                _collect(self._calls, fragment)
            if reason := choice.get("finish_reason"):
                self._is_finished = True
                self._reply.finish_reason = _finish_reason(reason)


def _broken_off() -> LLMError:
    return LLMError("The model broke off its answer.", code="broken", permanent=False)


@contextmanager
def _readable() -> Iterator[None]:
    """Convert errors of unexpected shapes to `LLMError`: a schema would cost too much per token."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise LLMError(
            "The model's answer could not be read.", code="unreadable", permanent=False
        ) from error


def _parsed(data: bytes) -> Any:
    """Parse JSON of an endpoint. Some cut an answer within a character and escape the halves of its
    surrogate pair: orjson refuses those, and the run would fail for one emoji. Raises `ValueError`."""
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


def _whole(body: dict[str, Any], options: CallOptions, reply: ModelReply) -> ModelReply:
    message = body["choices"][0]["message"]
    reply.text = storable(message.get("content") or "")
    reply.tool_calls = [
        _tool_call({"id": call["id"], **call["function"]})
        for call in message.get("tool_calls") or []
    ]
    reply.usage = _usage(body.get("usage") or {})
    reply.finish_reason = _finish_reason(body["choices"][0].get("finish_reason"))
    options.text(reply.text)
    return reply


def _collect(calls: dict[int, dict[str, str]], fragment: dict[str, Any]) -> None:
    """Add a piece of a tool call. The first has id and name, each some of the arguments."""
    call = calls.setdefault(fragment.get("index", 0), {"id": "", "name": "", "arguments": ""})
    function = fragment.get("function") or {}
    call["id"] = fragment.get("id") or call["id"]
    call["name"] += function.get("name") or ""
    call["arguments"] += function.get("arguments") or ""


def _tool_call(call: dict[str, str]) -> ToolCall:
    return ToolCall(
        id=storable(call["id"]),
        name=storable(call["name"])[:100],
        arguments=storable(call["arguments"]),
    )


def _finish_reason(reason: Any) -> str:
    reason = str(reason or "").lower()
    return reason if reason in FINISH_REASONS else ""


def _usage(usage: dict[str, Any]) -> TokenUsage:
    prompt_tokens = _count(usage, "prompt_tokens")
    details = usage.get("prompt_tokens_details") or {}
    return TokenUsage(
        prompt_tokens=prompt_tokens,
        completion_tokens=_count(usage, "completion_tokens"),
        cached_tokens=min(_count(details, "cached_tokens"), prompt_tokens),
    )


def _count(usage: dict[str, Any], name: str) -> int:
    return min(max(0, int(usage.get(name) or 0)), MAX_TOKENS)


def storable(text: str) -> str:
    """Remove characters that databases cannot store: NUL and unpaired surrogates."""
    return UNSTORABLE.sub("", text)


def _refusal(error: "openai.APIStatusError", model: str) -> LLMError:
    """Convert an error of the endpoint. Its own text is not shown, as it may quote the key."""
    status = error.status_code
    logger.warning(
        "Model endpoint answered %s (code %s, type %s, request %s)",
        status,
        *(storable(str(value))[:100] for value in (error.code, error.type, error.request_id)),
    )
    if status == 429 and error.code == "insufficient_quota":
        message, code, permanent = "The server's model quota is used up.", "quota", True
    elif status == 429:
        message, code, permanent = "The model is overloaded.", "rate_limited", False
    elif status >= 500 or status in (408, 409):
        message, code, permanent = "The model is not available.", "unavailable", False
    elif status in (401, 403):
        message, code, permanent = "The model refused the server's key.", "key_refused", True
    elif status == 404:
        message, code, permanent = f"The model {model!r} does not exist.", "unknown_model", True
    elif error.code == "context_length_exceeded" or status == 413:
        message, code, permanent = "The message is too long for the model.", "too_long", True
    else:
        message, code, permanent = "The model refused the request.", "refused", True
    return LLMError(
        message,
        code=code,
        permanent=permanent,
        retry_after=retry_after(error.response.headers.get("retry-after", "")),
    )


def retry_after(value: str) -> float | None:
    """Parse a `Retry-After` header, a number of seconds or a date (RFC 9110, 10.2.3). None where it is
    absent or invalid; at most fifteen minutes."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = parsedate_to_datetime(value)
        except (ValueError, OverflowError):
            return None
        if date.tzinfo is None:
            date = date.replace(tzinfo=UTC)
        seconds = (date - datetime.now(UTC)).total_seconds()
    if not seconds > 0:  # NaN too
        return None
    return min(seconds, MAX_RETRY_AFTER_SECONDS)
