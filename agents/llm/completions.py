"""Calls of the model: the OpenAI SDK with any endpoint that has `/chat/completions`.

Without a key and a base URL there is no model, and an echo answers (see `configured()`).
"""

import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import orjson
from django.conf import settings

from agents.llm import errors, transport
from agents.llm.errors import LLMError as LLMError
from agents.llm.replies import ModelReply as ModelReply
from agents.llm.replies import TokenUsage as TokenUsage
from agents.llm.replies import ToolCall as ToolCall
from agents.llm.replies import storable as storable
from agents.llm.stream import AnswerReader, OutputLimitReached

if TYPE_CHECKING:
    import openai

# One answer must not fill the memory of a worker that many runs share.
MAX_RESPONSE_BYTES = 16 * 1024 * 1024


class Stopped(Exception):
    """The run was cancelled, or taken from this worker."""


Cancel = Callable[[], None]


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
    sent = _request_body(messages, model, tools)
    options.budget.reserve(model, len(sent))

    import aiohttp
    import httpx2
    import openai

    lost = (openai.APIConnectionError, httpx2.HTTPError, httpx2.StreamError, aiohttp.ClientError)
    refused = False
    answer = _Answer(options, AnswerReader(model, max_tokens=settings.AGENT_MAX_OUTPUT_TOKENS))
    try:
        try:
            transport.post(sent, answer, deadline=options.deadline, on_cancel=options.on_cancel)
        except lost as error:  # the SDK wraps only some of the errors before the first byte
            if not answer.reader.is_complete:
                raise _lost(error) from error
            answer.end()
        except OutputLimitReached:
            answer.show(answer.reader.cut())
        else:
            answer.end()
        answer.reader.fill(reply, len(sent))
        _check(reply)
    except CancelledError:
        raise Stopped from None
    except TimeoutError:
        raise _too_late() from None
    except openai.APIStatusError as error:
        refused = True
        raise _refusal(error, model) from error
    finally:
        answer.reader.fill(reply, len(sent))
        options.budget.note(reply, refused=refused)
    return reply


def _request_body(
    messages: list[dict[str, Any]], model: str, tools: list[dict[str, Any]] | None
) -> bytes:
    body: dict[str, Any] = {
        "model": model,
        "messages": messages,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if tools:
        body["tools"] = tools
    if settings.AGENT_MAX_OUTPUT_TOKENS:
        body[settings.AGENT_MAX_OUTPUT_TOKENS_FIELD] = settings.AGENT_MAX_OUTPUT_TOKENS
    return orjson.dumps(body)


def _check(reply: ModelReply) -> None:
    """Raise `LLMError` if a reply that has ended is no answer."""
    has_text = bool(reply.text.strip())
    if reply.finish_reason == "content_filter" and not reply.is_refusal:
        raise errors.FILTERED.error()
    if has_text or reply.tool_calls:
        return
    kind = errors.OUTPUT_LIMIT if reply.finish_reason == "length" else errors.EMPTY
    raise kind.error()


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
    """Passes the body to the reader, and its text on, within the limits of the call."""

    def __init__(self, options: CallOptions, reader: AnswerReader) -> None:
        self.reader = reader
        self._options = options
        self._size = 0

    def begin(self, content_type: str) -> None: ...

    def feed(self, chunk: bytes) -> None:
        """Parse some of the body. Raises `LLMError`, `Stopped` and `OutputLimitReached`."""
        self._options.check()
        self._size += len(chunk)
        if self._size > MAX_RESPONSE_BYTES:
            raise LLMError(
                "The model's answer is too long.", code="answer_too_long", permanent=True
            )
        try:
            self.show(self.reader.feed(chunk))
        except LLMError:
            self.show(self.reader.pending())  # the text before the error
            raise

    def end(self) -> None:
        self._options.check()
        self.show(self.reader.end())

    def show(self, pieces: list[str]) -> None:
        for piece in pieces:
            self._options.text(piece)


def _refusal(error: "openai.APIStatusError", model: str) -> LLMError:
    try:
        body: Any = orjson.loads(error.response.content)
    except (ValueError, RuntimeError):
        body = error.body if error.body is not None else error.response.text
    report = errors.ErrorReport.of(body, error.status_code)
    return errors.from_status(report, model, error.response.headers)
