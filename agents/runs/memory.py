"""The context of a run: the rolling summary of its thread, then the recent messages.

The summary is extended after an answer by the messages that have left the window since, so a message
costs the same in a thread of ten and of ten thousand. Until then, messages that are not summarised yet
are sent as they are.
"""

import logging
import time
from collections.abc import Iterable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple
from uuid import UUID

import orjson
from django.conf import settings
from django.db import connection, transaction
from django.db.models import Case, DateTimeField, F, QuerySet, Value, When
from django.db.models.functions import Substr
from django.template.loader import render_to_string
from django.utils import timezone

from agents.llm import completions, overflow
from agents.models import Run, Step, Summary
from agents.runs import history
from agents.usage import limits, prices
from chat.models import Message, Quotation, Thread
from lib import db

logger = logging.getLogger(__name__)

SUMMARY_LEASE = timedelta(minutes=3)
SUMMARY_PAUSE = timedelta(minutes=1)
# The limits of one call that extends a summary; a thread that is further behind takes several.
CHUNK_MESSAGES = 50
CHUNK_CHARACTERS = 60_000
# The limit of each message but the run's own: an answer may have megabytes, and many runs share a
# worker's memory.
MESSAGE_CHARACTERS = 100_000
# Messages that were merged into the run may be more than a window.
MERGED_MESSAGES = 50


# Of each run: plain SQL, for which the ORM would take seven times as long.
HISTORY = """
    SELECT message.id, message.position, message.role,
        CASE WHEN message.position = %(own)s OR run.merged_into_id = %(run)s THEN message.content
            ELSE SUBSTR(message.content, 1, %(characters)s) END,
        message.quotations, message.redacted_at IS NOT NULL,
        run.id, run.status, run.merged_into_id,
        CASE WHEN message.position = %(own)s THEN thread.summary ELSE '' END, thread.summary_reach
    FROM chat_message message
    JOIN chat_thread thread ON thread.id = message.thread_id
    LEFT JOIN agents_run run ON run.message_id = message.id
    WHERE message.thread_id = %(thread)s
        AND message.position > %(after)s AND message.position < %(before)s
    ORDER BY message.position DESC LIMIT %(limit)s
"""


class StoredRow(NamedTuple):
    """A message with its run, and with the summary of the thread if it is the run's own."""

    id: Any
    position: int
    role: str
    text: str
    quotations: Any
    is_redacted: bool
    run: str | None
    status: str | None
    merged_into: str | None
    summary: str
    summary_reach: int


def read_history(run: Run) -> history.History:
    """Read the messages up to the run's own that may be sent. One query if the window holds them;
    another for more that are not summarised, and one for partial answers."""
    window = settings.CHAT_MEMORY_RECENT_MESSAGES
    rows = _read_rows(run, -1, run.position + 1, window)
    if not rows:
        raise history.NoQuestion
    # In the same statement as the messages: `run.thread` is as of before the claim.
    summary, reach = rows[0].summary, rows[0].summary_reach
    if rows[-1].position > reach + 1:
        more = max(window * history.UNSUMMARISED_WINDOWS, MERGED_MESSAGES)
        rows += _read_rows(run, reach, rows[-1].position, more)
    partial = _partial_answers(rows)
    return history.History(
        path=[_history_row(row, partial) for row in reversed(rows)],
        window=window,
        summary=summary,
        summary_reach=reach,
    )


def _read_rows(run: Run, after: int, before: int, limit: int) -> list[StoredRow]:
    """Read messages between two positions, the newest first. The text of those that the run answers is
    complete; of others only the beginning leaves the database."""
    values: dict[str, str | int] = {
        "own": run.position,
        "run": run.pk,
        "thread": run.thread_id,
        "characters": MESSAGE_CHARACTERS,
        "after": after,
        "before": before,
        "limit": limit,
    }
    with connection.cursor() as cursor:
        cursor.execute(HISTORY, values)
        return [StoredRow(*row) for row in cursor.fetchall()]


def _history_row(row: StoredRow, partial: dict[str, str]) -> history.HistoryRow:
    return history.HistoryRow(
        id=str(row.id if isinstance(row.id, UUID) else UUID(row.id)),
        position=row.position,
        role=row.role,
        text=row.text,
        run=row.run or "",
        status=row.status or "",
        merged_into=row.merged_into or "",
        partial=partial.get(row.run or "", ""),
        # The driver does not parse JSON; nearly all are empty.
        quotations=() if row.quotations == "[]" else _quotations(orjson.loads(row.quotations)),
        is_redacted=bool(row.is_redacted),
    )


def _quotations(quotations: Iterable[Quotation]) -> tuple[history.QuotedText, ...]:
    return tuple(
        history.QuotedText(each["text"], each["author"], each["kind"]) for each in quotations
    )


def summary_prompt(
    summary: str, messages: Sequence[Any], characters: int | None = None
) -> history.Prompt:
    """Return the prompt for a new summary: fixed instructions, then summary and messages as data. With
    `characters`, each text is cut to its share of them."""
    texts = [history.with_quotations(each.text, _quotations(each.quotations)) for each in messages]
    if characters is not None:
        share = max(history.SMALLEST_PART, characters // (2 * len(texts) or 1))
        texts = [history.cut(text, share) for text in texts]
        summary = history.cut(summary, max(history.SMALLEST_PART, characters // 2))
    parts = [
        history.marked("message", text, f' role="{history.role_of(message.role)}"')
        for text, message in zip(texts, messages, strict=True)
    ]
    so_far = history.marked("summary", summary or "(none yet)")
    text = render_to_string("agents/summarise.txt", {"summary": so_far, "messages": parts})
    return history.Prompt(
        [{"role": "user", "content": text}],
        sent={"messages": [str(message.pk) for message in messages]},
        context_characters=len(so_far) + sum(map(len, parts)),
    )


def shortened(messages: QuerySet[Message]) -> QuerySet[Any]:
    """Select messages as named tuples. Only the beginning of a text leaves the database."""
    columns = ("pk", "position", "role", "text", "quotations")
    beginning = Substr("content", 1, MESSAGE_CHARACTERS)
    return messages.annotate(text=beginning).values_list(*columns, named=True)


def within(newest_first: Sequence[Any]) -> list[Any]:
    """Return as many messages as fit into a context, without a gap; the newest in any case."""
    fitting, size = list(newest_first[:1]), 0
    for message in newest_first[1:]:
        size += len(message.text)
        if size > history.CONTEXT_CHARACTERS:
            break
        fitting.append(message)
    return fitting


def _partial_answers(rows: Sequence[StoredRow]) -> dict[str, str]:
    """Return the partial answers of runs that were cancelled or failed. Without a query if all were
    answered."""
    ended = [
        row.run
        for row in rows
        if row.status in (Run.Status.CANCELLED, Run.Status.FAILED) and not row.merged_into
    ]
    if not ended:
        return {}
    steps = Step.objects.filter(run__in=ended, kind=Step.Kind.MODEL).exclude(output="")
    outputs = steps.order_by("pk").values_list("run", Substr("output", 1, MESSAGE_CHARACTERS))
    # The last of several steps wins, of those with text.
    return {run: text for run, text in outputs if text.strip()}


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


def withdraw(thread_id: str, position: int) -> None:
    """Withdraw the summaries that cover a message which is edited or redacted, also one that is being
    made, in the transaction of that change, with the thread locked. The thread gets the version from
    before the message back, and a new one later: an edit must not cost a call each."""
    now = timezone.now()
    thread = Thread.objects.filter(pk=thread_id)
    thread.update(memory_version=F("memory_version") + 1)
    versions = Summary.objects.filter(thread=thread_id, withdrawn_at=None)
    versions.filter(covers_to__gte=position).update(text="", withdrawn_at=now)
    last = versions.filter(covers_to__lt=position).order_by("-covers_to").first()
    thread.filter(summary_reach__gte=position).update(
        summary=last.text if last else "",
        summary_reach=last.covers_to if last else -1,
        summary_due_at=now + SUMMARY_PAUSE if completions.configured() else None,
    )


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
    db.release_connection()
    budget = _budget_of(thread)
    deadline = time.monotonic() + SUMMARY_LEASE.total_seconds() - 30
    options = completions.CallOptions(deadline=deadline, budget=budget)
    try:
        reply = _summary_of(thread.summary, messages, model, options)
    except completions.LLMError as error:
        logger.warning("The summary of thread %s is postponed: %s", thread_id, error)
        pause = max(SUMMARY_PAUSE, timedelta(seconds=error.retry_after or 0))
        _set_due(thread, lease, timezone.now() + pause * (60 if error.permanent else 1))
        return None
    finally:
        budget.settle()
    return _record(thread, messages, reply, model=model, lease=lease, more=more)


def _summary_of(
    summary: str, messages: Sequence[Any], model: str, options: completions.CallOptions
) -> completions.ModelReply:
    """Return the new summary. If the model cannot take the whole messages, it gets their beginnings.
    Raises `LLMError`."""
    conversation = overflow.CallMessages(
        summary_prompt(summary, messages), partial(summary_prompt, summary, messages)
    )
    try:
        reply = completions.complete(conversation.messages, model=model, options=options)
    except completions.LLMError as error:
        if error.code != overflow.CODE or not conversation.shorten(error):
            raise
        reply = completions.complete(conversation.messages, model=model, options=options)
    if not reply.text.strip():
        raise completions.LLMError("The summary is empty.", code="empty", permanent=False)
    return reply


def _messages_to_summarise(thread: Thread) -> tuple[list[Any], bool]:
    """Return the messages to summarise now, and whether there are more.

    An unanswered message bounds them: its context may hold nothing later than itself.
    """
    window = settings.CHAT_MEMORY_RECENT_MESSAGES
    messages = shortened(Message.objects.filter(thread=thread, redacted_at=None))
    if (limit := _first_unanswered(thread)) is not None:
        messages = messages.filter(position__lt=limit)
    # The next message takes one of the window's places. What a context cannot begin with is summarised.
    recent = messages.order_by("-position").values_list("position", "role")[: window - 1]
    questions = [position for position, role in recent if history.role_of(role) == history.USER]
    if questions and window > 1:
        messages = messages.filter(position__lt=min(questions))
    waiting = list(
        messages.filter(position__gt=thread.summary_reach).order_by("position")[
            : CHUNK_MESSAGES + 1
        ]
    )
    chunk = _chunk_of(waiting)
    return chunk, len(chunk) < len(waiting)


def _first_unanswered(thread: Thread) -> int | None:
    """Return the position of the first message that a run is still to answer, its own or one that was
    merged into it."""
    runs = Run.objects.filter(thread=thread)
    unfinished = dict(runs.unfinished().values_list("pk", "position"))
    if not unfinished:
        return None
    merged = runs.filter(merged_into__isnull=False, position__gt=thread.summary_reach)
    # A message is merged into a later one, which may be merged in turn.
    for pk, position, into in merged.order_by("-position").values_list(
        "pk", "position", "merged_into"
    ):
        if into in unfinished:
            unfinished[pk] = position
    return min(unfinished.values())


def _chunk_of(waiting: Sequence[Any]) -> list[Any]:
    """Return the messages of one call, up to the end of a turn if possible."""
    chunk: list[Any] = []
    size = 0
    for message in waiting[:CHUNK_MESSAGES]:
        size += len(message.text)
        if chunk and size > CHUNK_CHARACTERS:
            break
        chunk.append(message)
    while (
        1 < len(chunk) < len(waiting)
        and history.role_of(waiting[len(chunk)].role) == history.ASSISTANT
    ):
        chunk.pop()
    return chunk


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
        unchanged = Thread.objects.filter(
            pk=thread.pk,
            summary_reach=thread.summary_reach,
            memory_version=thread.memory_version,
        )
        if not unchanged.update(summary=reply.text, summary_reach=messages[-1].position):
            # Another worker took over after our lease, or a message was edited or redacted.
            _set_due(thread, lease, timezone.now())
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
