"""What is said in the rooms: written down with the sync position in one transaction, then acted upon.

Everything here is one synchronous unit of database work; the waiting is in botrunner.bot.
"""

import fnmatch
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
from django.conf import settings
from django.db import transaction
from django.db.models.functions import Now
from django.utils import timezone

from agents import inbox, runs
from agents.models import CHAT_REPLY, Run
from botrunner.models import Conversation, Reply, Room, RoomEvent, Session
from botrunner.units import tagged
from chat.models import Thread
from realm.filters import BOT_TRIGGER, ROOM_MESSAGE, Filter, InvalidFilter
from realm.models import BotCommand

logger = logging.getLogger(__name__)

ENCRYPTED = "m.room.encrypted"
REDACTION = "m.room.redaction"
# What other instances of this bot put into what they say, so that two never talk to each other.
MARK = "app.botrealm.reply"
MAX_ID_LENGTH = 255
UNSTORABLE = re.compile("[\x00\ud800-\udfff]")


class LeaseLost(Exception):
    """Another process works with the account now: whatever this one holds is stale."""


@dataclass(frozen=True)
class Said:
    """An event of a timeline that a person may have meant for the bot."""

    event_id: str
    sender: str
    said_at: datetime
    type: str
    content: dict[str, Any]
    source: dict[str, Any]

    @classmethod
    def parse(cls, source: Any) -> "Said | None":
        """None for what is no event, or a piece of a room's state."""
        if not isinstance(source, dict) or "state_key" in source:
            return None
        event_id, sender = source.get("event_id"), source.get("sender")
        milliseconds, content = source.get("origin_server_ts"), source.get("content")
        if not (
            isinstance(event_id, str)
            and 0 < len(event_id) <= MAX_ID_LENGTH
            and isinstance(sender, str)
            and 0 < len(sender) <= MAX_ID_LENGTH
            and isinstance(milliseconds, int)
            and isinstance(content, dict)
            and isinstance(source.get("type"), str)
        ):
            return None
        try:
            said_at = datetime.fromtimestamp(milliseconds / 1000, tz=UTC)
        except (OverflowError, ValueError, OSError):
            return None
        return cls(event_id, sender, said_at, source["type"], content, source)

    @property
    def relation(self) -> dict[str, Any]:
        relation = self.content.get("m.relates_to")
        return relation if isinstance(relation, dict) else {}

    @property
    def edits(self) -> str | None:
        """The event that this one puts other words to, if it does."""
        return _text(self.relation, "event_id") if self._relates("m.replace") else None

    @property
    def redacts(self) -> str | None:
        """The event that this one takes back, if it does."""
        if self.type != REDACTION:
            return None
        return _text(self.content, "redacts") or _text(self.source, "redacts")

    @property
    def thread_root(self) -> str:
        """The root of the Matrix thread that it is said in; empty outside of one."""
        return (_text(self.relation, "event_id") or "") if self._relates("m.thread") else ""

    def mentions(self, user_id: str) -> bool:
        mentions = self.content.get("m.mentions")
        if isinstance(mentions, dict):
            named = mentions.get("user_ids")
            return isinstance(named, list) and user_id in named
        # From before there were intentional mentions.
        return user_id in self.body

    @property
    def body(self) -> str:
        body = _text(self.content, "body") or ""
        if "m.in_reply_to" in self.relation and body.startswith("> "):
            body = re.sub(r"\A(?:>[^\n]*\n)+\n?", "", body)
        return body.strip()

    def _relates(self, kind: str) -> bool:
        return self.relation.get("rel_type") == kind


def matches(wanted: Filter, said: Said, me: str) -> bool:
    """Whether the event passes a command's filter."""
    if said.type != wanted.event_type:
        return False
    if said.type != ROOM_MESSAGE:
        return said.content.get("type") == wanted.content_type and _is_whole(said)
    return (
        said.content.get("msgtype") == wanted.content_type
        and said.body.startswith(wanted.prefix or "")
        and (not wanted.mention or said.mentions(me))
    )


def question(wanted: Filter, said: Said, me: str) -> str:
    """What is asked: without what only calls the bot."""
    if said.type != ROOM_MESSAGE:
        return _input_text(said.content.get("input"))
    body = said.body.removeprefix(wanted.prefix or "").strip()
    if wanted.mention:
        localpart = re.escape(me[1:].partition(":")[0])
        body = re.sub(rf"\A(?:{re.escape(me)}|@?{localpart})\s*[:,]?\s+", "", body)
    return body


@dataclass(frozen=True)
class RoomNews:
    room_id: str
    # In the order said, decrypted where that was possible.
    events: list[dict[str, Any]]
    is_encrypted: bool


@dataclass(frozen=True)
class Invite:
    room_id: str
    inviter: str


@dataclass
class Batch:
    """What one sync brought, ready to be written down."""

    since: str
    next_batch: str
    joined: list[RoomNews] = field(default_factory=list)
    invites: list[Invite] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


def write_down(session: Session, holder: str, batch: Batch) -> int:
    """Keep the events that are meant for the bot, what became of its rooms, and the position, in one
    transaction. How many events were new. Raises `LeaseLost`."""
    new = 0
    with transaction.atomic():
        kept = Session.objects.held_by(holder).filter(pk=session.pk, since=batch.since)
        if not kept.update(since=batch.next_batch, last_sync_at=Now()):
            raise LeaseLost
        for news in batch.joined:
            room = _joined(session, news)
            new += _keep(room, news.events, session.user_id)
        for invite in batch.invites:
            _invited(session, invite)
        if batch.left:
            Room.objects.filter(session=session, room_id__in=batch.left).update(
                membership=Room.Membership.LEFT, join_due_at=None, updated_at=Now()
            )
    return new


def _joined(session: Session, news: RoomNews) -> Room:
    room, is_new = Room.objects.get_or_create(
        session=session,
        room_id=news.room_id,
        defaults={"membership": Room.Membership.JOINED, "is_encrypted": news.is_encrypted},
    )
    encrypted = room.is_encrypted or news.is_encrypted  # never off again
    if room.membership != Room.Membership.JOINED or room.is_encrypted != encrypted:
        room.membership, room.is_encrypted = Room.Membership.JOINED, encrypted
        room.join_due_at, room.error, room.updated_at = None, "", timezone.now()
        room.save(
            update_fields=["membership", "is_encrypted", "join_due_at", "error", "updated_at"]
        )
        logger.info("Joined room %s", room.room_id)
    elif is_new:
        logger.info("Is in room %s", room.room_id)
    return room


def _invited(session: Session, invite: Invite) -> None:
    allowed = matches_any(invite.inviter, settings.BOT_RUNNER_ALLOWED_INVITERS)
    Room.objects.update_or_create(
        session=session,
        room_id=invite.room_id,
        defaults={
            "membership": Room.Membership.INVITED if allowed else Room.Membership.REFUSED,
            "inviter": invite.inviter,
            "join_attempts": 0,
            "join_due_at": timezone.now() if allowed else None,
            "error": "" if allowed else "BOT_RUNNER_ALLOWED_INVITERS does not name the inviter.",
            "updated_at": timezone.now(),
        },
    )
    logger.info(
        "Invited to room %s by %s%s", invite.room_id, invite.inviter, "" if allowed else ": refused"
    )


def _keep(room: Room, events: Iterable[dict[str, Any]], me: str) -> int:
    rows: list[RoomEvent] = []
    for said in filter(None, map(Said.parse, events)):
        kind = _kind(said, room, me, {row.event_id for row in rows})
        if kind is not None:
            rows.append(
                RoomEvent(
                    room=room,
                    event_id=said.event_id,
                    kind=kind,
                    sender=said.sender,
                    said_at=said.said_at,
                    source=storable(said.source),
                )
            )
    if rows:
        # Of the same event, the row that is there stays.
        RoomEvent.objects.bulk_create(rows, ignore_conflicts=True)
    return len(rows)


def _kind(said: Said, room: Room, me: str, batch: set[str]) -> RoomEvent.Kind | None:
    """As what an event concerns the bot; None when it does not."""
    if _is_own_or_other_bots(said, me) or _is_too_old(said):
        return None
    if said.type == ENCRYPTED:
        logger.warning("Event %s in room %s cannot be decrypted yet", said.event_id, room.room_id)
        return RoomEvent.Kind.SEALED
    if target := said.redacts or said.edits:
        kind = RoomEvent.Kind.REDACTION if said.redacts else RoomEvent.Kind.EDIT
        known = target in batch or RoomEvent.objects.filter(event_id=target).exists()
        return kind if known else None
    return RoomEvent.Kind.QUESTION if commands_for(said, me) else None


def _is_own_or_other_bots(said: Said, me: str) -> bool:
    return (
        said.sender == me
        or MARK in said.content
        or said.content.get("msgtype") == "m.notice"
        or matches_any(said.sender, settings.BOT_RUNNER_IGNORED_SENDERS)
    )


def _is_too_old(said: Said) -> bool:
    return timezone.now() - said.said_at > timedelta(seconds=settings.BOT_RUNNER_MAX_EVENT_AGE)


def commands_for(said: Said, me: str) -> list[tuple[BotCommand, Filter]]:
    """The commands that an event fires: those of its sender, then those of the bot's own user. The
    same command is fired once, however often it is registered."""
    commands = (
        BotCommand.objects.filter(
            registration__username__in=[said.sender, me],
            registration__user__is_active=True,
            registration__created_at__lte=said.said_at,
        )
        .select_related("registration__user")
        .order_by("created_at", "id")
    )
    fired: dict[str, tuple[BotCommand, Filter]] = {}
    for command in sorted(commands, key=lambda each: each.registration.username != said.sender):
        try:
            wanted = command.when
        except InvalidFilter:
            continue
        if matches(wanted, said, me):
            fired.setdefault(command.command, (command, wanted))
    return list(fired.values())


def pending() -> list[int]:
    """The rows to act upon, in the order said."""
    rows = RoomEvent.objects.filter(state=RoomEvent.State.PENDING)
    return list(
        rows.exclude(kind=RoomEvent.Kind.SEALED).order_by("id").values_list("pk", flat=True)[:500]
    )


def act(pk: int, me: str) -> None:
    """Do what an event asks for and note that it is done, in one transaction."""
    with transaction.atomic():
        event = RoomEvent.objects.select_related("room").filter(pk=pk, state="pending").first()
        if event is None:
            return
        said = Said.parse(event.source)
        note = ""
        with tagged(room=event.room.room_id, event_id=event.event_id):
            if said is None:
                note = "It is no event of a timeline."
            elif event.kind == RoomEvent.Kind.QUESTION:
                note = _ask(event, said, me)
            elif event.kind == RoomEvent.Kind.EDIT:
                note = _edit(event, said, me)
            else:
                note = _take_back(said)
        event.note = note
        event.state = RoomEvent.State.IGNORED if note else RoomEvent.State.HANDLED
        event.save(update_fields=["state", "note"])


def give_up(pk: int) -> None:
    """What cannot be handled must not hold up the rest."""
    RoomEvent.objects.filter(pk=pk).update(
        state=RoomEvent.State.IGNORED, note="It could not be handled: see the log."
    )


def _ask(event: RoomEvent, said: Said, me: str) -> str:
    fired = commands_for(said, me)
    for command, wanted in fired:
        _ask_one(event, said, command, question(wanted, said, me))
    return "" if fired else "Its command was taken away."


def _ask_one(event: RoomEvent, said: Said, command: BotCommand, asked: str) -> None:
    user = command.registration.user
    conversation = Conversation.objects.filter(room=event.room, root=said.thread_root).first()
    reply = Reply(question=event, room=event.room, registration=command.registration)
    try:
        if command.command == CHAT_REPLY and not asked:
            raise inbox.Invalid("There was no question.")
        accepted = inbox.ask(
            content=asked or command.command,
            source=Run.Source.MATRIX,
            threads=Thread.objects.all(),
            owner=user,
            thread_id=conversation.thread_id if conversation else None,
            command=command.command,
            input=_input(event, said),
            correlation_id=said.event_id[: inbox.MAX_CORRELATION_LENGTH],
            idempotency=inbox.Idempotency(caller="matrix", key=f"{event.pk}:{command.pk}"),
        )
    except inbox.Refused as error:
        reply.key = f"{event.event_id}.{command.pk}"[:255]
        reply.error = str(error)
        reply.save()
        logger.info("A question was refused: %s", error)
        return
    if conversation is None:
        Conversation.objects.create(
            room=event.room, root=said.thread_root, thread_id=accepted.thread_id
        )
    reply.run_id = reply.key = accepted.run_id
    reply.save()
    logger.info(
        "Command %s of registration %s fired: run %s",
        command.command,
        command.registration_id,
        accepted.run_id,
    )


def _edit(event: RoomEvent, said: Said, me: str) -> str:
    first_row = RoomEvent.objects.filter(event_id=said.edits, sender=said.sender).first()
    first = Said.parse(first_row.source) if first_row else None
    new = said.content.get("m.new_content")
    if first_row is None or first is None or not isinstance(new, dict):
        return "It edits no question of the same sender."
    edited = replace(first, content={**first.content, **new})
    changed = False
    for command, wanted in commands_for(first, me):
        words = question(wanted, edited, me)
        replies = first_row.replies.waiting().filter(run__command=command.command)
        for run_id in replies.values_list("run_id", flat=True):
            changed |= bool(words) and inbox.amend(run_id, content=words)
    if not changed:
        return "The answer was under way."
    logger.info("Question %s was edited before its run began", first.event_id)
    return ""


def _take_back(said: Said) -> str:
    replies = Reply.objects.filter(question__event_id=said.redacts)
    open_replies = list(
        replies.filter(status__in=[Reply.Status.WAITING, Reply.Status.READY]).select_related("run")
    )
    for reply in open_replies:
        if reply.run:
            runs.cancel(reply.run)
        reply.status, reply.error = Reply.Status.DROPPED, "The question was taken back."
        reply.save(update_fields=["status", "error"])
    RoomEvent.objects.filter(event_id=said.redacts, kind=RoomEvent.Kind.SEALED).update(
        state=RoomEvent.State.IGNORED, note="It was taken back."
    )
    return "" if open_replies else "There was nothing to cancel."


def sealed() -> list[tuple[int, str, dict[str, Any]]]:
    """What waits for its key: row, room id, event. What has become too old is given up."""
    waiting = RoomEvent.objects.filter(state=RoomEvent.State.PENDING, kind=RoomEvent.Kind.SEALED)
    limit = timezone.now() - timedelta(seconds=settings.BOT_RUNNER_MAX_EVENT_AGE)
    waiting.filter(said_at__lt=limit).update(
        state=RoomEvent.State.IGNORED, note="Its key never came."
    )
    return list(waiting.order_by("id").values_list("pk", "room__room_id", "source")[:500])


def unseal(pk: int, source: dict[str, Any], me: str) -> None:
    """The key has come: from here on it is an event like any other."""
    with transaction.atomic():
        event = RoomEvent.objects.select_related("room").get(pk=pk)
        said = Said.parse(source)
        kind = _kind(said, event.room, me, set()) if said else None
        event.source = storable(source)
        if kind is None or kind == RoomEvent.Kind.SEALED:
            event.state, event.note = RoomEvent.State.IGNORED, "It fires no command."
        else:
            event.kind = kind
        event.save(update_fields=["kind", "state", "note", "source"])
        logger.info("Event %s in room %s was decrypted", event.event_id, event.room.room_id)


def _input(event: RoomEvent, said: Said) -> dict[str, Any]:
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


def _input_text(given: Any) -> str:
    if isinstance(given, str):
        return given.strip()
    if isinstance(given, dict):
        for key in ("prompt", "content", "text", "message", "body"):
            if text := (_text(given, key) or "").strip():
                return text
    return "" if given is None else orjson.dumps(given).decode()


def _is_whole(said: Said) -> bool:
    """Whether a trigger has all that a trigger has to have."""
    content = said.content
    if said.type != BOT_TRIGGER:
        return True
    if "input" not in content or not all(
        isinstance(content.get(key), str) for key in ("type", "realm", "userId")
    ):
        logger.warning("Trigger %s lacks one of type, input, realm, userId", said.event_id)
        return False
    return True


def storable(data: Any) -> Any:
    """Without what PostgreSQL cannot hold in JSON."""
    if isinstance(data, str):
        return UNSTORABLE.sub("", data)
    if isinstance(data, dict):
        return {storable(key): storable(value) for key, value in data.items()}
    if isinstance(data, list):
        return [storable(item) for item in data]
    return data


def matches_any(user_id: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(user_id, pattern) for pattern in patterns)


def since_own_join(events: Iterable[dict[str, Any]], me: str) -> Iterator[dict[str, Any]]:
    """The events after the bot's last join among them; none if it is not there."""
    kept: list[dict[str, Any]] | None = None
    for event in events:
        if is_own_join(event, me):
            kept = []
        elif kept is not None:
            kept.append(event)
    yield from kept or []


def is_own_join(event: Any, me: str) -> bool:
    """Whether `me` came in by this event: a change of name has the same membership before it."""
    if not isinstance(event, dict) or event.get("type") != "m.room.member":
        return False
    content = event.get("content")
    before = (event.get("unsigned") or {}).get("prev_content") or {}
    return (
        event.get("state_key") == me
        and isinstance(content, dict)
        and content.get("membership") == "join"
        and before.get("membership") != "join"
    )


def _text(data: dict[str, Any], key: str) -> str | None:
    value = data.get(key)
    return value if isinstance(value, str) else None
