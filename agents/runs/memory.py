"""The context of a run: the rolling summary of its thread, then the recent messages.

The summary is extended after an answer by the messages that have left the window since, so a message
costs the same in a thread of ten and of ten thousand. Until then, messages that are not summarised yet
are sent as they are.
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
# The limits of one call that extends a summary; a thread that is further behind takes several.
CHUNK_MESSAGES = 50
CHUNK_CHARACTERS = 60_000
# The limits of each message but the run's own, and of all: an answer may have megabytes, and many runs
# share a worker's memory.
MESSAGE_CHARACTERS = 100_000
CONTEXT_CHARACTERS = 400_000
# Of messages that are not summarised yet, this many windows are sent; more would not be "recent".
UNSUMMARISED_WINDOWS = 3


@dataclass(frozen=True)
class Context:
    messages: list[dict[str, Any]]  # as /chat/completions takes them
    sent: dict[str, Any]  # Step.input: which summary and which messages these were


def context(run: Run) -> Context:
    """Return the context of a run: no message later than its own."""
    thread, window = run.thread, settings.CHAT_MEMORY_RECENT_MESSAGES
    visible = Message.objects.filter(thread_id=run.thread_id, position__lte=run.position)
    earlier = shortened(visible, whole=run.position)
    recent: list[Any] = list(earlier.order_by("-position")[:window])
    if not recent:
        raise completions.Stopped  # the thread was deleted since the run was claimed
    if recent[-1].position > thread.summary_reach + 1:
        unsummarised = earlier.filter(
            position__gt=thread.summary_reach, position__lt=recent[-1].position
        ).order_by("-position")
        recent += unsummarised[: window * UNSUMMARISED_WINDOWS]
    recent = within(recent, CONTEXT_CHARACTERS)
    recent.reverse()
    partial = _broken_off(run, recent)
    messages = []
    for message in recent:
        messages.append({"role": _role(message.role), "content": message.text})
        if message.position in partial:
            messages.append({"role": "assistant", "content": partial[message.position]})
    reach = thread.summary_reach if thread.summary and thread.summary_reach < run.position else None
    if reach is not None:
        _put_note(messages, thread.summary)
    return Context(
        messages=messages,
        sent={
            "summaryUpTo": reach,
            "messages": [str(message.pk) for message in recent],
            **({"brokenOffAfter": sorted(partial)} if partial else {}),
        },
    )


def _role(role: str) -> str:
    """Return the role to send a message with: a thread never gives instructions."""
    return "assistant" if role == Message.Role.ASSISTANT else "user"


def _put_note(messages: list[dict[str, Any]], summary: str) -> None:
    """Put the summary at the start of the first user message. It repeats the words of users, so it has
    their rank and is no system message."""
    note = render_to_string("agents/memory.txt", {"summary": marked("summary", summary)}).strip()
    # There is one: the run's own.
    first = next(message for message in messages if message["role"] == "user")
    first["content"] = f"{note}\n\n{first['content']}"


MARKS = re.compile(r"<(?=[\s/\\]*(?:summary|message)\b)", re.IGNORECASE)


def marked(name: str, text: str, attributes: str = "") -> str:
    """Wrap text in an opening and a closing mark. Marks within the text are escaped, so that no text
    ends early or begins another one."""
    return f"<{name}{attributes}>\n{MARKS.sub('&lt;', text)}\n</{name}>"


def summary_prompt(summary: str, messages: Sequence[Any]) -> str:
    """Return the prompt for a new summary: fixed instructions, then summary and messages as data."""
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
    """Select `pk`, `position`, `role` and `text` as named tuples. The text at the position `whole` is
    complete; of others only the beginning leaves the database."""
    text = Case(
        When(position=whole, then=F("content")),
        default=Substr("content", 1, MESSAGE_CHARACTERS),
        output_field=TextField(),
    )
    return messages.annotate(text=text).values_list("pk", "position", "role", "text", named=True)


def within(newest_first: list[Any], characters: int) -> list[Any]:
    """Return as many messages as fit, without a gap; the newest in any case."""
    fitting, size = newest_first[:1], 0
    for message in newest_first[1:]:
        size += len(message.text)
        if size > characters:
            break
        fitting.append(message)
    return fitting


def _broken_off(run: Run, recent: Sequence[Message]) -> dict[int, str]:
    """Return the partial answers of earlier runs that were cancelled or failed, by the position of
    their message. Without a query if all were answered."""
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
    # The last of several steps wins.
    outputs = steps.values_list("run__position", Substr("output", 1, MESSAGE_CHARACTERS))
    return {
        position: render_to_string("agents/broken_off.txt", {"text": text}).strip()
        for position, text in dict(outputs).items()
    }


def note_answer(run: Run) -> bool:
    """Note, in the transaction of the answer, that messages may have left the window. Return True when
    a summary is due."""
    last = run.position + 1
    if (
        not completions.configured()
        or last - run.thread.summary_reach < settings.CHAT_MEMORY_RECENT_MESSAGES
    ):
        return False
    Thread.objects.filter(pk=run.thread_id).update(summary_due_at=timezone.now())
    return True


def due() -> list[str]:
    """Return threads whose summary is overdue: a worker died, or the model failed."""
    late = timezone.now() - timedelta(seconds=5)
    threads = Thread.objects.filter(summary_due_at__lt=late).order_by("summary_due_at")
    return list(threads.values_list("pk", flat=True)[:20])


def summarise(thread_id: str) -> Summary | None:
    """Extend the summary of a thread by the messages that have left the window. Return None when there
    are none, when another worker does it, or when the model failed (then it is retried later)."""
    now = timezone.now()
    lease = now + SUMMARY_LEASE
    with transaction.atomic():
        due = Thread.objects.filter(pk=thread_id, summary_due_at__lte=now)
        leased = due.update(summary_due_at=lease)
    if not leased:
        return None
    thread = Thread.objects.filter(pk=thread_id).first()
    if thread is None:  # deleted since
        return None
    messages, more = _messages_to_summarise(thread)
    if not messages:
        _set_due(thread, lease, None)
        return None
    model = settings.CHAT_SUMMARY_MODEL or _model_of(thread)
    prompt = summary_prompt(thread.summary, messages)
    db.release_connection()
    budget = _budget_of(thread)
    deadline = time.monotonic() + SUMMARY_LEASE.total_seconds() - 30
    options = completions.CallOptions(deadline=deadline, budget=budget)
    try:
        reply = completions.complete(
            [{"role": "user", "content": prompt}], model=model, options=options
        )
    except completions.LLMError as error:
        logger.warning("The summary of thread %s is postponed: %s", thread_id, error)
        pause = max(SUMMARY_PAUSE, timedelta(seconds=error.retry_after or 0))
        _set_due(thread, lease, timezone.now() + pause * (60 if error.permanent else 1))
        return None
    finally:
        budget.settle()
    return _record(thread, messages, reply, model=model, lease=lease, more=more)


def _messages_to_summarise(thread: Thread) -> tuple[list[Message], bool]:
    """Return the messages to summarise now, and whether there are more.

    An unanswered message bounds them: its context may hold nothing later than itself.
    """
    window = settings.CHAT_MEMORY_RECENT_MESSAGES
    messages = shortened(Message.objects.filter(thread=thread))
    open_question = Run.objects.unfinished().filter(thread=thread).aggregate(Min("position"))
    if (limit := open_question["position__min"]) is not None:
        messages = messages.filter(position__lt=limit)
    # The next message takes one of the window's places.
    recent = messages.order_by("-position").values_list("position", flat=True)[: window - 1]
    edge = min(recent, default=None) if window > 1 else None
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


def _budget_of(thread: Thread) -> limits.BudgetReservation:
    """Return the budget of the last user of a thread."""
    last = Run.objects.filter(thread=thread).order_by("-position")
    requester, place = last.values_list("requester", "place").first() or ("", "")
    return limits.BudgetReservation(requester, place)


def _record(
    thread: Thread,
    messages: Sequence[Message],
    reply: completions.ModelReply,
    *,
    model: str,
    lease: Any,
    more: bool,
) -> Summary | None:
    with transaction.atomic():
        extended = Thread.objects.filter(pk=thread.pk, summary_reach=thread.summary_reach).update(
            summary=reply.text, summary_reach=messages[-1].position
        )
        if not extended:  # another worker took over after our lease
            return None
        _set_due(thread, lease, timezone.now() if more else None)
        return Summary.objects.create(
            thread=thread,
            covers_from=messages[0].position,
            covers_to=messages[-1].position,
            text=reply.text,
            model=model,
            prompt_tokens=reply.usage.prompt_tokens,
            completion_tokens=reply.usage.completion_tokens,
            cost=prices.cost(model, reply.usage),
        )


def _set_due(thread: Thread, lease: Any, due_at: Any) -> None:
    """Release the lease, unless an answer has made the summary due again meanwhile."""
    Thread.objects.filter(pk=thread.pk).update(
        summary_due_at=Case(
            When(summary_due_at=lease, then=Value(due_at, DateTimeField())),
            default=F("summary_due_at"),
        )
    )
