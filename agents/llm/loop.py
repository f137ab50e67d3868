"""The tool loop: call the model, execute the tools that it requests, until it answers."""

import logging
import time
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Protocol

from django.utils import timezone

from agents import tools
from agents.llm import completions, overflow
from agents.llm.toolcalls import unused_id

logger = logging.getLogger(__name__)

# Of one reply of the model; it may request more in the next.
MAX_TOOL_CALLS = 32


@dataclass
class StepRecord:
    """One call, in the fields of agents.models.Step."""

    kind: str
    name: str
    input: dict[str, Any]
    output: str = ""
    error: str = ""
    reasoning: str = ""
    finish_reason: str = ""
    usage: completions.TokenUsage = field(default_factory=completions.TokenUsage)
    duration_ms: int = 0
    started_at: datetime = field(default_factory=timezone.now)


class Watcher(Protocol):
    def step_started(self, kind: str, name: str) -> None: ...

    def step_finished(self, **data: Any) -> None: ...


class Settleable(Protocol):
    def settle(self) -> None: ...


@dataclass
class Transcript:
    """The steps of an attempt, recorded as they happen, so that a failure keeps them. The watcher is
    notified of each."""

    steps: list[StepRecord] = field(default_factory=list)
    watcher: Watcher | None = None
    # The budget that its calls were paid from.
    budget: Settleable | None = None

    def settle(self) -> None:
        """Replace the reservation by the usage, in the transaction that records the outcome."""
        if self.budget:
            self.budget.settle()

    def begin(self, step: StepRecord) -> None:
        self.steps.append(step)
        if self.watcher:
            self.watcher.step_started(step.kind, step.name)

    def end(self, step: StepRecord) -> None:
        if self.watcher:
            self.watcher.step_finished(
                kind=step.kind,
                name=step.name,
                error=step.error,
                promptTokens=step.usage.prompt_tokens,
                completionTokens=step.usage.completion_tokens,
                finishReason=step.finish_reason,
                durationMs=step.duration_ms,
            )

    @property
    def finish_reason(self) -> str:
        """Return why the model stopped in its last call, empty without one."""
        reasons = (step.finish_reason for step in reversed(self.steps) if step.kind == "model")
        return next(reasons, "")

    @property
    def usage(self) -> completions.TokenUsage:
        return sum((step.usage for step in self.steps), completions.TokenUsage())


def run(
    prompt: overflow.CallInput,
    *,
    model: str,
    max_iterations: int,
    options: completions.CallOptions,
    transcript: Transcript,
    shorten: overflow.Shorten | None = None,
) -> str:
    """Return the model's answer to a prompt. `shorten` makes a shorter one, if the model cannot take
    all of it.

    Raises `LLMError` and `Stopped`.
    """
    conversation = overflow.CallMessages(prompt, shorten)
    offered = tools.offered()
    call_ids: set[str] = set()
    for iteration in range(max_iterations):
        if iteration:
            options.still_held()
        reply = _call(conversation, model, offered, options, transcript)
        if not reply.tool_calls:
            return reply.text
        reply.tool_calls = [
            replace(call, id=unused_id(call.id, call_ids))
            for call in reply.tool_calls[:MAX_TOOL_CALLS]
        ]
        round_ = [_as_message(reply)]
        for call in reply.tool_calls:
            options.check()
            round_.append(_tool_step(call, transcript))
        conversation.add_round(round_)
    raise completions.LLMError(
        f"The model used tools {max_iterations} times without an answer.",
        code="too_many_iterations",
        permanent=True,
    )


def _call(
    conversation: overflow.CallMessages,
    model: str,
    offered: list[dict[str, Any]],
    options: completions.CallOptions,
    transcript: Transcript,
) -> completions.ModelReply:
    """Call the model; once more with a shorter conversation, if this one exceeds its context."""
    is_shortened = False
    while True:
        step = StepRecord("model", model, conversation.sent)
        try:
            return _model_step(step, conversation.messages, offered, options, transcript)
        except completions.LLMError as error:
            if error.code != overflow.CODE:
                raise
            if is_shortened or not conversation.shorten(error):
                raise conversation.too_long() from error
            is_shortened = True
            logger.info("The conversation is too long for the model and is shortened")
            options.still_held()


def _model_step(
    step: StepRecord,
    messages: list[dict[str, Any]],
    offered: list[dict[str, Any]],
    options: completions.CallOptions,
    transcript: Transcript,
) -> completions.ModelReply:
    transcript.begin(step)
    started = time.monotonic()
    reply = completions.ModelReply()
    try:
        return completions.complete(
            messages, model=step.name, tools=offered, options=options, reply=reply
        )
    except completions.LLMError as error:
        step.error = str(error)
        raise
    finally:
        step.output, step.usage = reply.text, reply.usage
        step.reasoning, step.finish_reason = reply.reasoning, reply.finish_reason
        step.duration_ms = int((time.monotonic() - started) * 1000)
        transcript.end(step)


def _tool_step(call: completions.ToolCall, transcript: Transcript) -> dict[str, Any]:
    step = StepRecord("tool", call.name, {"id": call.id, "arguments": call.arguments})
    transcript.begin(step)
    started = time.monotonic()
    try:
        step.output = completions.storable(tools.call(call.name, call.arguments))
    except tools.ToolError as error:
        step.error = str(error)
    except Exception:
        # A tool is a plug-in: its failure is for the model to work around.
        logger.exception("Tool %s failed", call.name)
        step.error = "The tool failed."
    step.duration_ms = int((time.monotonic() - started) * 1000)
    transcript.end(step)
    return {
        "role": "tool",
        "tool_call_id": call.id,
        "content": step.output or f"Error: {step.error}",
    }


def _as_message(reply: completions.ModelReply) -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": reply.text or None,
        "tool_calls": [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in reply.tool_calls
        ],
    }
