"""A thread as its owner reads it on the chat page: questions, answers, and what became of each run. A
page of it costs the same number of queries however long the thread is."""

from dataclasses import dataclass, field
from datetime import timedelta

from django.conf import settings
from django.db.models import F
from django.db.models.functions import Length
from django.utils import timezone
from redis.exceptions import RedisError

from agents.events import stream
from agents.models import Attempt, Run, Step, Worker
from chat.models import Message, Thread, fitting
from realm.models import User

PAGE = 20


@dataclass
class Turn:
    """A question, its run and what came of it, as far as they are there."""

    number: int
    questions: list[Message] = field(default_factory=list)
    answer: Message | None = None
    run: Run | None = None
    steps: list[Step] = field(default_factory=list)
    # What a run had said when it was stopped.
    partial: str = ""
    state: str = ""

    @property
    def going(self) -> bool:
        return self.run is not None and not self.run.is_finished

    @property
    def heard(self) -> str:
        """The id of the last event that is of no interest any more: what an attempt has told that has
        ended. Empty where there was none."""
        if self.run is None:
            return ""
        ended = self.run.attempt - (self.run.status == Run.Status.PROCESSING)
        return f"{ended}-end" if ended else ""

    @property
    def tokens(self) -> int:
        return sum(step.prompt_tokens + step.completion_tokens for step in self.steps)

    @property
    def took(self) -> timedelta | None:
        """Since it was last asked for."""
        run = self.run
        if run is None or run.finished_at is None:
            return None
        return run.finished_at - (run.retried_at or run.created_at)


@dataclass
class Part:
    """What a page shows of a thread."""

    turns: list[Turn]
    earlier: int | None  # the first turn shown, where there are more before it

    @property
    def prose(self) -> list[str]:
        """What models wrote, the latest first."""
        texts = (turn.answer.content if turn.answer else turn.partial for turn in self.turns)
        return [text for text in texts if text][::-1]

    @property
    def last_model(self) -> str:
        return next((turn.run.model for turn in reversed(self.turns) if turn.run), "")


def part(thread: Thread, reader: User | None, *, before: int | None = None) -> Part:
    """The turns before the turn `before`; the latest ones by default. Of a room's thread, those that
    the reader has been in the room for."""
    end = thread.turns if before is None else min(before, thread.turns)
    first = _first_visible(thread, reader) if thread.room_id else 0
    start = _start(thread, end, first)
    turns = _turns(thread, start, end)
    return Part(turns=turns, earlier=start if start > first else None)


def _first_visible(thread: Thread, reader: User | None) -> int:
    """The turn after the last one that is hidden from the reader."""
    visible = Run.objects.visible_to(reader)
    hidden = Run.objects.filter(thread=thread).exclude(pk__in=visible.values("pk"))
    last = hidden.order_by("-position").values_list("position", flat=True).first()
    return 0 if last is None else last // 2 + 1


def _start(thread: Thread, end: int, first: int) -> int:
    """Where a part begins that ends before `end`: PAGE turns earlier, fewer where they are long, and
    not before the turn `first`."""
    start = min(max(end - PAGE, first), end)
    said = Message.objects.filter(thread=thread, position__gte=2 * start, position__lt=2 * end)
    sizes = dict(said.values_list("position", Length("content")))
    unanswered = [2 * turn for turn in range(start, end) if 2 * turn + 1 not in sizes]
    if unanswered:
        partial = Step.objects.filter(
            run__thread=thread, run__position__in=unanswered, run__status=Run.Status.CANCELLED
        )
        for position, size in partial.values_list("run__position", Length("output")):
            sizes[position + 1] = max(size, sizes.get(position + 1, 0))
    of_turns = [sizes.get(2 * turn, 0) + sizes.get(2 * turn + 1, 0) for turn in range(start, end)]
    return max(start, end - fitting(reversed(of_turns)))


def turn_of(run: Run) -> Turn:
    return _turns(run.thread, run.turn, run.turn + 1)[0]


def _turns(thread: Thread, start: int, end: int) -> list[Turn]:
    span = {"position__gte": 2 * start, "position__lt": 2 * end}
    turns: dict[int, Turn] = {}
    for message in Message.objects.filter(thread=thread, **span).order_by("position"):
        turn = turns.setdefault(message.position // 2, Turn(message.position // 2))
        if message.role == Message.Role.ASSISTANT:
            turn.answer = message
        else:
            turn.questions.append(message)
    runs = {run.pk: run for run in Run.objects.filter(thread=thread, **span)}
    of_run = {run.pk: turns[run.turn] for run in runs.values() if run.turn in turns}
    for run_id, turn in of_run.items():
        turn.run = runs[run_id]
    for step in Step.objects.filter(run__in=of_run).defer("input", "output").order_by("id"):
        of_run[step.run_id].steps.append(step)
    _tell_partial_answers(of_run)
    _tell_states(thread, list(of_run.values()))
    return list(turns.values())


def _tell_partial_answers(of_run: dict[str, Turn]) -> None:
    last = [
        turn.steps[-1].pk
        for turn in of_run.values()
        if turn.run and turn.run.status == Run.Status.CANCELLED and turn.steps
    ]
    said = Step.objects.filter(pk__in=last, kind=Step.Kind.MODEL, attempt=F("run__attempt"))
    for run_id, output in said.values_list("run_id", "output"):
        of_run[run_id].partial = output


def _tell_states(thread: Thread, turns: list[Turn]) -> None:
    """In words, what each run waits for that has not ended."""
    going = [turn for turn in turns if turn.going]
    if not going:
        return
    first = Run.objects.unfinished().filter(thread=thread).order_by("position").first()
    for turn in going:
        if turn.run and first and turn.run.pk == first.pk:
            turn.state = _state(turn.run)
        else:
            turn.state = "Waiting for the answer before it."


def _state(run: Run) -> str:
    now = timezone.now()
    if run.status == Run.Status.PROCESSING:
        if run.lease_expires_at and run.lease_expires_at < now:
            return "Its worker does not answer any more. Another one takes over."
        return "Answering."
    if not _redis_answers():
        return "Redis is away. The question is kept, and answered when Redis is back."
    if not Worker.objects.reading().exists():
        return "No worker is running. The question is kept, and answered when there is one."
    return _between_attempts(run) if run.attempts_spent else "Waiting for a worker."


def _between_attempts(run: Run) -> str:
    last = Attempt.objects.filter(run=run).order_by("-number").first()
    if last is None or last.result != Attempt.Result.RETRIED:
        return "Waiting for a worker."
    wait = (run.due_at - timezone.now()).total_seconds() if run.due_at else 0
    when = f"in {wait:.0f} s" if wait >= 1 else "now"
    spent, most = run.attempts_spent, settings.AGENT_MAX_ATTEMPTS
    return f"The model did not answer (attempt {spent} of {most}). It is asked again {when}."


def _redis_answers() -> bool:
    try:
        stream.observer().ping()
    except RedisError:
        return False
    return True
