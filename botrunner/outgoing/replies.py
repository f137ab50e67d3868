"""The way back: the outcome of a run becomes a reply, which is kept until the room has it.

A reply is frozen before it is sent and sent under a transaction id of its own, so whatever is
repeated after a crash is the same event to the homeserver. Within a room replies go out in the order
of their outcomes; rooms do not wait for each other.
"""

import asyncio
import html
import json
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import structlog
from django.db import IntegrityError
from django.db.models import Exists, F, OuterRef, Q
from django.utils import timezone

from agents.models import Run, Step
from botrunner.aio import batched, cpu_sync_to_async, database_sync_to_async
from botrunner.matrix.client import Homeserver
from botrunner.matrix.errors import KeysOutdated, MatrixError, TokenRefused
from botrunner.matrix.events import REPLY_FIELD, TimelineEvent
from botrunner.models import LeaseLost, Reply, Room, Session
from chat.markdown import strip_bidi_controls, to_html
from lib.db import DATABASE_ERRORS
from lib.tracing import tagged

if TYPE_CHECKING:
    from botrunner.outgoing.drafts import Drafts

logger = logging.getLogger(__name__)
outcomes = structlog.get_logger(__name__)

# An event may have 64 KiB. Encryption makes four bytes of three, and the relation, what an edit has
# twice and what the server adds take their share.
MAX_CONTENT_BYTES = 40_000
MAX_PARTS = 50
# Of what a block of code begins with, on each part that it goes on in.
MAX_FENCE = 80
# Answers, long ones, are in memory together with what is made of them.
BATCH = 20
ROUNDS = 10
HTML = ("format", "formatted_body")
# What a homeserver that is away, or has another server before it, is refused with.
AWAY_CODES = ("UNREACHABLE", "UNREADABLE")
# With a reply that the homeserver takes for no reason that passes.
PATIENCE = timedelta(hours=1)
ROOMS_AT_ONCE = 8
MAX_PAUSE_SECONDS = 60.0
TYPING_SECONDS = 30.0
TYPING_PATIENCE = timedelta(milliseconds=700)
TYPING_LIMIT = timedelta(hours=1)
RECONCILE_PAGES = 20
# A run that was asked for again longer ago is looked at no more.
RETRY_MEMORY = timedelta(days=7)
FINISHED = (Run.Status.COMPLETED, Run.Status.FAILED, Run.Status.CANCELLED)
RELATED = ("run__answer", "question", "room")
# What it takes to make a reply and to send it, and no more: it is read while somebody waits.
COLUMNS = (
    *("key", "status", "cycle", "parts", "event_ids", "device_id", "attempts", "error"),
    *("room_id", "run_id", "registration_id", "created_at", "drafted_at", "draft_id"),
    *("run__status", "run__safe_error", "run__finished_at", "run__answer__content"),
    "run__merged_into_id",
    *("question__event_id", "question__source", "question__created_at"),
    *("room__room_id", "room__membership"),
)


@dataclass(frozen=True)
class Owed:
    """A reply whose outcome is known, and its text."""

    reply: Reply
    text: str
    msgtype: str


def compose(
    session: Session, run_ids: Iterable[str] | None = None, drafts: Mapping[int, str] | None = None
) -> dict[int, Reply]:
    """Make the replies whose runs have ended ready to be sent; some of them all, or those of `run_ids`.
    Which they are, by primary key. `drafts`: what some of them have said so far."""
    return keep(render(owed(session, run_ids, drafts)), session.device_id)


def owed(
    session: Session, run_ids: Iterable[str] | None = None, drafts: Mapping[int, str] | None = None
) -> list[Owed]:
    """The first step of it: what the database knows."""
    if run_ids is None:
        follow_retries(session)
    replies = Reply.objects.waiting().filter(room__session=session)
    ended = Q(run__status__in=FINISHED, run__retries=F("cycle"))
    if run_ids is None:
        replies = replies.filter(Q(run=None) | ended).order_by("run__finished_at", "id")[:BATCH]
    else:
        replies = replies.filter(ended, run_id__in=list(run_ids))
    found = []
    for reply in sorted(replies.select_related(*RELATED).only(*COLUMNS), key=_ended_at):
        if reply.run and reply.run.merged_into_id and not reply.drafted_at:
            _leave_to_the_next(reply)
        else:
            found.append(Owed(reply, *_words(reply, (drafts or {}).get(reply.pk, ""))))
    return found


def render(found: list[Owed]) -> list[Reply]:
    """The second: the contents of its events. It may take some time, and needs no database."""
    for each in found:
        try:
            each.reply.parts = parts_of(each.reply, each.text, each.msgtype)
        except Exception:
            # One text that cannot be rendered must not hold up all the others.
            logger.exception("Reply %s is sent as plain text", each.reply.key)
            plain = [_plain_message(text, each.msgtype) for text in _pieces(each.text)]
            each.reply.parts = _related(each.reply, plain)
    return [each.reply for each in found]


def keep(found: list[Reply], device_id: str) -> dict[int, Reply]:
    """The third: have them sent."""
    ready = {}
    for reply in found:
        # A question that was taken back meanwhile has no reply any more. A draft is known to the device
        # that sent it.
        reply.device_id = reply.device_id or device_id
        reply.status, reply.ready_at = Reply.Status.READY, timezone.now()
        changed = ("parts", "device_id", "status", "ready_at")
        if (
            Reply.objects.waiting()
            .filter(pk=reply.pk, cycle=reply.cycle)
            .update(**{name: getattr(reply, name) for name in changed})
        ):
            ready[reply.pk] = reply
    return ready


def _leave_to_the_next(reply: Reply) -> None:
    # One that is drafted meanwhile has to be brought to its end.
    Reply.objects.waiting().filter(pk=reply.pk, cycle=reply.cycle, drafted_at=None).update(
        status=Reply.Status.DROPPED, error="The answer to a later question answers it too."
    )


def _ended_at(reply: Reply) -> tuple[datetime, int]:
    ended = reply.run.finished_at if reply.run else reply.created_at
    return ended or reply.created_at, reply.pk


def follow_retries(session: Session) -> None:
    """Owe the room what becomes of a run that was asked for again: as the same reply where nothing
    was told yet, else as another one. What was dropped stays dropped."""
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
            question_id=reply.question_id,
            room_id=reply.room_id,
            run_id=reply.run_id,
            registration_id=reply.registration_id,
            bot_command_id=reply.bot_command_id,
            cycle=retries,
            key=f"{reply.run_id}.retry{retries}",
        )
        with suppress(IntegrityError):  # its run was deleted just now
            Reply.objects.bulk_create([again], ignore_conflicts=True)


def contents(reply: Reply, written: str = "") -> list[dict[str, Any]]:
    """The contents of the events that tell a reply. `written`: what its draft says."""
    return parts_of(reply, *_words(reply, written))


def parts_of(reply: Reply, text: str, msgtype: str) -> list[dict[str, Any]]:
    return _related(reply, _messages(text, msgtype))


def _related(reply: Reply, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    said = TimelineEvent.parse(reply.question.source)
    root = said.thread_root if said else ""
    relation: dict[str, Any] = {"m.in_reply_to": {"event_id": reply.question.event_id}}
    if root:
        relation |= {"rel_type": "m.thread", "event_id": root, "is_falling_back": False}
    return [
        {
            **message,
            "m.mentions": {},
            "m.relates_to": relation,
            REPLY_FIELD: {"key": reply.key, "part": number},
        }
        for number, message in enumerate(messages)
    ]


def _messages(text: str, msgtype: str) -> list[dict[str, Any]]:
    if len(text) <= MAX_CONTENT_BYTES:
        whole = _message(text, msgtype)
        if _size(whole) <= MAX_CONTENT_BYTES:
            return [whole]
    return [_fitting(piece, msgtype) for piece in _pieces(text)]


def _pieces(text: str) -> list[str]:
    """As many as a room gets."""
    pieces = list(islice(_split(text, MAX_CONTENT_BYTES), MAX_PARTS + 1))
    if len(pieces) > MAX_PARTS:
        return [*pieces[: MAX_PARTS - 1], "(The rest of this answer is too long for a room.)"]
    return pieces


def _fitting(text: str, msgtype: str) -> dict[str, Any]:
    """A piece as a message; as plain text where its HTML would be too long."""
    message = _message(text, msgtype)
    return message if _size(message) <= MAX_CONTENT_BYTES else _plain_message(text, msgtype)


def _words(reply: Reply, written: str) -> tuple[str, str]:
    """What is said, and as what type of message."""
    run = reply.run
    if run is None:
        error = reply.error or "The conversation was deleted."
        return f"Sorry, this cannot be done. {error}", "m.notice"
    if run.status == Run.Status.COMPLETED and run.answer:
        return run.answer.content, "m.text"
    sentence = f"Sorry, this did not work. {run.safe_error}".strip()
    if run.status == Run.Status.CANCELLED:
        merged = run.merged_into_id
        sentence = "This is answered with a later question." if merged else "This was cancelled."
    if reply.drafted_at and (written := written or _last_words(run)):
        fence = "\n```" if written.count("```") % 2 else ""
        return f"{written.rstrip()}{fence}\n\n{sentence}", "m.text"
    return sentence, "m.notice"


def _last_words(run: Run) -> str:
    """What the model had written when its run ended without an answer, as far as its worker told."""
    steps = run.steps.filter(kind=Step.Kind.MODEL).exclude(output="").order_by("-attempt", "-id")
    return steps.values_list("output", flat=True).first() or ""


def edit_of(event_id: str, content: dict[str, Any]) -> dict[str, Any]:
    """What puts `content` in the place of an event's."""
    new = {name: value for name, value in content.items() if name != "m.relates_to"}
    # For clients that know no edits. Both together have to fit into an event.
    bodies = [name for name in ("body", "formatted_body") if name in new]
    fallback: dict[str, Any] = {name: f"* {new[name]}" for name in bodies}
    if _size({"old": fallback, "new": new}) > MAX_CONTENT_BYTES:
        fallback = dict.fromkeys(bodies, "* (This message was edited.)")
    return {
        **new,
        **fallback,
        "m.new_content": new,
        "m.relates_to": {"rel_type": "m.replace", "event_id": event_id},
    }


def _message(text: str, msgtype: str) -> dict[str, Any]:
    return {
        **_plain_message(text, msgtype),
        "format": "org.matrix.custom.html",
        "formatted_body": to_html(text),
    }


def _plain_message(text: str, msgtype: str) -> dict[str, Any]:
    return {"msgtype": msgtype, "body": strip_bidi_controls(text)}


def split(text: str, limit: int) -> list[str]:
    """Pieces of a Markdown text whose messages have up to `limit` bytes each, unless their HTML is
    much longer than they are: cut between lines where that is possible; a block of code goes on as
    one."""
    return list(_split(text, limit))


def _split(text: str, limit: int) -> Iterator[str]:
    lines: list[str] = []
    fence = ""
    size = 0
    for line in _short_lines(text, limit):
        cost = _cost(line)
        if lines and size + cost > limit - 1000:
            yield "\n".join([*lines, *(["```"] if fence else [])])
            lines, size = ([fence], _cost(fence)) if fence else ([], 0)
        lines.append(line)
        size += cost
        if line.lstrip().startswith("```"):
            fence = "" if fence else line.strip()[:MAX_FENCE]
    yield "\n".join(lines)


def _cost(line: str) -> int:
    """What a line adds to a message at the most: it stands there as it is and as HTML."""
    return _size({"a": line, "b": html.escape(line)})


def _short_lines(text: str, limit: int) -> Iterable[str]:
    for line in text.split("\n"):
        # A character has two escapes of 6 bytes each at the most, in each of the bodies.
        most = limit // 12 if line.isascii() else limit // 26
        yield from (line[start : start + most] for start in range(0, max(len(line), 1), most))


def _size(message: dict[str, Any]) -> int:
    """As JSON, all bodies together, the way that they are encrypted: without a character that is not
    ASCII."""
    return len(json.dumps(message))


@dataclass(frozen=True)
class Outgoing:
    reply: Reply
    room_id: str
    moved: bool  # it was another device's to send, whose transaction ids mean nothing now


def rooms_to_serve(session: Session) -> list[int]:
    """Rooms with something to say that may be tried now."""
    ready = Reply.objects.ready().filter(room__session=session)
    due = ready.filter(Q(due_at=None) | Q(due_at__lte=timezone.now()))
    return list(due.values_list("room_id", flat=True).distinct().order_by("room_id"))


def next_of(
    room: int, device_id: str, loaded: Mapping[int, Reply] | None = None
) -> Outgoing | None:
    """The reply that is next in its room; None when there is none, or it has to wait. One of those
    `loaded`, by primary key, is not read again."""
    # Most often there is none, so this asks for little.
    queue = Reply.objects.ready().filter(room=room).order_by("ready_at", "id")
    first = next(iter(queue.values_list("pk", "due_at")[:1]), None)
    if first is None or (first[1] and first[1] > timezone.now()):
        return None
    reply = (loaded or {}).get(first[0])
    if reply is None:
        reply = Reply.objects.ready().select_related("room", "question").filter(pk=first[0]).first()
    if reply is None:  # taken back just now
        return next_of(room, device_id)
    if reply.room.membership == Room.Membership.LEFT:
        queue.update(status=Reply.Status.DROPPED, error="The bot is no longer in the room.")
        return None
    return Outgoing(reply, reply.room.room_id, moved=reply.device_id != device_id)


def part_sent(reply: Reply, event_id: str) -> None:
    reply.event_ids = [*reply.event_ids, event_id]
    if len(reply.event_ids) >= len(reply.parts):
        reply.status, reply.sent_at, reply.error = Reply.Status.SENT, timezone.now(), ""
    reply.save(update_fields=["event_ids", "status", "sent_at", "error"])


def set_found(reply: Reply, event_ids: list[str], device_id: str) -> None:
    """What another device has sent of a reply is sent. (`event_ids` are all that answer its question;
    those of other replies are known.)"""
    others = Reply.objects.filter(question=reply.question_id).exclude(pk=reply.pk)
    known = {sent for ids in others.values_list("event_ids", flat=True) for sent in ids}
    unknown = [event_id for event_id in event_ids if event_id not in known]
    if reply.drafted_at and len(unknown) == 1:  # the draft, which may not say all
        reply.draft_id, unknown = unknown[0], []
    reply.device_id, reply.event_ids = device_id, unknown[: len(reply.parts)]
    if len(reply.event_ids) >= len(reply.parts):
        reply.status, reply.sent_at = Reply.Status.SENT, timezone.now()
    reply.save(update_fields=["device_id", "event_ids", "draft_id", "status", "sent_at"])


def not_sent(reply: Reply, error: MatrixError) -> None:
    if _is_hopeless(reply, error):
        _drop(reply, str(error))
        logger.warning("A reply was dropped: %s", error)
        return
    if error.code == "M_TOO_LARGE":
        sent = len(reply.event_ids)
        reply.parts = [*reply.parts[:sent], *_smaller(reply.parts[sent:])]
    reply.attempts += 1
    pause = random.uniform(0.5, 1) * min(MAX_PAUSE_SECONDS, 0.5 * 2.0 ** min(reply.attempts, 10))  # noqa: S311
    reply.due_at = timezone.now() + timedelta(seconds=error.retry_after or pause)
    reply.error = str(error)
    reply.save(update_fields=["parts", "attempts", "due_at", "error"])
    # That the homeserver is away, the sync has said once.
    is_usual = error.status == 429 or error.code == "UNREACHABLE"
    level = logging.INFO if is_usual else logging.WARNING
    logger.log(level, "A reply has to wait: %s", error)


def _is_hopeless(reply: Reply, error: MatrixError) -> bool:
    if error.code in ("M_FORBIDDEN", "M_NOT_FOUND"):
        return True
    if error.permanent:
        return reply.attempts >= 5
    # The homeserver answers, but has had no good answer to this one for long: the others of the room
    # do not wait for it for good.
    is_away = error.status in (401, 429) or error.code in AWAY_CODES
    since = reply.ready_at or reply.created_at
    return not is_away and reply.attempts >= 20 and timezone.now() - since > PATIENCE


def _smaller(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is left of a reply, in parts that have a quarter of what one may have, without HTML; an
    apology where they were as short as that."""
    limit = MAX_CONTENT_BYTES // 4
    if not parts or _size({"body": parts[0]["body"]}) <= limit // 2:
        words = _message("Sorry, this answer is too long for the room.", "m.notice")
        return [{**part, **words} for part in parts[:1]]
    shorter = [
        ({name: value for name, value in part.items() if name not in HTML} | {"body": piece})
        for part in parts
        for piece in _split(part["body"], limit)
    ]
    first = parts[0][REPLY_FIELD]["part"]
    return [
        {**part, REPLY_FIELD: {**part[REPLY_FIELD], "part": number}}
        for number, part in enumerate(shorter[:MAX_PARTS], first)
    ]


def _drop(reply: Reply, reason: str) -> None:
    reply.status, reply.error = Reply.Status.DROPPED, reason
    reply.save(update_fields=["status", "error"])


def typing_rooms(session: Session) -> set[str]:
    """Rooms whose question has been worked on for long enough to show it."""
    now = timezone.now()
    waiting = Reply.objects.waiting().filter(
        room__session=session,
        room__membership=Room.Membership.JOINED,
        run__status__in=Run.UNFINISHED,
        created_at__lt=now - TYPING_PATIENCE,
        created_at__gt=now - TYPING_LIMIT,
    )
    return set(waiting.values_list("room__room_id", flat=True))


class Sender:
    """Sends what is ready: one task for each room that has something."""

    def __init__(
        self, homeserver: Homeserver, session: Session, drafts: "Drafts | None" = None
    ) -> None:
        self.homeserver = homeserver
        self.session = session
        self.drafts = drafts
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._more: set[int] = set()  # rooms whose task has to look again
        self._slots = asyncio.Semaphore(ROOMS_AT_ONCE)
        self._typing: dict[str, datetime] = {}
        self._broken: Exception | None = None

    async def compose(self, run_ids: Iterable[str] | None = None) -> None:
        """Make ready what has its outcome, and send. Raises what a room's task died of."""
        if self._broken:
            broken, self._broken = self._broken, None
            raise broken
        if run_ids is None:
            rounds: Iterable[list[str] | None] = [None] * ROUNDS
        else:
            rounds = batched(list(run_ids), BATCH)
        for some in rounds:
            found = await database_sync_to_async(owed)(self.session, some, self._written())
            # Not where the database is waited for.
            ready = await cpu_sync_to_async(render)(found) if found else []
            self._serve_all(await database_sync_to_async(self._keep)(ready, is_sweep=some is None))
            if some is None and len(found) < BATCH:
                break

    def _serve_all(self, rooms: Mapping[int, Outgoing | None]) -> None:
        for room, outgoing in rooms.items():
            if room in self._tasks:
                self._more.add(room)
            else:
                self._tasks[room] = asyncio.create_task(self._serve(room, outgoing))

    def _keep(self, found: list[Reply], *, is_sweep: bool) -> dict[int, Outgoing | None]:
        """The rooms with something to say, and what comes first in those that nobody serves."""
        ready = keep(found, self.session.device_id)
        rooms = {reply.room_id for reply in ready.values()}
        if is_sweep:
            rooms.update(rooms_to_serve(self.session))
        device_id = self.homeserver.device_id
        return {
            room: None if room in self._tasks else next_of(room, device_id, ready)
            for room in sorted(rooms)
        }

    def _written(self) -> dict[int, str] | None:
        return self.drafts.written() if self.drafts else None

    async def close(self) -> None:
        """Let what is being sent come to its end."""
        if tasks := list(self._tasks.values()):
            _, unfinished = await asyncio.wait(tasks, timeout=10)
            for task in unfinished:
                task.cancel()

    async def show_typing(self) -> None:
        wanted = await database_sync_to_async(typing_rooms)(self.session)
        stale = timezone.now() - timedelta(seconds=TYPING_SECONDS * 2 / 3)
        for room_id in wanted:
            if self._typing.get(room_id, stale) <= stale:
                self._typing[room_id] = timezone.now()
                await self._type(room_id, is_typing=True)
        for room_id in self._typing.keys() - wanted:
            del self._typing[room_id]
            await self._type(room_id, is_typing=False)

    async def _type(self, room_id: str, *, is_typing: bool) -> None:
        try:
            await self.homeserver.typing(room_id, is_typing, TYPING_SECONDS)
        except TokenRefused:
            raise
        except MatrixError as error:
            logger.debug("Typing was not shown in room %s: %s", room_id, error)

    async def _serve(self, room: int, outgoing: Outgoing | None) -> None:
        if self._slots.locked():
            outgoing = None  # by the time of its turn it may have been taken back
        try:
            async with self._slots:
                if outgoing is None:
                    outgoing = await database_sync_to_async(next_of)(
                        room, self.homeserver.device_id
                    )
                while outgoing or room in self._more:
                    self._more.discard(room)
                    if outgoing:
                        outgoing = await self._send(outgoing)
                    else:
                        outgoing = await database_sync_to_async(next_of)(
                            room, self.homeserver.device_id
                        )
        except Exception as error:  # told to whoever looks after this process
            self._broken = error
        finally:
            del self._tasks[room]

    async def _send(self, outgoing: Outgoing) -> Outgoing | None:
        """Send a reply, or what is left of it; the one after it in its room."""
        reply, after = outgoing.reply, None
        event_id, registration = reply.question.event_id, str(reply.registration_id or "")
        with tagged(
            room=outgoing.room_id,
            event_id=event_id,
            request_id=event_id,
            registration=registration,
            run=reply.run_id,
        ):
            try:
                if self.drafts:
                    await self.drafts.settle(reply)
                if outgoing.moved:
                    found = await self._find(outgoing)
                    after = await database_sync_to_async(self._change)(
                        set_found, reply, found, self.homeserver.device_id
                    )
                for number in range(len(reply.event_ids), len(reply.parts)):
                    sent = await self._say(outgoing, number)
                    after = await database_sync_to_async(self._change)(part_sent, reply, sent)
            except MatrixError as error:
                after = await database_sync_to_async(self._change)(not_sent, reply, error)
            except (LeaseLost, KeysOutdated, *DATABASE_ERRORS):
                raise
            except Exception as error:
                # One reply that cannot be sent must not keep all the others waiting.
                logger.exception("Reply %s could not be sent", reply.key)
                broken = MatrixError("BROKEN", type(error).__name__, status=400)
                after = await database_sync_to_async(self._change)(not_sent, reply, broken)
            else:
                asked = timezone.now() - reply.question.created_at
                outcomes.info(
                    "Replied", parts=len(reply.parts), ms=round(asked.total_seconds() * 1000)
                )
        return after

    def _change(self, change: Callable[..., None], reply: Reply, *news: Any) -> Outgoing | None:
        """Change a reply by what became of it. The one after it in its room, once it is done with."""
        change(reply, *news)
        is_open = reply.status == Reply.Status.READY
        return None if is_open else next_of(reply.room_id, self.homeserver.device_id)

    async def _say(self, outgoing: Outgoing, number: int) -> str:
        """Send a part of a reply; the id of its event."""
        reply, room_id = outgoing.reply, outgoing.room_id
        content, transaction = reply.parts[number], f"{reply.key}.{number}"
        if number or not reply.drafted_at:
            return await self.homeserver.send(room_id, content, transaction)
        # Where it is not known whether the draft got through, its transaction id tells.
        draft = reply.draft_id or await self.homeserver.send(room_id, content, transaction)
        await self.homeserver.send(room_id, edit_of(draft, content), f"{transaction}.final")
        return draft

    async def _find(self, outgoing: Outgoing) -> list[str]:
        """The events by which another device of the bot told (a part of) this reply."""
        question = outgoing.reply.question
        found: list[str] = []
        start = ""
        for _ in range(RECONCILE_PAGES):
            events, start = await self.homeserver.messages(outgoing.room_id, start, None)
            for event in events:
                if event.get("event_id") == question.event_id:
                    return found[::-1]
                if event.get("sender") == self.homeserver.user_id and _replies_to(
                    event, question.event_id
                ):
                    found.append(event["event_id"])
            if not start or not events:
                break
        return found[::-1]


def _replies_to(event: dict[str, Any], event_id: str) -> bool:
    """The relation of an encrypted event stands in clear text."""
    said = TimelineEvent.parse(event)
    told = said.relation.get("m.in_reply_to") if said else None
    return isinstance(told, dict) and told.get("event_id") == event_id
