"""The model: the OpenAI SDK against any endpoint that speaks `/chat/completions`.

Without a key and a base URL there is no model, and an echo answers (`configured()` tells).
"""

import functools
import json
import logging
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import orjson
from django.conf import settings

if TYPE_CHECKING:
    # At run time it is loaded by the first call: 30 MB and half a second that only workers need.
    import openai

logger = logging.getLogger(__name__)

# One answer may not fill the memory of a worker that many runs share.
MAX_RESPONSE_BYTES = 16 * 1024 * 1024
MAX_RETRY_AFTER_SECONDS = 15 * 60
# More than any call takes; what is claimed beyond it must not overflow a column.
MAX_TOKENS = 50_000_000
UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
HALF_A_CHARACTER = re.compile(rb"\\u[dD][89a-fA-F]")
# The more answers come at once, the less often each of them is read: a thread that is woken for every
# token, to wait for all the others then, costs many times what the token does.
REST_SECONDS_EACH = 0.0005
LEAST_REST_SECONDS = 0.01
MOST_REST_SECONDS = 0.1
# Chunks closer than this were read together.
TOGETHER_SECONDS = 0.002


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
    """What calls are paid from (agents.limits)."""

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
    # Who knows first that the answer is no longer wanted may cut the connection meanwhile, so that
    # it is noticed between two chunks too.
    cutting: Callable[[Cut], AbstractContextManager[None]] = lambda cut: nullcontext()
    purse: Purse = BOUNDLESS

    def check(self) -> None:
        if self.stopped():
            raise Stopped
        if time.monotonic() > self.deadline:
            raise LLMError("The answer took too long.", code="deadline", permanent=True)


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

    import httpx2
    import openai

    refused = False
    try:
        with (
            _client().post(
                "/chat/completions",
                cast_to=object,
                # Bytes and an untyped stream: the SDK's typed request and events cost ten times the
                # rest of the call.
                content=sent,
                options={
                    "headers": {"Content-Type": "application/json", "Accept": "text/event-stream"},
                    "timeout": _timeout(control),
                },
                stream=True,
                stream_cls=openai.Stream[object],
            ) as stream,
            control.cutting(partial(_cut, stream.response)),
        ):
            return _read(stream.response, control, reply)
    except openai.APIStatusError as error:
        refused = True
        raise _refusal(error, model) from error
    except (openai.APITimeoutError, httpx2.TimeoutException) as error:
        raise LLMError(
            "The model did not answer in time.", code="timeout", permanent=False
        ) from error
    except (openai.APIError, httpx2.HTTPError, httpx2.StreamError) as error:
        if control.stopped():
            raise Stopped from error
        # The SDK wraps only what goes wrong before the first byte.
        raise LLMError(
            "The connection to the model was lost.", code="connection", permanent=False
        ) from error
    finally:
        control.purse.note(reply, refused=refused)


def warm_up() -> None:
    """Load the SDK, so that the first run of a worker need not wait for it."""
    if configured():
        _client()


@functools.cache
def _client() -> "openai.OpenAI":
    """One for the process: a client costs 70 ms, most of it TLS. Retries are agents.runs' affair,
    which waits in the database and not in a worker's slot."""
    import openai

    return openai.OpenAI(
        api_key=settings.OPENAI_API_KEY or "none",
        base_url=settings.OPENAI_BASE_URL or None,
        max_retries=0,
    )


def _timeout(control: Control) -> Any:
    import openai

    read = min(settings.OPENAI_TIMEOUT_SECONDS, max(0.1, control.deadline - time.monotonic()))
    return openai.Timeout(read, connect=min(5.0, read))


def _cut(response: Any) -> None:
    """End a connection that another thread may be reading from, which closing it would not do."""
    connection = response.extensions["network_stream"].get_extra_info("socket")
    with suppress(OSError):  # it is closed already
        connection.shutdown(socket.SHUT_RDWR)


# The answers that are being read in this process.
_reading: set[int] = set()


def _read(response: Any, control: Control, reply: Reply) -> Reply:
    _reading.add(id(response))
    chunks = _bounded(response.iter_bytes(), control)
    try:
        if "json" in response.headers.get("content-type", ""):
            # An endpoint that cannot stream answers whole.
            return _whole(_parsed(b"".join(chunks)), control, reply)
        return _streamed(map(_parsed, _data_lines(chunks)), control, reply)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        # Whatever the endpoint sent, it is not the protocol: no schema is worth its cost per token.
        raise LLMError(
            "The model's answer could not be read.", code="unreadable", permanent=False
        ) from error
    finally:
        _reading.discard(id(response))


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


def _streamed(chunks: Iterator[dict[str, Any]], control: Control, reply: Reply) -> Reply:
    pieces: list[str] = []
    calls: dict[int, dict[str, str]] = {}
    finished = False
    try:
        for chunk in chunks:
            if chunk.get("error"):
                break
            if chunk.get("usage"):
                reply.usage = _usage(chunk["usage"])
            for choice in chunk["choices"][:1]:
                delta = choice.get("delta") or {}
                if piece := storable(delta.get("content") or ""):
                    pieces.append(piece)
                    control.text(piece)
                for fragment in delta.get("tool_calls") or []:
                    _gather(calls, fragment)
                finished = finished or bool(choice.get("finish_reason"))
    finally:
        reply.text = "".join(pieces)
        if not finished and reply.usage == Usage():
            # Roughly what was paid for: the end, which tells it, did not come.
            reply.usage = Usage(completion_tokens=len(pieces))
    if not finished:
        control.check()  # a connection that was cut looks like one that broke
        raise LLMError("The model broke off its answer.", code="broken", permanent=False)
    reply.tool_calls = [_tool_call(call) for _, call in sorted(calls.items())]
    return reply


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


def _data_lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The `data:` lines of server-sent events, up to `[DONE]`. Then the rest is read as well, or the
    connection could not be used again."""
    import httpx2

    rest: list[bytes] = []  # joined once, however many chunks one line comes in
    done = False
    try:
        for chunk in chunks:
            if b"\n" not in chunk:
                rest.append(chunk)
                continue
            *lines, left = b"".join([*rest, chunk]).split(b"\n")
            rest = [left]
            for line in lines:
                if line.startswith(b"data:") and not done:
                    data = line[5:].strip()
                    done = data == b"[DONE]"
                    if not done:
                        yield data
    except httpx2.TimeoutException:
        if not done:
            raise


def _bounded(chunks: Iterator[bytes], control: Control) -> Iterator[bytes]:
    size, rested = 0, 0.0
    for chunk in chunks:
        control.check()
        size += len(chunk)
        if size > MAX_RESPONSE_BYTES:
            raise LLMError("The model's answer is too long.", code="too_long", permanent=True)
        yield chunk
        if (rest := _rest_seconds()) and time.monotonic() - rested > TOGETHER_SECONDS:
            time.sleep(rest)
            rested = time.monotonic()


def _rest_seconds() -> float:
    """How long to leave an answer in the kernel's buffer: nothing unless many come at once."""
    rest = len(_reading) * REST_SECONDS_EACH
    return 0 if rest < LEAST_REST_SECONDS else min(rest, MOST_REST_SECONDS)


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
