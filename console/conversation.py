"""A thread as people read it: questions and answers in order, each with its run, and where the answer
went. A page of a thread costs the same at its beginning and at its end, however long it is."""

from dataclasses import dataclass, field

from django.db.models import Min

from agents.models import Run, Summary
from botrunner.models import Conversation, Reply
from chat.models import Message, Thread

PAGE = 40  # messages, which is twenty turns


@dataclass
class Turn:
    """A question, its run and its answer, as far as they are there."""

    number: int
    messages: list[Message] = field(default_factory=list)
    run: Run | None = None
    replies: list[Reply] = field(default_factory=list)
    summaries: list[Summary] = field(default_factory=list)

    @property
    def questions(self) -> list[Message]:
        return [each for each in self.messages if each.role != Message.Role.ASSISTANT]

    @property
    def answers(self) -> list[Message]:
        return [each for each in self.messages if each.role == Message.Role.ASSISTANT]


@dataclass
class Part:
    """What a page shows of a thread."""

    thread: Thread
    turns: list[Turn]
    # The first run that has not ended: those after it wait for it.
    at_work: Run | None
    places: list[Conversation]
    earlier: int | None  # the last turn of the page before this one
    later: int | None  # the first turn of the page after this one


def part(thread: Thread, *, upto: int | None = None, start: int | None = None) -> Part:
    """The turns up to `upto`, or from `start` on; the latest ones by default."""
    count = PAGE // 2
    latest = max(thread.turns - 1, 0)
    if start is None:
        start = max((latest if upto is None else min(upto, latest)) - count + 1, 0)
    first, end = 2 * start, 2 * (start + count)
    turns: dict[int, Turn] = {}
    messages = thread.messages.filter(position__gte=first, position__lt=end)
    for message in messages.order_by("position"):
        turns.setdefault(message.position // 2, Turn(message.position // 2)).messages.append(
            message
        )
    runs = {run.turn: run for run in thread.runs.filter(position__gte=first, position__lt=end)}
    replies: dict[str, list[Reply]] = {}
    for reply in (
        Reply.objects.filter(run__in=[run.pk for run in runs.values()])
        .select_related("room")
        .defer("parts")
        .order_by("cycle")
    ):
        replies.setdefault(reply.run_id or "", []).append(reply)
    for number, turn in turns.items():
        if run := runs.get(number):
            turn.run, turn.replies = run, replies.get(run.pk, [])
    for summary in Summary.objects.filter(
        thread=thread, covers_to__gte=first, covers_to__lt=end
    ).defer("text"):
        if turn_of := turns.get(summary.covers_to // 2):
            turn_of.summaries.append(summary)
    return Part(
        thread=thread,
        turns=list(turns.values()),
        at_work=_at_work(thread),
        places=list(Conversation.objects.filter(thread=thread).select_related("room")),
        earlier=start - 1 if start > 0 else None,
        later=start + count if start + count <= latest else None,
    )


def _at_work(thread: Thread) -> Run | None:
    unfinished = Run.objects.unfinished().filter(thread=thread)
    first = unfinished.aggregate(first=Min("position"))["first"]
    return None if first is None else unfinished.filter(position=first).first()
