"""What a run tells the model: the rolling summary of the thread, then its recent messages.

The summary is extended after an answer by what has left the window since, so a message costs the
same in a thread of ten and of ten thousand. Until that is done, what no summary tells yet is sent as
it is.
"""

import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from django.conf import settings
from django.db import transaction
from django.db.models import Case, DateTimeField, F, Min, QuerySet, TextField, Value, When
from django.db.models.functions import Substr
from django.template.loader import render_to_string
from django.utils import timezone

from agents.llm import completions
from agents.models import Run, Step, Summary
from agents.usage import limits, prices
from chat.models import Message, Thread
from lib import db

logger = logging.getLogger(__name__)

SUMMARY_LEASE = timedelta(minutes=3)
SUMMARY_PAUSE = timedelta(minutes=1)
# How much one call folds into a summary; a thread that is further behind takes several.
CHUNK_MESSAGES = 50
CHUNK_CHARACTERS = 60_000
# What is sent of a message other than the question, and of all of them: an answer may be of megabytes,
# and many runs share a worker's memory.
MESSAGE_CHARACTERS = 100_000
CONTEXT_CHARACTERS = 400_000
# Of what no summary tells yet, this many times the window is sent; more would not be "recent".
UNSUMMARISED_WINDOWS = 3


@dataclass(frozen=True)
class Context:
    messages: list[dict[str, Any]]  # as /chat/completions takes them
    sent: dict[str, Any]  # Step.input: which summary and which messages these were


def context(run: Run) -> Context:
    """The context of a run: never a message later than the one that asked."""
    thread, window = run.thread, settings.CHAT_MEMORY_RECENT_MESSAGES
    until_now = Message.objects.filter(thread_id=run.thread_id, position__lte=run.position)
    earlier = shortened(until_now, whole=run.position)
    recent: list[Any] = list(earlier.order_by("-position")[:window])
    if not recent:
        raise completions.Stopped  # the thread was deleted since the run was claimed
    if recent[-1].position > thread.summary_reach + 1:
        untold = earlier.filter(
            position__gt=thread.summary_reach, position__lt=recent[-1].position
        ).order_by("-position")
        recent += untold[: window * UNSUMMARISED_WINDOWS]
    recent = within(recent, CONTEXT_CHARACTERS)
    recent.reverse()
    partial = _broken_off(run, recent)
    messages = []
    for message in recent:
        messages.append({"role": _role(message.role), "content": message.text})
        if message.position in partial:
            messages.append({"role": "assistant", "content": partial[message.position]})
    told = thread.summary_reach if thread.summary and thread.summary_reach < run.position else None
    if told is not None:
        _put_note(messages, thread.summary)
    return Context(
        messages=messages,
        sent={
            "summaryUpTo": told,
            "messages": [str(message.pk) for message in recent],
            **({"brokenOffAfter": sorted(partial)} if partial else {}),
        },
    )


def _role(role: str) -> str:
    """The role that a message is sent with: instructions never come out of a thread."""
    return "assistant" if role == Message.Role.ASSISTANT else "user"


def _put_note(messages: list[dict[str, Any]], summary: str) -> None:
    """Put the summary at the start of the first user message. It repeats the words of people, so it has
    the standing of theirs and is no system message."""
    note = render_to_string("agents/memory.txt", {"summary": marked("summary", summary)}).strip()
    # There is one: the question.
    first = next(message for message in messages if message["role"] == "user")
    first["content"] = f"{note}\n\n{first['content']}"


MARKS = re.compile(r"<(?=[\s/\\]*(?:summary|message)\b)", re.IGNORECASE)


def marked(name: str, text: str, attributes: str = "") -> str:
    """Text between an opening and a closing mark. A mark within the text is escaped, so that no text
    ends early or begins another one."""
    return f"<{name}{attributes}>\n{MARKS.sub('&lt;', text)}\n</{name}>"


def summary_prompt(summary: str, messages: Sequence[Any]) -> str:
    """The request for a new summary: fixed instructions, then summary and messages as data."""
    return render_to_string(
        "agents/summarise.txt",
        {
            "summary": marked("summary", summary or "(none yet)"),
            "messages": [
                marked("message", message.text, f' role="{_role(message.role)}"')
                for message in messages
            ],
        },
    )


def shortened(messages: QuerySet[Message], whole: int = -1) -> QuerySet[Any]:
    """Their `pk`, `position`, `role` and `text`, as named tuples: of the one at the position `whole`
    all that it says, of others no more than its beginning leaves the database."""
    text = Case(
        When(position=whole, then=F("content")),
        default=Substr("content", 1, MESSAGE_CHARACTERS),
        output_field=TextField(),
    )
    found = messages.annotate(text=text)
    return found.values_list("pk", "position", "role", "text", named=True)


def within(newest_first: list[Any], characters: int) -> list[Any]:
    """As many as fit, without a gap; the newest in any case."""
    kept, size = newest_first[:1], 0
    for message in newest_first[1:]:
        size += len(message.text)
        if size > characters:
            break
        kept.append(message)
    return kept


def _broken_off(run: Run, recent: Sequence[Message]) -> dict[int, str]:
    """What had come of the answers to earlier questions whose runs were cancelled or failed, by the
    position of the question. Without a query where all were answered."""
    positions = {message.position for message in recent}
    unanswered = [
        message.position
        for message in recent
        if message.role == Message.Role.USER
        and message.position < run.position
        and message.position + 1 not in positions
    ]
    if not unanswered:
        return {}
    steps = (
        Step.objects.filter(
            run__thread=run.thread_id,
            run__position__in=unanswered,
            run__status__in=(Run.Status.CANCELLED, Run.Status.FAILED),
            kind=Step.Kind.MODEL,
        )
        .exclude(output="")
        .order_by("pk")
    )
    # Of several, the last.
    outputs = steps.values_list("run__position", Substr("output", 1, MESSAGE_CHARACTERS))
    came = dict(outputs)
    return {
        position: render_to_string("agents/broken_off.txt", {"text": text}).strip()
        for position, text in came.items()
    }


def note_answer(run: Run) -> bool:
    """Note, in the transaction of the answer, that messages may have left the window. True when a
    summary is due."""
    last = run.position + 1
    if (
        not completions.configured()
        or last - run.thread.summary_reach < settings.CHAT_MEMORY_RECENT_MESSAGES
    ):
        return False
    Thread.objects.filter(pk=run.thread_id).update(summary_due_at=timezone.now())
    return True


def due() -> list[str]:
    """Threads whose summary was not made although it is time: a worker died, or the model failed."""
    late = timezone.now() - timedelta(seconds=5)
    threads = Thread.objects.filter(summary_due_at__lt=late).order_by("summary_due_at")
    return list(threads.values_list("pk", flat=True)[:20])


def summarise(thread_id: str) -> Summary | None:
    """Extend the summary of a thread by what has left the window. None when there was nothing to do,
    or somebody else is at it, or the model failed (then it is tried again later)."""
    now = timezone.now()
    lease = now + SUMMARY_LEASE
    with transaction.atomic():
        due = Thread.objects.filter(pk=thread_id, summary_due_at__lte=now)
        taken = due.update(summary_due_at=lease)
    if not taken:
        return None
    thread = Thread.objects.filter(pk=thread_id).first()
    if thread is None:  # deleted since
        return None
    left, more = _left_window(thread)
    if not left:
        _set_due(thread, lease, None)
        return None
    model = settings.CHAT_SUMMARY_MODEL or _model_of(thread)
    prompt = summary_prompt(thread.summary, left)
    db.release_connection()
    purse = _purse_of(thread)
    deadline = time.monotonic() + SUMMARY_LEASE.total_seconds() - 30
    control = completions.Control(deadline=deadline, purse=purse)
    try:
        reply = completions.complete(
            [{"role": "user", "content": prompt}], model=model, control=control
        )
    except completions.LLMError as error:
        logger.warning("The summary of thread %s was put off: %s", thread_id, error)
        pause = max(SUMMARY_PAUSE, timedelta(seconds=error.retry_after or 0))
        _set_due(thread, lease, timezone.now() + pause * (60 if error.permanent else 1))
        return None
    finally:
        purse.settle()
    return _record(thread, left, reply, model=model, lease=lease, more=more)


def _left_window(thread: Thread) -> tuple[list[Message], bool]:
    """The messages to fold into the summary now, and whether more are waiting.

    A question that is not answered yet bounds them: no summary may tell it what comes after it.
    """
    window = settings.CHAT_MEMORY_RECENT_MESSAGES
    messages = shortened(Message.objects.filter(thread=thread))
    open_question = Run.objects.unfinished().filter(thread=thread).aggregate(Min("position"))
    if (limit := open_question["position__min"]) is not None:
        messages = messages.filter(position__lt=limit)
    # The next question takes one of the window's places.
    kept = messages.order_by("-position").values_list("position", flat=True)[: window - 1]
    edge = min(kept, default=None) if window > 1 else None
    if edge is not None:
        messages = messages.filter(position__lt=edge)
    waiting = list(
        messages.filter(position__gt=thread.summary_reach).order_by("position")[
            : CHUNK_MESSAGES + 1
        ]
    )
    chunk: list[Message] = []
    size = 0
    for message in waiting[:CHUNK_MESSAGES]:
        size += len(message.text)
        if chunk and size > CHUNK_CHARACTERS:
            break
        chunk.append(message)
    return chunk, len(chunk) < len(waiting)


def _model_of(thread: Thread) -> str:
    last = Run.objects.filter(thread=thread, status=Run.Status.COMPLETED).order_by("-position")
    return last.values_list("model", flat=True).first() or settings.CHAT_DEFAULT_MODEL


def _purse_of(thread: Thread) -> limits.Purse:
    """That of whoever asked last in it."""
    last = Run.objects.filter(thread=thread).order_by("-position")
    asker, place = last.values_list("asker", "place").first() or ("", "")
    return limits.Purse(asker, place)


def _record(
    thread: Thread,
    left: Sequence[Message],
    reply: completions.Reply,
    *,
    model: str,
    lease: Any,
    more: bool,
) -> Summary | None:
    with transaction.atomic():
        extended = Thread.objects.filter(pk=thread.pk, summary_reach=thread.summary_reach).update(
            summary=reply.text, summary_reach=left[-1].position
        )
        if not extended:  # another worker took over after our lease
            return None
        _set_due(thread, lease, timezone.now() if more else None)
        return Summary.objects.create(
            thread=thread,
            covers_from=left[0].position,
            covers_to=left[-1].position,
            text=reply.text,
            model=model,
            prompt_tokens=reply.usage.prompt_tokens,
            completion_tokens=reply.usage.completion_tokens,
            cost=prices.cost(model, reply.usage),
        )


def _set_due(thread: Thread, lease: Any, due_at: Any) -> None:
    """Give the lease back, unless an answer has asked for more meanwhile."""
    Thread.objects.filter(pk=thread.pk).update(
        summary_due_at=Case(
            When(summary_due_at=lease, then=Value(due_at, DateTimeField())),
            default=F("summary_due_at"),
        )
    )
