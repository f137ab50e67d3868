"""The trace of a run, for its page: origin, model input, timeline, attempts, events and replies.

The number of queries is constant.
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
# Columns that hold messages.
BODIES = {"content", "input", "output", "payload", "parts", "reasoning"}
# How long after a run's end its page refreshes itself while a reply or event is pending.
DELIVERY_PATIENCE = timedelta(minutes=10)


@dataclass
class Span:
    """A bar of the timeline, or a mark at a time."""

    title: str
    kind: str  # its CSS class
    start: datetime
    end: datetime | None  # None while it is active
    detail: str = ""
    tokens: int = 0
    level: int = 0
    step: Step | None = None
    # Shown as a time instead of a duration.
    is_mark: bool = False
    left: float = 0.0
    width: float = 0.0

    @property
    def seconds(self) -> float:
        return ((self.end or timezone.now()) - self.start).total_seconds()

    @property
    def is_open(self) -> bool:
        return self.end is None


@dataclass
class Cycle:
    """The spans from a request to its result: one cycle for the first request and one per retry."""

    number: int
    start: datetime
    spans: list[Span]

    @property
    def seconds(self) -> float:
        # No spans if retention has deleted the events and attempts.
        ends = (((s.end or timezone.now()) - self.start).total_seconds() for s in self.spans)
        return max(ends, default=0.0)

    def lay_out(self) -> None:
        """Set start and length of each bar, in percent."""
        total = max(self.seconds, 0.001)
        for span in self.spans:
            before = (span.start - self.start).total_seconds()
            span.left = round(min(max(100 * before / total, 0), 99.5), 2)
            span.width = round(max(min(100 * span.seconds / total, 100 - span.left), 0.4), 2)


@dataclass
class ModelInput:
    """The messages that one or several attempts sent to the model."""

    attempts: list[int]
    # The endpoint found the conversation too long, so older turns were left out.
    is_shortened: bool
    summary_up_to: int | None
    summary: Summary | None
    messages: list[Message]
    # The number of sent messages that no longer exist.
    missing: int = 0


@dataclass
class Trace:
    run: Run
    attempts: list[Attempt]
    steps: list[Step]
    events: list[Event]
    replies: list[Reply]
    inputs: list[ModelInput]
    blocked_by: Run | None
    cycles: list[Cycle] = field(default_factory=list)

    @property
    def origin(self) -> Reply | None:
        """Return the reply that links a run to its room event, room and registration."""
        return self.replies[0] if self.replies else None

    @property
    def is_live(self) -> bool:
        """Return whether the page refreshes itself."""
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
        """Return the seconds in the queue, since the last request."""
        if not self.cycles:
            return None
        started = self.run.started_at or (None if self.run.is_finished else timezone.now())
        return (started - self.cycles[-1].start).total_seconds() if started else None

    @property
    def took(self) -> float:
        """Return the seconds since the last request."""
        start = self.cycles[-1].start if self.cycles else self.run.created_at
        return ((self.run.finished_at or timezone.now()) - start).total_seconds()


def of(run: Run) -> Trace:
    """Return the trace of a run that was loaded with its thread, owner, message and answer."""
    steps = list(run.steps.all()[:MAX_STEPS])
    replies = list(
        run.replies.select_related("message", "room", "registration", "bot_command").order_by(
            "cycle", "id"
        )
    )
    trace = Trace(
        run=run,
        attempts=list(run.attempts.order_by("number")),
        steps=steps,
        events=list(run.events.order_by("created_at")),
        replies=replies,
        inputs=_inputs(run, steps),
        blocked_by=_blocked_by(run),
    )
    trace.cycles = list(_cycles(trace))
    return trace


def matrix_to(room_id: str, event_id: str = "") -> str:
    """Return a link that opens a room, or an event in it, in the user's Matrix client."""
    place = "/".join(quote(part, safe="!$:@") for part in (room_id, event_id) if part)
    return f"https://matrix.to/#/{place}"


def _blocked_by(run: Run) -> Run | None:
    if run.status != Run.Status.QUEUED:
        return None
    earlier = Run.objects.unfinished().filter(thread=run.thread_id, position__lt=run.position)
    return earlier.order_by("position").first()


def _inputs(run: Run, steps: Iterable[Step]) -> list[ModelInput]:
    """Return the inputs, as recorded by each attempt's first model call (agents.runs.memory). Attempts
    with the same input share one."""
    recorded = {
        step.attempt: step.input
        for step in steps
        if step.kind == Step.Kind.MODEL and isinstance(step.input.get("messages"), list)
    }
    attempts: dict[tuple[Any, ...], list[int]] = {}
    for attempt, each in recorded.items():
        same = (each.get("summaryUpTo"), each.get("shortened"), *each["messages"])
        attempts.setdefault(same, []).append(attempt)
    ids = {pk for each in recorded.values() for pk in each["messages"]}
    by_id = {str(pk): message for pk, message in Message.objects.in_bulk(ids).items()}
    reaches = {each.get("summaryUpTo") for each in recorded.values()} - {None}
    summaries = {
        summary.covers_to: summary
        for summary in Summary.objects.filter(
            thread=run.thread_id, covers_to__in=reaches, withdrawn_at=None
        )
    }
    return [
        ModelInput(
            attempts=numbers,
            is_shortened=bool(shortened),
            summary_up_to=reach,
            summary=summaries.get(reach),
            messages=[by_id[pk] for pk in messages if pk in by_id],
            missing=sum(pk not in by_id for pk in messages),
        )
        for (reach, shortened, *messages), numbers in attempts.items()
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
    active = run if is_last and run.status == Run.Status.PROCESSING else None
    waiting_since, title = start, "In queue"
    for attempt in attempts:
        yield Span(title, "wait", waiting_since, attempt.started_at)
        yield Span(
            f"Attempt {attempt.number}: {attempt.result}",
            attempt.result,
            attempt.started_at,
            attempt.ended_at,
            detail=attempt.worker,
            tokens=attempt.prompt_tokens + attempt.completion_tokens,
        )
        yield from _steps(trace, attempt)
        waiting_since, title = attempt.ended_at, "Waiting for retry"
    if active and active.claimed_at:
        yield Span(title, "wait", waiting_since, active.claimed_at)
        yield Span(
            f"Attempt {active.attempt} active",
            "processing",
            active.claimed_at,
            None,
            detail=active.worker,
        )
    elif is_last and run.status == Run.Status.QUEUED:
        yield Span(title, "wait", waiting_since, None)
    for event in trace.events:
        if start <= event.created_at < end:
            yield _publication(event)
    for reply in trace.replies:
        if reply.cycle == cycle and reply.ready_at:
            yield _delivery(reply)


def _steps(trace: Trace, attempt: Attempt) -> Iterator[Span]:
    began = attempt.started_at
    for step in trace.steps:
        if step.attempt != attempt.number:
            continue
        # Old steps have no start: show them one after the other.
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


def _publication(event: Event) -> Span:
    if event.published_at is None:
        return Span(f"{event.type} not yet published", "unpublished", event.created_at, None)
    # Another program publishes a request before it is recorded here.
    published = max(event.published_at, event.created_at)
    return Span(
        f"{event.type} published",
        "event",
        event.created_at,
        published,
        is_mark=published == event.created_at,
    )


def _delivery(reply: Reply) -> Span:
    ready = reply.ready_at or reply.created_at
    if reply.status == Reply.Status.SENT:
        sent = reply.sent_at or ready
        return Span("Delivered to the room", "sent", ready, sent, is_mark=sent == ready)
    if reply.status == Reply.Status.DROPPED:
        return Span("Not delivered", "broken", ready, ready, detail=reply.error, is_mark=True)
    return Span("Delivering to the room", "wait", ready, None, detail=reply.error)


def raw(trace: Trace, mask: Callable[[Any], str]) -> dict[str, Any]:
    """Return the stored rows; `mask` replaces the texts that the caller may not read."""
    return {
        "run": _columns(trace.run, mask),
        "message": _columns(trace.run.message, mask),
        "answer": _columns(trace.run.answer, mask) if trace.run.answer else None,
        "attempts": [_columns(attempt, mask) for attempt in trace.attempts],
        "steps": [_columns(step, mask) for step in trace.steps],
        "events": [_columns(event, mask) for event in trace.events],
        "replies": [_columns(reply, mask) for reply in trace.replies],
    }


def _columns(row: Model, mask: Callable[[Any], str]) -> dict[str, Any]:
    columns = {each.attname: getattr(row, each.attname) for each in row._meta.concrete_fields}
    return columns | {
        name: mask(columns[name]) for name in BODIES & columns.keys() if columns[name]
    }
