"""Commands of bots: functions of this project, and HTTP calls of other programs.

An app adds commands with functions under `@command("name")` in its `commands.py`, which is loaded
automatically. A worker executes a command as a run, with the guarantees of a run: after a crash it
may be executed again, and its answer is recorded once.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from django.conf import settings

from agents.llm import completions, loop
from agents.models import CHAT_REPLY, CHAT_SUMMARIZE, Run
from agents.runs import history, http_commands, memory
from chat.models import Message, Thread
from lib import db, outgoing
from realm.commands import COMMANDS, is_allowed_url


@dataclass(frozen=True)
class CommandContext:
    """One execution of a command. Steps that are worth seeing go into the transcript."""

    run: Run
    options: completions.CallOptions
    transcript: loop.Transcript


# Returns the answer, as Markdown. Raises `completions.LLMError`.
Function = Callable[[CommandContext], str]


def command(name: str) -> Callable[[Function], Function]:
    """Register a function as the command `name`."""

    def register(function: Function) -> Function:
        COMMANDS[name] = function
        return function

    return register


def execute(run: Run, *, options: completions.CallOptions, transcript: loop.Transcript) -> str:
    """Execute the command of a run and return the answer. Raises `LLMError` and `Stopped`."""
    context = CommandContext(run, options, transcript)
    if function := COMMANDS.get(run.command):
        return function(context)
    if is_allowed_url(run.command):
        return _post(context)
    if outgoing.is_url(run.command):
        raise completions.LLMError(
            f"The command's URL on {outgoing.host_of(run.command)} may not be called any more.",
            code="webhook_forbidden",
            permanent=True,
        )
    raise completions.LLMError(
        f"There is no command {run.command[:200]!r} any more.",
        code="unknown_command",
        permanent=True,
    )


@command(CHAT_REPLY)
def chat_reply(context: CommandContext) -> str:
    """Answer with the model, with the thread as its memory."""
    try:
        past = memory.read_history(context.run)
        prompt = history.build(past)
    except history.NoQuestion:
        # The thread was deleted, or the message was redacted, since the run was claimed.
        raise completions.Stopped from None
    db.release_connection()
    return loop.run(
        prompt,
        model=context.run.model,
        max_iterations=settings.AGENT_MAX_LOOP_ITERATIONS,
        options=context.options,
        transcript=context.transcript,
        shorten=partial(history.shortened, past),
    )


@command(CHAT_SUMMARIZE)
def chat_summarize(context: CommandContext) -> str:
    """Summarise the thread so far."""
    run = context.run
    # Again, as messages may have been redacted since it was read.
    thread = Thread.objects.filter(pk=run.thread_id).first()
    if thread is None:
        raise completions.Stopped
    messages_so_far = Message.objects.filter(
        thread=thread, position__lt=run.position, redacted_at=None
    )
    newest = memory.shortened(
        messages_so_far.filter(position__gt=thread.summary_reach).order_by("-position")
    )
    messages = memory.within(list(newest[: memory.CHUNK_MESSAGES]))[::-1]
    if not messages and not thread.summary:
        return "There are no messages here yet."
    db.release_connection()
    return loop.run(
        memory.summary_prompt(thread.summary, messages),
        model=settings.CHAT_SUMMARY_MODEL or run.model,
        max_iterations=settings.AGENT_MAX_LOOP_ITERATIONS,
        options=context.options,
        transcript=context.transcript,
        shorten=partial(memory.summary_prompt, thread.summary, messages),
    )


@command("ping")
def ping(context: CommandContext) -> str:
    """Answer without a model: shows that the room, a worker and the way back work."""
    return "pong"


def _post(context: CommandContext) -> str:
    run = context.run
    body = {
        "runId": run.pk,
        "threadId": run.thread_id,
        "correlationId": run.correlation_id,
        "input": run.input,
    }
    db.release_connection()
    step = loop.StepRecord("tool", run.command[:100], body)
    context.transcript.begin(step)
    started = time.monotonic()
    try:
        step.output = http_commands.post(run.command, body, key=run.pk, options=context.options)
    except completions.LLMError as error:
        step.error = str(error)
        raise
    finally:
        step.duration_ms = int((time.monotonic() - started) * 1000)
        context.transcript.end(step)
    return step.output
