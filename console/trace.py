"""A run from the question to the room, as one page tells it: where it came from, what the model was
sent, what took how long, who worked on it, what was told of it, and where its reply went.

A constant number of queries, whatever the run has been through.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any
from urllib.parse import quote

from django.db.models import Model
from django.utils import timezone

from agents.models import Attempt, Event, Run, Step, Summary
from botrunner.models import Reply
from chat.models import Message

MAX_STEPS = 500
# Columns that hold what people said and were told.
WORDS = {"content", "input", "output", "payload", "parts"}
# What a page says of a run that will change by itself, and how long it looks for the room's reply.
DELIVERY_PATIENCE = timedelta(minutes=10)


@dataclass
class Span:
    """A bar of the time line, or a mark where it has no length."""

    title: str
    kind: str  # the class of its colour
    start: datetime
    end: datetime | None  # None: it goes on
    detail: str = ""
    tokens: int = 0
    level: int = 0
    step: Step | None = None
    left: float = 0.0
    width: float = 0.0

    @property
    def seconds(self) -> float:
        return ((self.end or timezone.now()) - self.start).total_seconds()

    @property
    def is_mark(self) -> bool:
        return self.end == self.start

    @property
    def goes_on(self) -> bool:
        return self.end is None


@dataclass
class Cycle:
    """From one request to its outcome: the first one, and one for each retry."""

    number: int
    start: datetime
    spans: list[Span]

    @property
    def seconds(self) -> float:
        # None, where retention has forgotten the events and attempts.
        ends = (((s.end or timezone.now()) - self.start).total_seconds() for s in self.spans)
        return max(ends, default=0.0)

    def lay_out(self) -> None:
        """Where each bar begins and how long it is, in parts of a hundred."""
        whole = max(self.seconds, 0.001)
        for span in self.spans:
            before = (span.start - self.start).total_seconds()
            span.left = round(min(max(100 * before / whole, 0), 99.5), 2)
            span.width = round(max(min(100 * span.seconds / whole, 100 - span.left), 0.4), 2)


@dataclass
class Sent:
    """What an attempt sent to the model."""

    attempt: int
    summary_up_to: int | None
    summary: Summary | None
    messages: list[Message]
    # Of messages that were sent and are no longer there.
    missing: int = 0


@dataclass
class Trace:
    run: Run
    attempts: list[Attempt]
    steps: list[Step]
    events: list[Event]
    replies: list[Reply]
    sent: list[Sent]
    blocked_by: Run | None
    cycles: list[Cycle] = field(default_factory=list)

    @property
    def origin(self) -> Reply | None:
        """The room event that asked, with its room and registration, where one did."""
        return self.replies[0] if self.replies else None

    @property
    def is_live(self) -> bool:
        """Whether the page will change by itself."""
        if not self.run.is_finished:
            return True
        recent = self.run.finished_at and timezone.now() - self.run.finished_at < DELIVERY_PATIENCE
        pending = (Reply.Status.WAITING, Reply.Status.READY)
        return bool(recent) and (
            any(reply.status in pending for reply in self.replies)
            or any(event.published_at is None for event in self.events)
        )

    @property
    def waited(self) -> float | None:
        """For a worker, in seconds, since it was last asked for."""
        if not self.cycles:
            return None
        started = self.run.started_at or (None if self.run.is_finished else timezone.now())
        return (started - self.cycles[-1].start).total_seconds() if started else None

    @property
    def took(self) -> float:
        """In seconds, since it was last asked for."""
        start = self.cycles[-1].start if self.cycles else self.run.created_at
        return ((self.run.finished_at or timezone.now()) - start).total_seconds()


def of(run: Run) -> Trace:
    """`run` comes with its thread, its owner, its message and its answer."""
    steps = list(run.steps.all()[:MAX_STEPS])
    replies = list(
        run.replies.select_related("question", "room", "registration", "bot_command").order_by(
            "cycle", "id"
        )
    )
    trace = Trace(
        run=run,
        attempts=list(run.attempts.order_by("number")),
        steps=steps,
        events=list(run.events.order_by("created_at")),
        replies=replies,
        sent=_sent(run, steps),
        blocked_by=_blocked_by(run),
    )
    trace.cycles = list(_cycles(trace))
    return trace


def matrix_to(room_id: str, event_id: str = "") -> str:
    """A link that opens a room, or an event in it, in the reader's own client."""
    place = "/".join(quote(part, safe="!$:@") for part in (room_id, event_id) if part)
    return f"https://matrix.to/#/{place}"


def _blocked_by(run: Run) -> Run | None:
    if run.status != Run.Status.QUEUED:
        return None
    earlier = Run.objects.unfinished().filter(thread=run.thread_id, position__lt=run.position)
    return earlier.order_by("position").first()


def _sent(run: Run, steps: Iterable[Step]) -> list[Sent]:
    """From what each attempt's first call of the model has noted (agents.runs.memory.Context.sent)."""
    noted = {
        step.attempt: step.input
        for step in steps
        if step.kind == Step.Kind.MODEL and isinstance(step.input.get("messages"), list)
    }
    ids = {pk for each in noted.values() for pk in each["messages"]}
    known = {str(pk): message for pk, message in Message.objects.in_bulk(ids).items()}
    reaches = {each.get("summaryUpTo") for each in noted.values()} - {None}
    summaries = {
        summary.covers_to: summary
        for summary in Summary.objects.filter(thread=run.thread_id, covers_to__in=reaches)
    }
    return [
        Sent(
            attempt=attempt,
            summary_up_to=each.get("summaryUpTo"),
            summary=summaries.get(each.get("summaryUpTo")),
            messages=[known[pk] for pk in each["messages"] if pk in known],
            missing=sum(pk not in known for pk in each["messages"]),
        )
        for attempt, each in noted.items()
    ]


def _cycles(trace: Trace) -> Iterator[Cycle]:
    requests = [event for event in trace.events if event.type == Event.Type.REQUESTED]
    starts = [event.created_at for event in requests] or [trace.run.created_at]
    end_of_time = timezone.now() + timedelta(days=1)
    for number, (start, end) in enumerate(pairwise([*starts, end_of_time])):
        cycle = Cycle(number, start, [])
        is_last = number == len(starts) - 1
        cycle.spans = sorted(
            _spans(trace, start, end, number, is_last), key=lambda span: (span.start, span.level)
        )
        cycle.lay_out()
        yield cycle


def _spans(
    trace: Trace, start: datetime, end: datetime, cycle: int, is_last: bool
) -> Iterator[Span]:
    attempts = [each for each in trace.attempts if start <= each.started_at < end]
    run = trace.run
    going_on = run if is_last and run.status == Run.Status.PROCESSING else None
    free_since, title = start, "Waited for a worker"
    for attempt in attempts:
        yield Span(title, "wait", free_since, attempt.started_at)
        yield Span(
            f"Attempt {attempt.number}: {attempt.result}",
            attempt.result,
            attempt.started_at,
            attempt.ended_at,
            detail=attempt.worker,
            tokens=attempt.prompt_tokens + attempt.completion_tokens,
        )
        yield from _steps(trace, attempt)
        free_since, title = attempt.ended_at, "Waited to be tried again"
    if going_on and going_on.claimed_at:
        yield Span(title, "wait", free_since, going_on.claimed_at)
        yield Span(
            f"Attempt {going_on.attempt} goes on",
            "processing",
            going_on.claimed_at,
            None,
            detail=going_on.worker,
        )
    elif is_last and run.status == Run.Status.QUEUED:
        yield Span(title.replace("Waited", "Waits"), "wait", free_since, None)
    for event in trace.events:
        if start <= event.created_at < end:
            yield _told(event)
    for reply in trace.replies:
        if reply.cycle == cycle and reply.ready_at:
            yield _delivery(reply)


def _steps(trace: Trace, attempt: Attempt) -> Iterator[Span]:
    began = attempt.started_at
    for step in trace.steps:
        if step.attempt != attempt.number:
            continue
        # Steps of before their beginning was noted: one after the other.
        began = step.started_at or began
        ended = began + timedelta(milliseconds=step.duration_ms)
        yield Span(
            f"{step.get_kind_display()} {step.name}",
            "broken" if step.error else step.kind,
            began,
            ended,
            detail=step.error,
            tokens=step.prompt_tokens + step.completion_tokens,
            level=1,
            step=step,
        )
        began = ended


def _told(event: Event) -> Span:
    if event.published_at is None:
        return Span(f"{event.type} waits to be told", "unpublished", event.created_at, None)
    # Another program's request was there before it was written down here.
    seen = max(event.published_at, event.created_at)
    return Span(f"{event.type} seen on the stream", "event", event.created_at, seen)


def _delivery(reply: Reply) -> Span:
    ready = reply.ready_at or reply.created_at
    if reply.status == Reply.Status.SENT:
        return Span("Delivered to the room", "sent", ready, reply.sent_at or ready)
    if reply.status == Reply.Status.DROPPED:
        return Span("Not delivered", "broken", ready, ready, detail=reply.error)
    return Span("Being delivered to the room", "wait", ready, None, detail=reply.error)


def raw(trace: Trace, say: Callable[[Any], str]) -> dict[str, Any]:
    """All of it as it is stored; `say` gives what was said, or how much it was."""
    return {
        "run": _columns(trace.run, say),
        "message": _columns(trace.run.message, say),
        "answer": _columns(trace.run.answer, say) if trace.run.answer else None,
        "attempts": [_columns(attempt, say) for attempt in trace.attempts],
        "steps": [_columns(step, say) for step in trace.steps],
        "events": [_columns(event, say) for event in trace.events],
        "replies": [_columns(reply, say) for reply in trace.replies],
    }


def _columns(row: Model, say: Callable[[Any], str]) -> dict[str, Any]:
    columns = {each.attname: getattr(row, each.attname) for each in row._meta.concrete_fields}
    return columns | {name: say(columns[name]) for name in WORDS & columns.keys() if columns[name]}
