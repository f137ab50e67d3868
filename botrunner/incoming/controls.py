"""Control commands in rooms: cancel runs, delete a conversation. Each returns a note if it has no
effect."""

import logging

from django.db.models import Q
from django.utils import timezone

from agents import retention
from agents.runs import actions
from botrunner.incoming.matching import CANCEL_ALL, RuleSet, control_of
from botrunner.incoming.submission import notify
from botrunner.loops import breaker
from botrunner.matrix.events import TimelineEvent
from botrunner.models import Reply, ReplyQuerySet, RoomEvent, Session
from botrunner.outgoing.content import parts_of
from chat.models import Thread

logger = logging.getLogger(__name__)

NO_POWER = (
    "This needs the power level to redact messages of others in this room. Ask a moderator or an "
    "operator."
)


class PowerNeeded(Exception):
    """Handling the event depends on the sender's power level in the room."""

    def __init__(self, room_id: str, user_id: str) -> None:
        super().__init__(f"The power of {user_id} in room {room_id} is needed.")
        self.room_id, self.user_id = room_id, user_id


def cancel_runs(row: RoomEvent, event: TimelineEvent, me: str, moderates: bool | None) -> str:
    """Cancel the sender's runs in the room or Matrix thread, or the run of the message that the command
    replies to; with `!cancel all` everybody's, if the sender moderates the room."""
    replies = _meant(row, event)
    replies = replies.select_related("run", "message").order_by("run__position")
    shared: set[int] = set()
    is_for_all = control_of(event, me, row.room.session.names) == CANCEL_ALL
    if is_for_all:
        if not _moderates(row, event, moderates):
            return _refuse(row, event, me, NO_POWER)
    else:
        replies = replies.filter(message__sender=event.sender)
        shared = {reply.pk for reply in replies if answers_others(reply)}
    cancelled = [
        actions.cancel(reply.run) for reply in replies if reply.run and reply.pk not in shared
    ]
    if any(cancelled):
        return ""
    if shared:
        reason = "Someone else is waiting for the same answer."
    elif is_for_all:
        reason = "Nothing is running here."
    else:
        reason = "You have nothing running here."
    return _refuse(row, event, me, reason) and "There was nothing to cancel."


def _meant(row: RoomEvent, event: TimelineEvent) -> ReplyQuerySet:
    """Return the waiting replies that a command is about: to the message that it replies to; otherwise
    those of its room or Matrix thread, with the one to the message on which the thread was begun."""
    waiting = Reply.objects.waiting().filter(room=row.room)
    if event.replies_to:
        replied_to = waiting.filter(_to(row, event.replies_to))
        if replied_to.exists():
            return replied_to
    here = Q(run__thread__conversation__room=row.room) & Q(
        run__thread__conversation__root=event.thread_root
    )
    return waiting.filter(here | _to(row, event.thread_root) if event.thread_root else here)


def _to(row: RoomEvent, event_id: str) -> Q:
    """Return a condition: the reply is to this message, is this message as far as it is written, or is
    to a message with which this one was merged."""
    runs: set[str] = set()
    found = Q(room=row.room, message__event_id=event_id)
    while new := {
        run_id
        for run_id in Reply.objects.filter(found).values_list("run__merged_into", flat=True)
        if run_id and run_id not in runs
    }:
        runs |= new
        found = Q(run__in=new)
    return Q(message__event_id=event_id) | Q(draft_id=event_id) | Q(run__in=runs)


def answers_others(reply: Reply) -> bool:
    """Return whether a message of another sender was merged into this one and would get no answer."""
    run_ids = [reply.run_id]
    while run_ids:
        merged = Reply.objects.filter(run__merged_into__in=run_ids)
        if merged.exclude(message__sender=reply.message.sender).exists():
            return True
        run_ids = list(merged.values_list("run_id", flat=True))
    return False


def delete_conversation(
    row: RoomEvent, event: TimelineEvent, me: str, moderates: bool | None
) -> str:
    """Delete the conversation of the room, or of the Matrix thread that the event is in."""
    thread = Thread.objects.filter(
        conversation__room=row.room, conversation__root=event.thread_root
    ).first()
    if thread is None:
        return _refuse(row, event, me, "There is no conversation to delete here.")
    if not _moderates(row, event, moderates):
        return _refuse(row, event, me, NO_POWER)
    retention.delete_thread(thread)
    logger.info("The conversation %s was deleted", thread.pk)
    _answer(row, "The conversation was deleted.")
    return ""


def resume(row: RoomEvent, event: TimelineEvent, me: str) -> str:
    """Answer again those in the room who were silenced because of a loop."""
    if not breaker.resume(row.room.room_id):
        return _refuse(row, event, me, "There is no one whom I do not answer here.")
    _answer(row, "I answer everyone here again.")
    return ""


def _answer(row: RoomEvent, text: str) -> None:
    reply = Reply(message=row, room=row.room, key=f"{row.event_id}.order"[:255])
    reply.parts = parts_of(reply, text, "m.notice")
    reply.device_id = Session.objects.values_list("device_id", flat=True).get(
        pk=row.room.session_id
    )
    reply.status, reply.ready_at = Reply.Status.READY, timezone.now()
    reply.save()


def _moderates(row: RoomEvent, event: TimelineEvent, moderates: bool | None) -> bool:
    """Return `moderates`. Raises `PowerNeeded` if it is unknown."""
    if moderates is None:
        raise PowerNeeded(row.room.room_id, event.sender)
    return moderates


def _refuse(row: RoomEvent, event: TimelineEvent, me: str, reason: str) -> str:
    """Answer with the reason; return it as the note if the sender gets no answer."""
    if not RuleSet([event.sender], me, row.room.session.names).match(event).fired:
        # It may be meant for another bot.
        return reason
    reply = Reply(message=row, room=row.room, error=reason)
    return "" if notify(row, reply) else reason
