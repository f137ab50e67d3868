"""Submit messages: each rule that fires starts a run; refusals are answered in the room."""

import hashlib
import logging
import time
from dataclasses import replace
from typing import Any

from agents import inbox
from agents.models import CHAT_REPLY, Run
from botrunner.incoming import quotations
from botrunner.incoming.classification import Classified
from botrunner.incoming.matching import Rule, RuleSet, how_to, prompt_of
from botrunner.incoming.unreadable import NOTE, is_unreadable, refuse
from botrunner.loops import Judgement, breaker, sentence
from botrunner.matrix.events import TimelineEvent, storable
from botrunner.models import Conversation, Reply, RoomEvent
from botrunner.verdicts import stored
from chat.models import Quotation, Thread
from lib.tracing import tagged
from realm.filters import EventFilter

logger = logging.getLogger(__name__)

# A sender gets one notice about each limit in this time, in each room.
NOTICE_SECONDS = {
    "rate_limited": 60,
    "too_many_waiting": 60,
    "bytes_exhausted": 3600,
    "budget_exhausted": 3600,
}
# Notices a minute about refusals that no limit counts.
NOTICES = 5


def submit_recorded(classified: Classified, me: str) -> None:
    """Submit a message in the transaction that records it. Raises `EventsNeeded`."""
    row, event = classified.row, classified.event
    with tagged(room=row.room.room_id, event_id=row.event_id, request_id=row.event_id):
        if not _is_refused(row, event):
            for rule, filter_ in classified.fired:
                _start_run(row, event, rule, filter_, me, None)
        if row.note:
            if _is_unanswered(row):
                row.state, row.source = RoomEvent.State.IGNORED, None
            row.save(update_fields=["state", "source", "note"])


def submit(row: RoomEvent, event: TimelineEvent, me: str, found: quotations.Found | None) -> str:
    """Submit a message recorded earlier; return a note if it has no effect. Raises `EventsNeeded`."""
    if _is_refused(row, event):
        return row.note if _is_unanswered(row) else ""
    # Match again: commands and registrations may have changed.
    match = RuleSet([event.sender], me, row.room.session.names).match(event)
    row.verdicts = stored(match.verdicts)
    for rule, filter_ in match.fired:
        _start_run(row, event, rule, filter_, me, found)
    if _is_unanswered(row):
        return row.note
    return f"Its command no longer matches. {match.reason}" if match.reason else ""


def _is_refused(row: RoomEvent, event: TimelineEvent) -> bool:
    """Return whether the message starts no run, because it is no text or part of a loop."""
    if is_unreadable(event):
        reply = Reply(message=row, room=row.room)
        if not refuse(reply, _sender_key(row)):
            row.note = NOTE
        return True
    room_id, length = row.room.room_id, len(event.body)
    verdict = breaker.judge(room_id, row.sender, row.event_id, length)
    if verdict == Judgement.LOOP:
        logger.warning("Sender %s seems to be a bot in a loop and is not answered", row.sender)
        key = hashlib.sha256(row.event_id.encode()).hexdigest()
        Reply(message=row, room=row.room, key=f"loop.{key}", error=sentence()).save()
    elif verdict == Judgement.SILENCE:
        row.note = "Not answered because of a loop: write !resume in the room to end this."
    return verdict != Judgement.ANSWER


def _is_unanswered(row: RoomEvent) -> bool:
    """Return whether the message was refused without a notice in the room."""
    return bool(row.note) and not row.replies.exists()


def _start_run(
    row: RoomEvent,
    event: TimelineEvent,
    rule: Rule,
    filter_: EventFilter,
    me: str,
    found: quotations.Found | None,
) -> None:
    prompt = prompt_of(filter_, event, me, row.room.session.names)
    thread_id = _thread_of(row, event)
    quoted = quotations.of(row, event, thread_id, found, me)
    reply = Reply(
        message=row,
        room=row.room,
        registration_id=rule.registration_id,
        bot_command_id=rule.command_id,
    )
    try:
        if rule.command == CHAT_REPLY and not prompt:
            raise inbox.Invalid(how_to(filter_))
        accepted = _submit(row, event, rule, prompt, thread_id, quoted)
    except inbox.Limited as error:
        row.note = _notify_limit(row, reply, error)
        return
    except inbox.Refused as error:
        reply.error = str(error)
        if not notify(row, reply):
            row.note = f"Refused: {error}"
        logger.info("A message was refused: %s", error)
        return
    if accepted.began_thread:
        Conversation.objects.update_or_create(
            room=row.room, root=event.thread_root, defaults={"thread_id": accepted.thread_id}
        )
    quotations.record(row.room, accepted, quoted)
    reply.run_id = reply.key = accepted.run_id
    reply.save()
    logger.info(
        "Command %s of registration %s fired: run %s",
        rule.command,
        rule.registration_id,
        accepted.run_id,
    )


def _thread_of(row: RoomEvent, event: TimelineEvent) -> str | None:
    conversations = Conversation.objects.filter(room=row.room_id, root=event.thread_root)
    return next(iter(conversations.values_list("thread_id", flat=True)[:1]), None)


def _submit(
    row: RoomEvent,
    event: TimelineEvent,
    rule: Rule,
    prompt: str,
    thread_id: str | None,
    quoted: tuple[Quotation, ...],
) -> inbox.Accepted:
    """Submit to the inbox. Raises `inbox.Refused`."""
    submission = inbox.Submission(
        content=prompt or rule.command,
        source=Run.Source.MATRIX,
        threads=Thread.objects.filter(room_id=row.room.room_id),
        # The command may belong to the bot: limits apply to the sender.
        requester=event.sender,
        place=row.room.room_id,
        room_id=row.room.room_id,
        received_at=row.created_at,
        command=rule.command,
        input=_input(row, event),
        quotations=quoted,
        correlation_id=event.event_id[: inbox.MAX_CORRELATION_LENGTH],
        thread_id=thread_id,
    )
    try:
        return inbox.submit(submission)
    except (inbox.Deleted, inbox.UnknownThread):
        # The thread was deleted after the query; its id is not used again.
        return inbox.submit(replace(submission, thread_id=None))


def _notify_limit(row: RoomEvent, reply: Reply, error: inbox.Limited) -> str:
    """Answer that a limit is reached, to each sender in a room once in a while: a flood must not cause
    another one. Return the note for the event."""
    window = int(time.time() // NOTICE_SECONDS[error.code])
    reply.key, reply.error = f"{error.code}.{_sender_key(row)}.{window}", str(error)
    if not Reply.objects.filter(key=reply.key).exists():
        Reply.objects.bulk_create([reply], ignore_conflicts=True)
    logger.info("A message was refused (%s): %s", error.code, error)
    return f"Refused ({error.code}): {error}"


def notify(row: RoomEvent, reply: Reply) -> bool:
    """Answer a message that starts no run with the reason; return False if the sender gets no notice.
    An event gets one, however many commands it fires, and a sender `NOTICES` a minute: the limits count
    only runs."""
    of_event = Reply.objects.filter(message=row, run=None)
    if of_event.filter(error=reply.error).exists():
        return True
    key = f"refused.{_sender_key(row)}.{int(time.time() // 60)}."
    count = Reply.objects.filter(key__startswith=key).count()
    if count >= NOTICES:
        return False
    reply.key = f"{key}{count}"
    reply.save()
    return True


def _sender_key(row: RoomEvent) -> str:
    """Return a key of the sender in the room."""
    return hashlib.sha256(f"{row.room.room_id} {row.sender}".encode()).hexdigest()


def _input(row: RoomEvent, event: TimelineEvent) -> dict[str, Any]:
    """Return the event as the input of a run."""
    return storable(
        {
            "roomId": row.room.room_id,
            "eventId": event.event_id,
            "sender": event.sender,
            "type": event.type,
            "content": event.content,
        }
    )
