"""What has been written down is acted upon: questions become runs, edits and redactions are followed,
and what was encrypted is looked at once its key has come. Each a unit of database work."""

import hashlib
import logging
import time
from dataclasses import replace
from datetime import timedelta
from typing import Any

from django.conf import settings
from django.db import transaction
from django.db.models import F, Window
from django.db.models.functions import RowNumber
from django.utils import timezone

from agents import inbox, retention
from agents.models import CHAT_REPLY, Run
from agents.runs import actions
from botrunner.incoming.matching import (
    CANCEL_ALL,
    SENDER_DEACTIVATED,
    Rule,
    RuleSet,
    control_of,
    prompt_of,
)
from botrunner.incoming.recording import SPOKEN, Kept, is_own_or_other_bots, kept_of
from botrunner.matrix.events import TimelineEvent, storable
from botrunner.models import Conversation, Reply, RoomEvent, Session
from botrunner.outgoing.content import parts_of
from botrunner.verdicts import stored
from chat.models import Thread
from lib.tracing import tagged
from realm.filters import EventFilter, InvalidFilter
from realm.models import BotCommand, User

logger = logging.getLogger(__name__)

# How long a person is not told again in a room that a limit is reached.
NOTICE_SECONDS = {
    "rate_limited": 60,
    "too_many_waiting": 60,
    "bytes_exhausted": 3600,
    "budget_exhausted": 3600,
}

NO_POWER = (
    "That takes the power level at which you may redact the messages of others in this room. Ask "
    "someone who has it, or an operator."
)
# Of what no limit counts: so many times a minute.
NOTICES = 5
SEALED_OF_SENDER = 50

# What is known of an event only once it has been decrypted.
OPENED = ["kind", "state", "type", "content_type", "source", "note", "verdicts"]


def pending() -> list[int]:
    """The rows to act upon, in the order said."""
    rows = RoomEvent.objects.filter(state=RoomEvent.State.PENDING)
    return list(
        rows.exclude(kind=RoomEvent.Kind.ENCRYPTED)
        .order_by("id")
        .values_list("pk", flat=True)[:500]
    )


class PowerNeeded(Exception):
    """It depends on the power that the sender has in the room."""

    def __init__(self, room_id: str, user_id: str) -> None:
        super().__init__(f"The power of {user_id} in room {room_id} is needed.")
        self.room_id, self.user_id = room_id, user_id


def act(pk: int, me: str, *, moderates: bool | None = None) -> None:
    """Do what an event asks for and note that it is done, in one transaction. `moderates`: whether the
    sender may redact the messages of others there. Raises `PowerNeeded` where that has to be known."""
    with transaction.atomic():
        mine = RoomEvent.objects.filter(pk=pk, state=RoomEvent.State.PENDING)
        # Another process that would act upon it waits for this transaction, and finds it done.
        if not mine.update(state=RoomEvent.State.HANDLED):
            return
        event = RoomEvent.objects.select_related("room").get(pk=pk)
        before = event.verdicts, event.note
        said = TimelineEvent.parse(event.source)
        note = ""
        with tagged(room=event.room.room_id, event_id=event.event_id, request_id=event.event_id):
            if said is None:
                note = "It is no event of a timeline."
            elif event.kind == RoomEvent.Kind.MESSAGE:
                note = _ask(event, said, me)
            elif event.kind != RoomEvent.Kind.REDACTION and _is_deactivated(said.sender):
                # What is taken back is taken back for all: the homeserver has allowed it.
                note = SENDER_DEACTIVATED
            elif event.kind == RoomEvent.Kind.EDIT:
                note = _edit(event, said, me)
            elif event.kind == RoomEvent.Kind.CANCEL:
                note = _cancel(event, said, me, moderates)
            elif event.kind == RoomEvent.Kind.FORGET:
                note = _forget(event, said, me, moderates)
            else:
                note = _take_back(event, said)
        if note:
            event.note, event.state, event.source = note, RoomEvent.State.IGNORED, None
        if note or (event.verdicts, event.note) != before:
            event.save(update_fields=["state", "source", "note", "verdicts"])


def _is_deactivated(sender: str) -> bool:
    return bool(User.objects.deactivated_among([sender]))


def give_up(pk: int) -> None:
    """What cannot be handled must not hold up the rest."""
    RoomEvent.objects.filter(pk=pk, state=RoomEvent.State.PENDING).update(
        state=RoomEvent.State.FAILED, note="It could not be handled: see the log."
    )


def ask(kept: Kept, me: str) -> None:
    """Ask what a question just written down fires, in the transaction that does so."""
    event = kept.row
    with tagged(room=event.room.room_id, event_id=event.event_id, request_id=event.event_id):
        for rule, wanted in kept.fired:
            _ask_one(event, kept.said, rule, prompt_of(wanted, kept.said, me))
        if event.note:
            if _left_unsaid(event):
                event.state, event.source = RoomEvent.State.IGNORED, None
            event.save(update_fields=["state", "source", "note"])


def _ask(event: RoomEvent, said: TimelineEvent, me: str) -> str:
    # Once more, as commands and registrations are now.
    match = RuleSet([said.sender], me).match(said)
    event.verdicts = stored(match.verdicts)
    for rule, wanted in match.fired:
        _ask_one(event, said, rule, prompt_of(wanted, said, me))
    if _left_unsaid(event):
        return event.note
    return f"What it fired was taken away. {match.reason}" if match.reason else ""


def _left_unsaid(event: RoomEvent) -> bool:
    """Whether it was refused, and not even that is said."""
    return bool(event.note) and not event.replies.exists()


def _ask_one(event: RoomEvent, said: TimelineEvent, command: Rule, asked: str) -> None:
    thread_id = _known_thread(event, said)
    reply = Reply(
        message=event,
        room=event.room,
        registration_id=command.registration_id,
        bot_command_id=command.command_id,
    )
    try:
        if command.command == CHAT_REPLY and not asked:
            raise inbox.Invalid("There was no question.")
        accepted = _accepted(event, said, command, asked, thread_id)
    except inbox.Limited as error:
        event.note = _turn_away(event, reply, error)
        return
    except inbox.Refused as error:
        reply.error = str(error)
        if not _notify(event, reply):
            event.note = f"Refused: {error}"
        logger.info("A question was refused: %s", error)
        return
    if accepted.began_thread:
        Conversation.objects.update_or_create(
            room=event.room, root=said.thread_root, defaults={"thread_id": accepted.thread_id}
        )
    reply.run_id = reply.key = accepted.run_id
    reply.save()
    logger.info(
        "Command %s of registration %s fired: run %s",
        command.command,
        command.registration_id,
        accepted.run_id,
    )


def _known_thread(event: RoomEvent, said: TimelineEvent) -> str | None:
    known = Conversation.objects.filter(room=event.room_id, root=said.thread_root)
    return next(iter(known.values_list("thread_id", flat=True)[:1]), None)


def _accepted(
    event: RoomEvent, said: TimelineEvent, command: Rule, asked: str, thread_id: str | None
) -> inbox.Accepted:
    """Raises `inbox.Refused`."""
    submission = inbox.Submission(
        content=asked or command.command,
        source=Run.Source.MATRIX,
        threads=Thread.objects.filter(room_id=event.room.room_id),
        # The command may be the bot's own: limits hold for who speaks.
        asker=said.sender,
        place=event.room.room_id,
        room_id=event.room.room_id,
        received_at=event.created_at,
        command=command.command,
        input=_input(event, said),
        correlation_id=said.event_id[: inbox.MAX_CORRELATION_LENGTH],
        thread_id=thread_id,
    )
    try:
        return inbox.submit(submission)
    except (inbox.Deleted, inbox.UnknownThread):
        # The thread was deleted since it was read, and its id is not used again.
        return inbox.submit(replace(submission, thread_id=None))


def _turn_away(event: RoomEvent, reply: Reply, error: inbox.Limited) -> str:
    """Say that a limit is reached: to each person in a room once in a while, for a flood must not be
    answered with another one. The note for what was said, which nothing else becomes of."""
    window = int(time.time() // NOTICE_SECONDS[error.code])
    reply.key, reply.error = f"{error.code}.{_place(event)}.{window}", str(error)
    if not Reply.objects.filter(key=reply.key).exists():
        Reply.objects.bulk_create([reply], ignore_conflicts=True)
    logger.info("A question was refused (%s): %s", error.code, error)
    return f"Refused ({error.code}): {error}"


def _notify(event: RoomEvent, reply: Reply) -> bool:
    """Have a person read why nothing comes of what they wrote. Once for an event, however many commands
    it was for, and a few times a minute: no run is counted, so no limit ends it. Whether they do."""
    of_event = Reply.objects.filter(message=event, run=None)
    if of_event.filter(error=reply.error).exists():
        return True
    key = f"refused.{_place(event)}.{int(time.time() // 60)}."
    count = Reply.objects.filter(key__startswith=key).count()
    if count >= NOTICES:
        return False
    reply.key = f"{key}{count}"
    reply.save()
    return True


def _place(event: RoomEvent) -> str:
    """A person in a room."""
    return hashlib.sha256(f"{event.room.room_id} {event.sender}".encode()).hexdigest()


def _edit(event: RoomEvent, said: TimelineEvent, me: str) -> str:
    # In the same room: what was said in another one has no place in its context.
    known = RoomEvent.objects.filter(room=event.room, sender=said.sender)
    first_row = known.filter(event_id=said.edits).first()
    first = TimelineEvent.parse(first_row.source) if first_row else None
    new = said.content.get("m.new_content")
    if first_row is None or first is None or not isinstance(new, dict):
        return "It edits no question of the same sender."
    edited = replace(first, content={**first.content, **new})
    changed = False
    for reply in first_row.replies.waiting().select_related("bot_command"):
        wanted = _filter_of(reply.bot_command)
        words = prompt_of(wanted, edited, me) if wanted else ""
        if reply.run_id and words:
            changed |= inbox.edit(reply.run_id, content=words)
    if not changed:
        return "The answer was under way."
    logger.info("Question %s was edited before its run began", first.event_id)
    return ""


def _filter_of(command: BotCommand | None) -> EventFilter | None:
    """None when it makes no sense any more, or is gone."""
    try:
        return command.when if command else None
    except InvalidFilter:
        return None


def _take_back(event: RoomEvent, said: TimelineEvent) -> str:
    replies = Reply.objects.filter(message__event_id=said.redacts, message__room=event.room)
    open_replies = list(
        replies.filter(status__in=[Reply.Status.WAITING, Reply.Status.READY]).select_related(
            "run", "message"
        )
    )
    for reply in open_replies:
        if _answers_others(reply):
            continue
        if reply.run:
            actions.cancel(reply.run)
        if reply.drafted_at:
            continue  # what is in the room already is brought to its end
        reply.status, reply.error = Reply.Status.DROPPED, "The question was taken back."
        reply.save(update_fields=["status", "error"])
    sealed = RoomEvent.objects.filter(room=event.room, kind=RoomEvent.Kind.ENCRYPTED)
    sealed.filter(event_id=said.redacts).update(
        state=RoomEvent.State.IGNORED, note="It was taken back.", source=None
    )
    return "" if open_replies else "There was nothing to cancel."


def _answers_others(reply: Reply) -> bool:
    """Whether somebody else has a question that was merged into this one, and would get no answer."""
    run_ids = [reply.run_id]
    while run_ids:
        merged = Reply.objects.filter(run__merged_into__in=run_ids)
        if merged.exclude(message__sender=reply.message.sender).exists():
            return True
        run_ids = list(merged.values_list("run_id", flat=True))
    return False


def _cancel(event: RoomEvent, said: TimelineEvent, me: str, moderates: bool | None) -> str:
    """End what the sender has asked here, in the same Matrix thread if it is said in one; on demand
    what others have asked too, if the sender moderates the room."""
    asked = Reply.objects.waiting().filter(
        run__thread__conversation__room=event.room,
        run__thread__conversation__root=said.thread_root,
    )
    asked = asked.select_related("run", "message").order_by("run__position")
    shared: set[int] = set()
    if control_of(said, me) == CANCEL_ALL:
        if not _moderates(event, said, moderates):
            return _answer(event, said, me, NO_POWER)
    else:
        asked = asked.filter(message__sender=said.sender)
        shared = {reply.pk for reply in asked if _answers_others(reply)}
    cancelled = [
        actions.cancel(reply.run) for reply in asked if reply.run and reply.pk not in shared
    ]
    if any(cancelled):
        return ""
    words = "Nothing that you asked is being answered here."
    if shared:
        words = "Another person waits for the answer too."
    elif control_of(said, me) == CANCEL_ALL:
        words = "Nothing is being answered here."
    return _answer(event, said, me, words) and "There was nothing to cancel."


def _forget(event: RoomEvent, said: TimelineEvent, me: str, moderates: bool | None) -> str:
    """Delete the conversation in which it is asked for: the room's, or that of the Matrix thread."""
    found = Thread.objects.filter(
        conversation__room=event.room, conversation__root=said.thread_root
    ).first()
    if found is None:
        return _answer(event, said, me, "There is nothing to forget here.")
    if not _moderates(event, said, moderates):
        return _answer(event, said, me, NO_POWER)
    retention.delete_thread(found)
    logger.info("The conversation %s was deleted", found.pk)
    reply = Reply(message=event, room=event.room, key=f"{event.event_id}.order"[:255])
    reply.parts = parts_of(reply, "All that was asked here is deleted.", "m.notice")
    reply.device_id = Session.objects.values_list("device_id", flat=True).get(
        pk=event.room.session_id
    )
    reply.status, reply.ready_at = Reply.Status.READY, timezone.now()
    reply.save()
    return ""


def _moderates(event: RoomEvent, said: TimelineEvent, moderates: bool | None) -> bool:
    """Raises `PowerNeeded`."""
    if moderates is None:
        raise PowerNeeded(event.room.room_id, said.sender)
    return moderates


def _answer(event: RoomEvent, said: TimelineEvent, me: str, words: str) -> str:
    """Refuse an order; the note for what was not even answered."""
    if not RuleSet([said.sender], me).match(said).fired:
        # It may have been meant for another bot.
        return words
    reply = Reply(message=event, room=event.room, error=words)
    return "" if _notify(event, reply) else words


def sealed() -> list[tuple[int, str, Any]]:
    """What waits for its key: row, room id, event. Some of it, the latest of each sender: keys for what
    one has sent in masses may never come. What has become too old is given up."""
    waiting = RoomEvent.objects.filter(state=RoomEvent.State.PENDING, kind=RoomEvent.Kind.ENCRYPTED)
    limit = timezone.now() - timedelta(seconds=settings.BOT_RUNNER_MAX_EVENT_AGE)
    waiting.filter(sent_at__lt=limit).update(
        state=RoomEvent.State.IGNORED, note="Its key never came.", source=None
    )
    place = Window(RowNumber(), partition_by=F("sender"), order_by=F("id").desc())
    latest = (
        waiting.annotate(place=place).filter(place__lte=SEALED_OF_SENDER).order_by("place", "id")
    )
    rows = latest.values_list("pk", "room__room_id", "source")[:500]
    return sorted(rows, key=lambda row: row[0])


def unseal(pk: int, source: dict[str, Any], me: str) -> None:
    """The key has come: from here on it is an event like any other."""
    with transaction.atomic():
        state = RoomEvent.State.PENDING
        sealed = RoomEvent.objects.filter(pk=pk, state=state, kind=RoomEvent.Kind.ENCRYPTED)
        # Another process that has opened it may have acted upon it as well.
        if not sealed.update(state=state):
            return
        event = RoomEvent.objects.select_related("room").get(pk=pk)
        said = TimelineEvent.parse(source)
        opened = None
        if said and said.type in SPOKEN and not is_own_or_other_bots(said, me):
            opened = kept_of([(event.room, said)], me)[0].row
        if opened is None or opened.kind == RoomEvent.Kind.ENCRYPTED:
            event.state, event.source = RoomEvent.State.IGNORED, None
            event.note = "It is nothing that a person says."
        else:
            for name in OPENED:
                setattr(event, name, getattr(opened, name))
        event.save(update_fields=OPENED)
        logger.info("Event %s in room %s was decrypted", event.event_id, event.room.room_id)


def _input(event: RoomEvent, said: TimelineEvent) -> dict[str, Any]:
    """What a run carries of the event that fired it."""
    return storable(
        {
            "roomId": event.room.room_id,
            "eventId": said.event_id,
            "sender": said.sender,
            "type": said.type,
            "content": said.content,
        }
    )
