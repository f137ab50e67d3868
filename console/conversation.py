"""A page of a thread: messages in order, with the run, answer and replies of each turn. Its cost does
not depend on the length of the thread or the position in it."""

from dataclasses import dataclass, field

from django.db.models import Min

from agents.models import Run, Summary
from botrunner.models import Conversation, Reply
from chat.models import Message, Thread

PAGE = 40  # messages: twenty turns


@dataclass
class ThreadTurn:
    """A user's messages with their run and answer, if they exist."""

    number: int
    messages: list[Message] = field(default_factory=list)
    run: Run | None = None
    replies: list[Reply] = field(default_factory=list)
    summaries: list[Summary] = field(default_factory=list)

    @property
    def prompts(self) -> list[Message]:
        return [each for each in self.messages if each.role != Message.Role.ASSISTANT]

    @property
    def answers(self) -> list[Message]:
        return [each for each in self.messages if each.role == Message.Role.ASSISTANT]


@dataclass
class TurnPage:
    """A page of turns of a thread."""

    thread: Thread
    turns: list[ThreadTurn]
    # The first unfinished run; later ones are queued behind it.
    active_run: Run | None
    places: list[Conversation]
    earlier: int | None  # the last turn of the page before this one
    later: int | None  # the first turn of the page after this one


def page_of(thread: Thread, *, upto: int | None = None, start: int | None = None) -> TurnPage:
    """Return the turns up to `upto` or from `start`; by default the latest."""
    count = PAGE // 2
    latest = max(thread.turns - 1, 0)
    if start is None:
        start = max((latest if upto is None else min(upto, latest)) - count + 1, 0)
    first, end = 2 * start, 2 * (start + count)
    turns: dict[int, ThreadTurn] = {}
    messages = thread.messages.filter(position__gte=first, position__lt=end)
    for message in messages.order_by("position"):
        turns.setdefault(message.position // 2, ThreadTurn(message.position // 2)).messages.append(
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
        if summarised := turns.get(summary.covers_to // 2):
            summarised.summaries.append(summary)
    return TurnPage(
        thread=thread,
        turns=list(turns.values()),
        active_run=_active_run(thread),
        places=list(Conversation.objects.filter(thread=thread).select_related("room")),
        earlier=start - 1 if start > 0 else None,
        later=start + count if start + count <= latest else None,
    )


def _active_run(thread: Thread) -> Run | None:
    unfinished = Run.objects.unfinished().filter(thread=thread)
    first = unfinished.aggregate(first=Min("position"))["first"]
    return None if first is None else unfinished.filter(position=first).first()
