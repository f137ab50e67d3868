"""The queue of replies: the outcome of a run becomes a reply, which is stored until the room has it.

A reply is frozen before it is sent and has its own transaction id, so a resend after a crash is the
same event to the homeserver. Replies in a room are sent in the order of their outcomes; rooms do not
wait for each other.
"""

import logging
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, cast

from django.conf import settings
from django.db import IntegrityError
from django.db.models import Exists, F, OuterRef, Q
from django.utils import timezone

from agents.models import Run, Step
from botrunner.matrix.errors import MatrixError
from botrunner.models import Reply, Room, Session
from botrunner.outgoing import content
from lib import db

logger = logging.getLogger(__name__)

# Long answers are held in memory together with their rendered contents.
BATCH = 20
# Codes of a homeserver that is down, or behind a proxy that answers for it.
UNAVAILABLE_CODES = ("UNREACHABLE", "UNREADABLE")
# For a reply that the homeserver keeps refusing with temporary errors.
PATIENCE = timedelta(hours=1)
MAX_PAUSE_SECONDS = 60.0
TYPING_PATIENCE = timedelta(milliseconds=700)
TYPING_LIMIT = timedelta(hours=1)
# Runs retried longer ago are no longer followed.
RETRY_MEMORY = timedelta(days=7)
FINISHED = (Run.Status.COMPLETED, Run.Status.FAILED, Run.Status.CANCELLED)
RELATED = ("run__answer", "message", "room")
# The columns needed to render and send a reply, and no more: a person waits for this query.
COLUMNS = (
    *("key", "status", "cycle", "parts", "event_ids", "device_id", "attempts", "error"),
    *("room_id", "run_id", "registration_id", "created_at", "drafted_at", "draft_id"),
    *("run__status", "run__safe_error", "run__finished_at", "run__answer__content"),
    *("run__finish_reason", "run__answer_id"),
    "run__merged_into_id",
    *("message__event_id", "message__sender", "message__source", "message__created_at"),
    *("room__room_id", "room__membership"),
)


@dataclass(frozen=True)
class ReplyText:
    """A reply whose run has ended, and its text."""

    reply: Reply
    text: str
    msgtype: str
    mention: str = ""


@dataclass(frozen=True)
class Outgoing:
    """The next reply of a room."""

    reply: Reply
    room_id: str
    moved: bool  # it began on another device, whose transaction ids mean nothing now


def compose(
    session: Session, run_ids: Iterable[str] | None = None, drafts: Mapping[int, str] | None = None
) -> dict[int, Reply]:
    """Make replies whose runs have ended ready to be sent: a batch, or those of `run_ids`. Return them
    by primary key. `drafts`: the streamed text of some replies so far."""
    return mark_ready(render(load_ended(session, run_ids, drafts)), session.device_id)


def load_ended(
    session: Session, run_ids: Iterable[str] | None = None, drafts: Mapping[int, str] | None = None
) -> list[ReplyText]:
    """Load the replies to compose (step 1, database)."""
    if run_ids is None:
        follow_retries(session)
    replies = Reply.objects.waiting().filter(room__session=session)
    ended = Q(run__status__in=FINISHED, run__retries=F("cycle"))
    if run_ids is None:
        replies = replies.filter(Q(run=None) | ended).order_by("run__finished_at", "id")[:BATCH]
    else:
        replies = replies.filter(ended, run_id__in=list(run_ids))
    texts = []
    for reply in sorted(replies.select_related(*RELATED).only(*COLUMNS), key=_ended_at):
        if reply.run and reply.run.merged_into_id and not reply.drafted_at:
            _drop_merged(reply)
        else:
            text, msgtype = _text_of(reply, (drafts or {}).get(reply.pk, ""))
            texts.append(ReplyText(reply, text, msgtype, _mention_of(reply)))
    return texts


def render(texts: list[ReplyText]) -> list[Reply]:
    """Render the contents of their events (step 2, slow, no database)."""
    for each in texts:
        each.reply.parts = content.render(each.reply, each.text, each.msgtype, each.mention)
    return [each.reply for each in texts]


def mark_ready(replies: list[Reply], device_id: str) -> dict[int, Reply]:
    """Store the contents and queue the replies (step 3, database)."""
    ready = {}
    for reply in replies:
        # A draft belongs to the device that sent it.
        reply.device_id = reply.device_id or device_id
        reply.status, reply.ready_at = Reply.Status.READY, timezone.now()
        changed = ("parts", "device_id", "status", "ready_at")
        # False if the message was redacted meanwhile.
        if (
            Reply.objects.waiting()
            .filter(pk=reply.pk, cycle=reply.cycle)
            .update(**{name: getattr(reply, name) for name in changed})
        ):
            ready[reply.pk] = reply
    return ready


def contents(reply: Reply, draft: str = "") -> list[dict[str, Any]]:
    """Return the contents of the events that carry a reply. `draft`: its streamed text so far."""
    return content.parts_of(reply, *_text_of(reply, draft), _mention_of(reply))


def _mention_of(reply: Reply) -> str:
    """Return the sender of the message if its run took long: they may no longer look at the room."""
    after, run = settings.BOT_RUNNER_MENTION_AFTER, reply.run
    if after is None or run is None or run.finished_at is None:
        return ""
    elapsed = run.finished_at - reply.message.created_at
    return reply.message.sender if elapsed.total_seconds() >= after else ""


def _drop_merged(reply: Reply) -> None:
    # A reply that has a draft by now has to be finished.
    Reply.objects.waiting().filter(pk=reply.pk, cycle=reply.cycle, drafted_at=None).update(
        status=Reply.Status.DROPPED, error="The answer to a later message covers it."
    )


def _ended_at(reply: Reply) -> tuple[datetime, int]:
    ended = reply.run.finished_at if reply.run else reply.created_at
    return ended or reply.created_at, reply.pk


def follow_retries(session: Session) -> None:
    """Owe the room the outcome of a retried run: as the same reply if none was sent yet, else as a new
    one. Dropped replies stay dropped."""
    later = Reply.objects.filter(run=OuterRef("run"), cycle__gt=OuterRef("cycle"))
    behind = (
        Reply.objects.exclude(status=Reply.Status.DROPPED)
        .filter(
            room__session=session,
            run__retried_at__gt=timezone.now() - RETRY_MEMORY,
            run__retries__gt=F("cycle"),
        )
        .filter(~Exists(later))
        .select_related("run")
    )
    for reply in behind[:200]:
        retries = cast("Run", reply.run).retries
        waiting = Reply.objects.waiting().filter(pk=reply.pk, cycle=reply.cycle)
        if waiting.update(cycle=retries):
            continue
        again = Reply(
            message_id=reply.message_id,
            room_id=reply.room_id,
            run_id=reply.run_id,
            registration_id=reply.registration_id,
            bot_command_id=reply.bot_command_id,
            cycle=retries,
            key=f"{reply.run_id}.retry{retries}",
        )
        try:
            Reply.objects.bulk_create([again], ignore_conflicts=True)
        except IntegrityError as error:
            if not db.is_missing_row(error):  # its run was deleted just now
                raise


def _text_of(reply: Reply, draft: str) -> tuple[str, str]:
    """Return the text of a reply and its type of message."""
    run = reply.run
    if run is None:
        error = reply.error or "The conversation was deleted."
        return f"Sorry, I cannot do this. {error}", "m.notice"
    if run.status == Run.Status.COMPLETED and run.answer:
        return _with_note(run.answer.content, run.answer_note), "m.text"
    sentence = f"Sorry, something went wrong. {run.safe_error}".strip()
    if run.status == Run.Status.CANCELLED:
        merged = run.merged_into_id
        sentence = "Answered together with a later message." if merged else "This was cancelled."
    if reply.drafted_at and (draft := draft or _partial_output(run)):
        return _with_note(draft, sentence), "m.text"
    return sentence, "m.notice"


def _with_note(text: str, note: str) -> str:
    """Add a paragraph to a text that may have ended within a code block."""
    if not note:
        return text
    fence = "\n```" if text.count("```") % 2 else ""
    return f"{text.rstrip()}{fence}\n\n{note}"


def _partial_output(run: Run) -> str:
    """Return the model's output of a run without an answer, as far as its worker stored it."""
    steps = run.steps.filter(kind=Step.Kind.MODEL).exclude(output="").order_by("-attempt", "-id")
    return steps.values_list("output", flat=True).first() or ""


def rooms_to_serve(session: Session) -> list[int]:
    """Return the rooms with a reply that is due."""
    ready = Reply.objects.ready().filter(room__session=session)
    due = ready.filter(Q(due_at=None) | Q(due_at__lte=timezone.now()))
    return list(due.values_list("room_id", flat=True).distinct().order_by("room_id"))


def next_of(
    room: int, device_id: str, loaded: Mapping[int, Reply] | None = None
) -> Outgoing | None:
    """Return the next reply of a room; None if there is none or it has to wait. Replies in `loaded`, by
    primary key, are not loaded again."""
    # Usually there is none, so this selects two columns.
    queue = Reply.objects.ready().filter(room=room).order_by("ready_at", "id")
    first = next(iter(queue.values_list("pk", "due_at")[:1]), None)
    if first is None or (first[1] and first[1] > timezone.now()):
        return None
    reply = (loaded or {}).get(first[0])
    if reply is None:
        reply = Reply.objects.ready().select_related("room", "message").filter(pk=first[0]).first()
    if reply is None:  # its message was redacted just now
        return next_of(room, device_id)
    if reply.room.membership == Room.Membership.LEFT:
        queue.update(status=Reply.Status.DROPPED, error="The bot is no longer in the room.")
        return None
    return Outgoing(reply, reply.room.room_id, moved=reply.device_id != device_id)


def record_part(reply: Reply, event_id: str) -> None:
    """Record that a part was sent."""
    reply.event_ids = [*reply.event_ids, event_id]
    if len(reply.event_ids) >= len(reply.parts):
        reply.status, reply.sent_at, reply.error = Reply.Status.SENT, timezone.now(), ""
    reply.save(update_fields=["event_ids", "status", "sent_at", "error"])


def adopt_parts(reply: Reply, event_ids: list[str], device_id: str) -> None:
    """Record the parts that another device has sent. `event_ids`: all answers to the message in the
    room; those of other replies are left out."""
    others = Reply.objects.filter(message=reply.message_id).exclude(pk=reply.pk)
    known = {sent for ids in others.values_list("event_ids", flat=True) for sent in ids}
    unknown = [event_id for event_id in event_ids if event_id not in known]
    if reply.drafted_at and len(unknown) == 1:  # the draft, which may be incomplete
        reply.draft_id, unknown = unknown[0], []
    reply.device_id, reply.event_ids = device_id, unknown[: len(reply.parts)]
    if len(reply.event_ids) >= len(reply.parts):
        reply.status, reply.sent_at = Reply.Status.SENT, timezone.now()
    reply.save(update_fields=["device_id", "event_ids", "draft_id", "status", "sent_at"])


def record_parts(reply: Reply, parts: list[dict[str, Any]]) -> None:
    """Replace the contents before they are sent."""
    reply.parts = parts
    reply.save(update_fields=["parts"])


def record_failure(reply: Reply, error: MatrixError) -> None:
    """Schedule a retry, or drop a reply that cannot be sent."""
    if _is_hopeless(reply, error):
        reply.status, reply.error = Reply.Status.DROPPED, str(error)
        reply.save(update_fields=["status", "error"])
        logger.warning("A reply was dropped: %s", error)
        return
    if error.code == "M_TOO_LARGE":
        sent = len(reply.event_ids)
        reply.parts = [*reply.parts[:sent], *content.shrink(reply.parts[sent:])]
    reply.attempts += 1
    pause = random.uniform(0.5, 1) * min(MAX_PAUSE_SECONDS, 0.5 * 2.0 ** min(reply.attempts, 10))  # noqa: S311
    reply.due_at = timezone.now() + timedelta(seconds=error.retry_after or pause)
    reply.error = str(error)
    reply.save(update_fields=["parts", "attempts", "due_at", "error"])
    # The sync has already warned that the homeserver is unreachable.
    is_usual = error.status == 429 or error.code == "UNREACHABLE"
    level = logging.INFO if is_usual else logging.WARNING
    logger.log(level, "Sending a reply failed, retrying: %s", error)


def _is_hopeless(reply: Reply, error: MatrixError) -> bool:
    if error.code in ("M_FORBIDDEN", "M_NOT_FOUND"):
        return True
    if error.permanent:
        return reply.attempts >= 5
    # The homeserver is up, but has refused this reply for a long time: the room's other replies must
    # not wait forever.
    is_unavailable = error.status in (401, 429) or error.code in UNAVAILABLE_CODES
    since = reply.ready_at or reply.created_at
    return not is_unavailable and reply.attempts >= 20 and timezone.now() - since > PATIENCE


def typing_rooms(session: Session) -> set[str]:
    """Return the rooms whose run has been active for long enough to show the bot as typing."""
    now = timezone.now()
    waiting = Reply.objects.waiting().filter(
        room__session=session,
        room__membership=Room.Membership.JOINED,
        run__status__in=Run.UNFINISHED,
        created_at__lt=now - TYPING_PATIENCE,
        created_at__gt=now - TYPING_LIMIT,
    )
    return set(waiting.values_list("room__room_id", flat=True))
