"""Conversations as the chat page shows them: turns with messages, answers and run states. A page takes
the same number of queries however long the thread is."""

from dataclasses import dataclass, field
from datetime import timedelta

from django.db.models import F
from django.db.models.functions import Length, Substr
from django.utils import timezone
from redis.exceptions import RedisError

from agents.events import stream
from agents.models import Run, Step, Worker
from agents.runs.retries import pending_retry
from chat.models import Message, Thread, fitting
from realm.models import User

PAGE = 20
# Of the reasoning of a step; the console has all of it.
REASONING_CHARACTERS = 4000


@dataclass
class ConversationTurn:
    """The messages of a turn, its run and its answer, as far as they exist."""

    number: int
    prompts: list[Message] = field(default_factory=list)
    answer: Message | None = None
    run: Run | None = None
    steps: list[Step] = field(default_factory=list)
    # The output of a cancelled run up to its cancellation.
    partial: str = ""
    state: str = ""

    @property
    def active(self) -> bool:
        return self.run is not None and not self.run.is_finished

    @property
    def last_event_id(self) -> str:
        """The id of the last event of the last ended attempt, for `after`. Empty if there is none."""
        if self.run is None:
            return ""
        ended = self.run.attempt - (self.run.status == Run.Status.PROCESSING)
        return f"{ended}-end" if ended else ""

    @property
    def tokens(self) -> int:
        return sum(step.prompt_tokens + step.completion_tokens for step in self.steps)

    @property
    def tokens_are_estimated(self) -> bool:
        return any(step.usage_is_estimated for step in self.steps)

    @property
    def reasoning(self) -> list[str]:
        """The text that the model wrote before its answer, in the run's last attempt."""
        if self.run is None or (self.answer and self.answer.redacted_at):
            return []
        texts = (
            step.shown_reasoning  # type: ignore[attr-defined]
            for step in self.steps
            if step.attempt == self.run.attempt
        )
        more = " …"
        return [text.strip() + more * (len(text) == REASONING_CHARACTERS) for text in texts if text]

    @property
    def took(self) -> timedelta | None:
        """The time from the message, or from the last retry, to the end of the run."""
        run = self.run
        if run is None or run.finished_at is None:
            return None
        return run.finished_at - (run.retried_at or run.created_at)


@dataclass
class ConversationPage:
    turns: list[ConversationTurn]
    earlier: int | None  # the first turn shown, if there are more before it

    @property
    def prose(self) -> list[str]:
        """Model output, latest first."""
        texts = (turn.answer.content if turn.answer else turn.partial for turn in self.turns)
        return [text for text in texts if text][::-1]

    @property
    def last_model(self) -> str:
        return next((turn.run.model for turn in reversed(self.turns) if turn.run), "")


def load_page(
    thread: Thread, reader: User | None, *, before: int | None = None
) -> ConversationPage:
    """Return the turns before the turn `before`, by default the latest ones. In a room's thread, only
    those since the reader joined."""
    end = thread.turns if before is None else min(before, thread.turns)
    first = _first_visible(thread, reader) if thread.room_id else 0
    start = _start(thread, end, first)
    turns = _turns(thread, start, end)
    return ConversationPage(turns=turns, earlier=start if start > first else None)


def _first_visible(thread: Thread, reader: User | None) -> int:
    """Return the turn after the last one that is hidden from the reader."""
    visible = Run.objects.visible_to(reader)
    hidden = Run.objects.filter(thread=thread).exclude(pk__in=visible.values("pk"))
    last = hidden.order_by("-position").values_list("position", flat=True).first()
    return 0 if last is None else last // 2 + 1


def _start(thread: Thread, end: int, first: int) -> int:
    """Return the first turn of the page that ends before `end`: PAGE turns earlier, later if they are
    long, and not before the turn `first`."""
    start = min(max(end - PAGE, first), end)
    messages = Message.objects.filter(thread=thread, position__gte=2 * start, position__lt=2 * end)
    sizes = dict(messages.values_list("position", Length("content")))
    unanswered = [2 * turn for turn in range(start, end) if 2 * turn + 1 not in sizes]
    if unanswered:
        partial = Step.objects.filter(
            run__thread=thread, run__position__in=unanswered, run__status=Run.Status.CANCELLED
        )
        for position, size in partial.values_list("run__position", Length("output")):
            sizes[position + 1] = max(size, sizes.get(position + 1, 0))
    of_turns = [sizes.get(2 * turn, 0) + sizes.get(2 * turn + 1, 0) for turn in range(start, end)]
    return max(start, end - fitting(reversed(of_turns)))


def load_turn(run: Run) -> ConversationTurn:
    return _turns(run.thread, run.turn, run.turn + 1)[0]


def _turns(thread: Thread, start: int, end: int) -> list[ConversationTurn]:
    span = {"position__gte": 2 * start, "position__lt": 2 * end}
    turns: dict[int, ConversationTurn] = {}
    for message in Message.objects.filter(thread=thread, **span).order_by("position"):
        number = message.position // 2
        turn = turns.setdefault(number, ConversationTurn(number))
        if message.role == Message.Role.ASSISTANT:
            turn.answer = message
        else:
            turn.prompts.append(message)
    runs = {run.pk: run for run in Run.objects.filter(thread=thread, **span)}
    of_run = {run.pk: turns[run.turn] for run in runs.values() if run.turn in turns}
    for run_id, turn in of_run.items():
        turn.run = runs[run_id]
    steps = Step.objects.filter(run__in=of_run).defer("input", "output", "reasoning")
    shown_reasoning = Substr("reasoning", 1, REASONING_CHARACTERS)
    for step in steps.annotate(shown_reasoning=shown_reasoning).order_by("id"):
        of_run[step.run_id].steps.append(step)
    _load_partial_answers(of_run)
    _set_states(thread, list(of_run.values()))
    return list(turns.values())


def _load_partial_answers(of_run: dict[str, ConversationTurn]) -> None:
    last = [
        turn.steps[-1].pk
        for turn in of_run.values()
        if turn.run and turn.run.status == Run.Status.CANCELLED and turn.steps
    ]
    steps = Step.objects.filter(pk__in=last, kind=Step.Kind.MODEL, attempt=F("run__attempt"))
    for run_id, output in steps.values_list("run_id", "output"):
        of_run[run_id].partial = output


def _set_states(thread: Thread, turns: list[ConversationTurn]) -> None:
    """Describe what each active run waits for."""
    active = [turn for turn in turns if turn.active]
    if not active:
        return
    first = Run.objects.unfinished().filter(thread=thread).order_by("position").first()
    for turn in active:
        if turn.run and first and turn.run.pk == first.pk:
            turn.state = _state(turn.run)
        else:
            turn.state = "Queued behind the previous message."


def _state(run: Run) -> str:
    now = timezone.now()
    if run.status == Run.Status.PROCESSING:
        if run.lease_expires_at and run.lease_expires_at < now:
            return "The worker stopped responding. Another worker will take over."
        return "Answering."
    if not _queue_is_available():
        return "The queue is unavailable. Your message is saved and will be answered."
    if not Worker.objects.reading().exists():
        return "No worker is running. Your message is saved and will be answered."
    return _between_attempts(run) if run.attempts_spent else "Waiting for a worker."


def _between_attempts(run: Run) -> str:
    retry = pending_retry(run)
    if retry is None:
        return "Waiting for a worker."
    wait = (retry.next_at - timezone.now()).total_seconds()
    when = f"in {wait:.0f} s" if wait >= 1 else "now"
    number, limit = retry.attempts + 1, retry.max_attempts
    return f"{retry.error} Retrying {when} (attempt {number} of {limit})."


def _queue_is_available() -> bool:
    try:
        stream.probe_client().ping()
    except RedisError:
        return False
    return True
