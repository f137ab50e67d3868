"""What a bot command may fire: the table of commands, and webhooks for what other programs do.

An app adds to the table by a `commands.py` with functions under `@command("name")`; it is found by
itself. A command is carried out by a worker, as a run, with all that a run promises: so it may be
carried out again after a crash, and its answer is recorded once.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from django.conf import settings

from agents.llm import completions, loop
from agents.models import CHAT_REPLY, Run
from agents.runs import http_commands, memory
from chat.models import Message
from lib import db
from realm.commands import COMMANDS, is_allowed_url


@dataclass(frozen=True)
class Call:
    """One carrying out of a command. Steps that are worth seeing go into the transcript."""

    run: Run
    control: completions.Control
    transcript: loop.Transcript


# The answer of a call, as Markdown. Raises `llm.LLMError`.
Function = Callable[[Call], str]


def command(name: str) -> Callable[[Function], Function]:
    """Register a function as the command `name`."""

    def register(function: Function) -> Function:
        COMMANDS[name] = function
        return function

    return register


def carry_out(run: Run, *, control: completions.Control, transcript: loop.Transcript) -> str:
    """The answer of a run's command. Raises `llm.LLMError`, or `llm.Stopped` when `control` says so."""
    call = Call(run, control, transcript)
    if function := COMMANDS.get(run.command):
        return function(call)
    if is_allowed_url(run.command):
        return _post(call)
    raise completions.LLMError(
        f"There is no command {run.command[:200]!r} any more.",
        code="unknown_command",
        permanent=True,
    )


@command(CHAT_REPLY)
def chat_reply(call: Call) -> str:
    """The agent answers, with the thread as its memory."""
    context = memory.context(call.run)
    db.release_connection()
    return loop.run(
        context.messages,
        model=call.run.model,
        sent=context.sent,
        max_iterations=settings.AGENT_MAX_LOOP_ITERATIONS,
        control=call.control,
        transcript=call.transcript,
    )


@command("chat.summarize")
def chat_summarize(call: Call) -> str:
    """Tell in short what was said in the thread so far."""
    run = call.run
    said = memory.shortened(
        Message.objects.filter(thread_id=run.thread_id, position__lt=run.position)
    )
    newest = said.filter(position__gt=run.thread.summary_reach).order_by("-position")
    untold = memory.within(list(newest[: memory.CHUNK_MESSAGES]), memory.CONTEXT_CHARACTERS)[::-1]
    if not untold and not run.thread.summary:
        return "Nothing has been said here yet."
    prompt = memory.summary_prompt(run.thread.summary, untold)
    db.release_connection()
    return loop.run(
        [{"role": "user", "content": prompt}],
        model=settings.CHAT_SUMMARY_MODEL or run.model,
        sent={"messages": [str(message.pk) for message in untold]},
        max_iterations=settings.AGENT_MAX_LOOP_ITERATIONS,
        control=call.control,
        transcript=call.transcript,
    )


@command("ping")
def ping(call: Call) -> str:
    """Answers without asking a model: shows that room, worker and way back work."""
    return "pong"


def _post(call: Call) -> str:
    run = call.run
    body = {
        "runId": run.pk,
        "threadId": run.thread_id,
        "correlationId": run.correlation_id,
        "input": run.input,
    }
    db.release_connection()
    step = loop.StepRecord("tool", run.command[:100], body)
    call.transcript.begin(step)
    started = time.monotonic()
    try:
        step.output = http_commands.post(run.command, body, key=run.pk, control=call.control)
    except completions.LLMError as error:
        step.error = str(error)
        raise
    finally:
        step.duration_ms = int((time.monotonic() - started) * 1000)
        call.transcript.end(step)
    return step.output
