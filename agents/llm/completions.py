"""The model: the OpenAI SDK against any endpoint that speaks `/chat/completions`.

Without a key and a base URL there is no model, and an echo answers (`configured()` tells).
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

# One answer may not fill the memory of a worker that many runs share.
MAX_RESPONSE_BYTES = 16 * 1024 * 1024
MAX_RETRY_AFTER_SECONDS = 15 * 60
# More than any call takes; what is claimed beyond it must not overflow a column.
MAX_TOKENS = 50_000_000
UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
HALF_A_CHARACTER = re.compile(rb"\\u[dD][89a-fA-F]")


class LLMError(Exception):
    """A call that gave no answer. The message is safe to show to whoever asked.

    `permanent`: another try cannot succeed. `retry_after`: seconds that the endpoint asked for.
    `code`: stable, for grouping.
    """

    def __init__(
        self, message: str, *, code: str, permanent: bool, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.permanent = permanent
        self.retry_after = retry_after


class Stopped(Exception):
    """The caller no longer wants the answer."""


Cut = Callable[[], None]


@dataclass(frozen=True)
class Usage:
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0  # of the prompt tokens

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.cached_tokens + other.cached_tokens,
        )


@dataclass(frozen=True)
class ToolCall:
    id: str
    name: str
    arguments: str  # JSON as the model wrote it: not to be trusted


@dataclass
class Reply:
    text: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    usage: Usage = Usage()


class Purse(Protocol):
    """What calls are paid from (agents.usage.limits)."""

    def reserve(self, model: str, size: int) -> None:
        """Set aside what a call may take that sends so many bytes. Raises `LLMError`."""

    def note(self, reply: Reply, *, refused: bool) -> None:
        """What became of it. `refused`: the endpoint turned it away before it began."""


class Boundless:
    def reserve(self, model: str, size: int) -> None: ...

    def note(self, reply: Reply, *, refused: bool) -> None: ...


BOUNDLESS = Boundless()


@dataclass(frozen=True)
class Control:
    """How a call is watched: asked between chunks, as nothing can interrupt a thread."""

    deadline: float = float("inf")  # time.monotonic()
    stopped: Callable[[], bool] = lambda: False
    # What comes, as it comes.
    text: Callable[[str], None] = lambda piece: None
    # Who knows first that the answer is no longer wanted may cut the call meanwhile, so that it is
    # noticed between two chunks too.
    cutting: Callable[[Cut], AbstractContextManager[None]] = lambda cut: nullcontext()
    purse: Purse = BOUNDLESS

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
    control: Control = Control(),
    reply: Reply | None = None,
) -> Reply:
    """One call of `model`. `reply` is filled as the answer comes, so that a failure leaves what came.
    Raises `LLMError`, or `Stopped` when `control` says so."""
    control.check()
    reply = reply or Reply()
    if not configured():
        reply.text = f"Handled prompt: {messages[-1]['content']}"
        control.text(reply.text)
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
    control.purse.reserve(model, len(sent))

    import aiohttp
    import httpx2
    import openai

    lost = (openai.APIConnectionError, httpx2.HTTPError, httpx2.StreamError, aiohttp.ClientError)
    refused = False
    answer = _Answer(control, reply)
    try:
        try:
            transport.post(sent, answer, deadline=control.deadline, cutting=control.cutting)
        except lost as error:  # the SDK wraps only some of what goes wrong before the first byte
            if not answer.is_told:
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
        answer.keep()
        control.purse.note(reply, refused=refused)


def warm_up() -> None:
    """Load the SDK, so that the first run of a worker need not wait for it."""
    if configured():
        transport.warm_up()


def _lost(error: Exception) -> LLMError:
    import httpx2
    import openai

    if isinstance(error, openai.APITimeoutError) and error.__cause__:
        error = error.__cause__  # type: ignore[assignment]
    # Where the endpoint hangs up before it answers, that is told as a time-out of the connection.
    if isinstance(error, openai.APITimeoutError | httpx2.TimeoutException) and not isinstance(
        error, httpx2.ConnectTimeout
    ):
        return LLMError("The model did not answer in time.", code="timeout", permanent=False)
    return LLMError("The connection to the model was lost.", code="connection", permanent=False)


class _Answer:
    """What has come of an answer: server-sent events, or JSON from an endpoint that cannot stream."""

    def __init__(self, control: Control, reply: Reply) -> None:
        self.is_told = False  # all of it, whatever becomes of the connection
        self._control = control
        self._reply = reply
        self._is_whole = False
        self._is_finished = False
        self._size = 0
        self._rest: list[bytes] = []  # joined once, however many chunks one line comes in
        self._pieces: list[str] = []
        self._calls: dict[int, dict[str, str]] = {}

    def begin(self, content_type: str) -> None:
        self._is_whole = "json" in content_type

    def feed(self, chunk: bytes) -> None:
        """Raises `LLMError` and `Stopped`."""
        self._control.check()
        self._size += len(chunk)
        if self._size > MAX_RESPONSE_BYTES:
            raise LLMError("The model's answer is too long.", code="too_long", permanent=True)
        if self._is_whole or b"\n" not in chunk:
            self._rest.append(chunk)
            return
        *lines, left = b"".join([*self._rest, chunk]).split(b"\n")
        self._rest = [left]
        with _readable():
            for line in lines:
                # What follows `[DONE]` is read as well, or the connection could not be used again.
                if line.startswith(b"data:") and not self.is_told:
                    self._hear(line[5:].strip())

    def end(self) -> Reply:
        """The answer, when nothing more comes. Raises `LLMError` and `Stopped`."""
        with _readable():
            if self._is_whole:
                return _whole(_parsed(b"".join(self._rest)), self._control, self._reply)
        if not self._is_finished:
            self._control.check()
            raise _broken_off()
        self._reply.tool_calls = [_tool_call(call) for _, call in sorted(self._calls.items())]
        return self._reply

    def keep(self) -> None:
        """Put down what has come, be it all or not."""
        if self._is_whole:
            return
        self._reply.text = "".join(self._pieces)
        if not self._is_finished and self._reply.usage == Usage():
            # Roughly what was paid for: the end, which tells it, did not come.
            self._reply.usage = Usage(completion_tokens=len(self._pieces))

    def _hear(self, data: bytes) -> None:
        if data == b"[DONE]":
            self.is_told = True
            return
        chunk = _parsed(data)
        if chunk.get("error"):
            if not self._is_finished:
                raise _broken_off()
            self.is_told = True
            return
        if chunk.get("usage"):
            self._reply.usage = _usage(chunk["usage"])
        for choice in chunk["choices"][:1]:
            delta = choice.get("delta") or {}
            if piece := storable(delta.get("content") or ""):
                self._pieces.append(piece)
                self._control.text(piece)
            for fragment in delta.get("tool_calls") or []:
                _gather(self._calls, fragment)
            self._is_finished = self._is_finished or bool(choice.get("finish_reason"))


def _broken_off() -> LLMError:
    return LLMError("The model broke off its answer.", code="broken", permanent=False)


@contextmanager
def _readable() -> Iterator[None]:
    """Whatever the endpoint sent that is not the protocol: no schema is worth its cost per token."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise LLMError(
            "The model's answer could not be read.", code="unreadable", permanent=False
        ) from error


def _parsed(data: bytes) -> Any:
    """JSON as endpoints write it. Some cut an answer in the middle of a character and escape its
    halves: orjson refuses those, and the run would fail for one emoji. Raises `ValueError`."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        if not HALF_A_CHARACTER.search(data):
            raise
    try:
        return json.loads(data, parse_constant=_no_json)
    except RecursionError as error:
        raise ValueError("too deep") from error


def _no_json(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _whole(body: dict[str, Any], control: Control, reply: Reply) -> Reply:
    message = body["choices"][0]["message"]
    reply.text = storable(message.get("content") or "")
    reply.tool_calls = [
        _tool_call({"id": call["id"], **call["function"]})
        for call in message.get("tool_calls") or []
    ]
    reply.usage = _usage(body.get("usage") or {})
    control.text(reply.text)
    return reply


def _gather(calls: dict[int, dict[str, str]], fragment: dict[str, Any]) -> None:
    """Tool calls come in pieces: the first has the id and the name, all have parts of the arguments."""
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


def _usage(usage: dict[str, Any]) -> Usage:
    prompt_tokens = _count(usage, "prompt_tokens")
    details = usage.get("prompt_tokens_details") or {}
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=_count(usage, "completion_tokens"),
        cached_tokens=min(_count(details, "cached_tokens"), prompt_tokens),
    )


def _count(usage: dict[str, Any], name: str) -> int:
    return min(max(0, int(usage.get(name) or 0)), MAX_TOKENS)


def storable(text: str) -> str:
    """Without what no database can hold: NUL and unpaired surrogates."""
    return UNSTORABLE.sub("", text)


def _refusal(error: "openai.APIStatusError", model: str) -> LLMError:
    """What the endpoint's own text says is logged, not shown: it may quote the key."""
    status = error.status_code
    logger.warning(
        "Model endpoint answered %s (code %s, type %s, request %s)",
        status,
        *(storable(str(told))[:100] for told in (error.code, error.type, error.request_id)),
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
    """Seconds from a `Retry-After` header, which is a number or a date (RFC 9110, 10.2.3). None where
    it is absent or makes no sense; never more than fifteen minutes."""
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
