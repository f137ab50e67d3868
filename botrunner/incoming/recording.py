"""What is said in the rooms, written down with the sync position in one transaction."""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from django.conf import settings
from django.db import transaction
from django.db.models import Count
from django.db.models.functions import Now
from django.utils import timezone

from botrunner.incoming import members
from botrunner.incoming.matching import FORGET, Rule, RuleSet, control_of, format_time, matches_any
from botrunner.matrix.events import (
    ENCRYPTED,
    REDACTION,
    REPLY_FIELD,
    TimelineEvent,
    server_of,
    storable,
)
from botrunner.models import MAX_TYPE_LENGTH, LeaseLost, Room, RoomEvent, Session
from botrunner.verdicts import stored
from lib.db import TRANSIENT_ERRORS
from realm.filters import EVENT_TYPES, EventFilter
from realm.models import User

logger = logging.getLogger(__name__)

# More questions are each acted upon in a transaction of their own: others wait for the database.
MAX_AT_ONCE = 8
# That wait to be followed, or were refused: of an inviter, and of one other server, which may make up
# as many inviters as it likes.
MAX_INVITATIONS = 50
MAX_INVITATIONS_SERVER = 200
INVITER_DEACTIVATED = "The account of the inviter is deactivated."
# What people say. A sync asks for no more, but anything may come out of an encrypted event.
SPOKEN = {*EVENT_TYPES, ENCRYPTED, REDACTION}


@dataclass(frozen=True)
class RoomNews:
    room_id: str
    # In the order said, decrypted where that was possible.
    events: list[dict[str, Any]]
    is_encrypted: bool
    # What was said before the bot came: never acted upon, but an admin may ask why.
    earlier: list[dict[str, Any]] = field(default_factory=list)
    # Whether no event is missing before these, so that whose join is not among them was there before.
    is_whole: bool = True


@dataclass(frozen=True)
class Invite:
    room_id: str
    inviter: str


@dataclass
class Batch:
    """What one sync brought, ready to be written down."""

    next_batch: str
    joined: list[RoomNews] = field(default_factory=list)
    invites: list[Invite] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    # Rooms of which a join or a leave may have been missed.
    members_lost: set[str] = field(default_factory=set)
    # Who is in some rooms, and by which event.
    members: dict[str, dict[str, str]] = field(default_factory=dict)
    # That the key store had seen when this was in it.
    key_writes: int = 0

    @property
    def is_empty(self) -> bool:
        return not (self.joined or self.invites or self.left or self.members)


@dataclass(frozen=True)
class Kept:
    """What was said, as it is kept, and which commands it fires."""

    row: RoomEvent
    said: TimelineEvent
    fired: list[tuple[Rule, EventFilter]] = field(default_factory=list)


def write_down(
    session: Session, holder: str, batch: Batch, ask: Callable[[Kept], None] | None = None
) -> int:
    """Keep what was said, what became of the bot's rooms, and the position, in one transaction. How
    many events are left to be acted upon: with `ask`, a few questions are asked at once, which has
    them on their way sooner. Raises `LeaseLost`."""
    with transaction.atomic():
        kept = Session.objects.held_by(holder).filter(pk=session.pk, since=session.since)
        if not kept.update(since=batch.next_batch, last_sync_at=Now(), key_writes=batch.key_writes):
            raise LeaseLost
        rooms = _joined(session, batch.joined)
        news = list(zip(rooms, batch.joined, strict=True))
        begun = timezone.now()
        moments = _moments(batch.joined, begun)
        _keep_members(session, batch, news, moments, begun)
        left = _keep(news, session.user_id, moments, ask)
        if batch.invites:
            _invited(session, batch.invites)
        if batch.left:
            Room.objects.filter(session=session, room_id__in=batch.left).update(
                membership=Room.Membership.LEFT, join_due_at=None, updated_at=Now()
            )
    return left


def _moments(joined: list[RoomNews], begun: datetime) -> dict[str, datetime]:
    """The moment at which each event was shown to the bot: in their order, so that it is known which
    came before a join. Not by the times in them, which other homeservers make up."""
    events = (event for news in joined for event in news.events if isinstance(event, dict))
    ids = (event.get("event_id") for event in events)
    known = dict.fromkeys(event_id for event_id in ids if isinstance(event_id, str))
    return {event_id: begun + timedelta(microseconds=n) for n, event_id in enumerate(known, 1)}


def _keep_members(
    session: Session,
    batch: Batch,
    news: list[tuple[Room, RoomNews]],
    moments: dict[str, datetime],
    begun: datetime,
) -> None:
    ended = begun + timedelta(microseconds=len(moments) + 1)
    for room, each in news:
        # No one is known to have been there during a gap.
        otherwise = begun if each.is_whole else ended
        found = batch.members.get(room.room_id)
        members.keep(room, members.changes(each.events, moments), found, otherwise=otherwise)
    in_news = {each.room_id for each in batch.joined}
    others = Room.objects.filter(session=session, room_id__in=batch.members.keys() - in_news)
    for room in others if batch.members else ():
        members.keep(room, [], batch.members[room.room_id], otherwise=ended)
    for room_ids, known in ((batch.members_lost, False), (batch.members.keys(), True)):
        if room_ids:
            rows = Room.objects.filter(session=session, room_id__in=list(room_ids))
            rows.update(members_known=known)


def _joined(session: Session, joined: list[RoomNews]) -> list[Room]:
    """The rows of the rooms, in that order."""
    known = Room.objects.filter(session=session, room_id__in=[news.room_id for news in joined])
    rooms = {room.room_id: room for room in known}
    return [_joined_one(session, news, rooms.get(news.room_id)) for news in joined]


def _joined_one(session: Session, news: RoomNews, room: Room | None) -> Room:
    if room is None:
        logger.info("Is in room %s", news.room_id)
        return Room.objects.create(
            session=session,
            room_id=news.room_id,
            membership=Room.Membership.JOINED,
            is_encrypted=news.is_encrypted,
        )
    encrypted = room.is_encrypted or news.is_encrypted  # never off again
    if room.membership != Room.Membership.JOINED or room.is_encrypted != encrypted:
        room.membership, room.is_encrypted = Room.Membership.JOINED, encrypted
        room.join_due_at, room.error, room.updated_at = None, "", timezone.now()
        room.save(
            update_fields=["membership", "is_encrypted", "join_due_at", "error", "updated_at"]
        )
        logger.info("Joined room %s", room.room_id)
    return room


def _invited(session: Session, invites: list[Invite]) -> None:
    """Keep those that may be followed, up to as many of an inviter, and of one other server, as may
    wait at once. What is beyond leaves no row, only a line in the log."""
    rooms = Room.objects.filter(session=session)
    known = {
        room.room_id: room
        for room in rooms.filter(room_id__in=[invite.room_id for invite in invites])
    }
    pending = _Pending(session)
    deactivated = User.objects.deactivated_among([invite.inviter for invite in invites])
    for invite in invites:
        why_not = _why_not_joined(invite, deactivated)
        room = known.get(invite.room_id)
        waits = room is not None and room.membership == Room.Membership.INVITED
        if not waits and not pending.takes(invite.inviter, allowed=not why_not):
            continue
        attempts = room.join_attempts if room and waits else 0
        _keep_invitation(session, invite, attempts=attempts, why_not=why_not)
    pending.log()


def _why_not_joined(invite: Invite, deactivated: Collection[str]) -> str:
    if not matches_any(invite.inviter, settings.BOT_RUNNER_ALLOWED_INVITERS):
        return "BOT_RUNNER_ALLOWED_INVITERS does not name the inviter."
    if invite.inviter in deactivated:
        return INVITER_DEACTIVATED
    return ""


def _keep_invitation(session: Session, invite: Invite, *, attempts: int, why_not: str) -> None:
    allowed = not why_not
    Room.objects.update_or_create(
        session=session,
        room_id=invite.room_id,
        defaults={
            "membership": Room.Membership.INVITED if allowed else Room.Membership.REFUSED,
            "inviter": invite.inviter,
            "join_attempts": attempts,
            "join_due_at": timezone.now() if allowed else None,
            "error": why_not,
            "updated_at": timezone.now(),
        },
    )
    logger.info(
        "Invited to room %s by %s%s", invite.room_id, invite.inviter, "" if allowed else ": refused"
    )


class _Pending:
    """How many invitations of whom are kept already."""

    def __init__(self, session: Session) -> None:
        self._own_server = server_of(session.user_id)
        kept = Room.objects.filter(
            session=session, membership__in=[Room.Membership.INVITED, Room.Membership.REFUSED]
        )
        counted = kept.values_list("inviter", "membership").annotate(rooms=Count("pk"))
        self._waiting: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._waiting_of_server: Counter[str] = Counter()
        self._refused_of_server: Counter[str] = Counter()
        self._ignored: Counter[str] = Counter()
        for inviter, membership, rooms in counted:
            of_inviter, of_server = self._kept(allowed=membership == Room.Membership.INVITED)
            of_inviter[inviter] += rooms
            of_server[server_of(inviter)] += rooms

    def _kept(self, *, allowed: bool) -> tuple[Counter[str], Counter[str]]:
        """Of whom, and of which server."""
        if allowed:
            return self._waiting, self._waiting_of_server
        return self._refused, self._refused_of_server

    def takes(self, inviter: str, *, allowed: bool) -> bool:
        """Whether there is room for one more, which then counts."""
        server = server_of(inviter)
        kept, of_server = self._kept(allowed=allowed)
        is_too_many = kept[inviter] >= MAX_INVITATIONS or (
            server != self._own_server and of_server[server] >= MAX_INVITATIONS_SERVER
        )
        if is_too_many:
            self._ignored[inviter] += 1
            return False
        kept[inviter] += 1
        of_server[server] += 1
        return True

    def log(self) -> None:
        for inviter, count in self._ignored.most_common(10):
            logger.warning(
                "Ignored %d invitations of %s: too many of theirs or of their server wait or were "
                "refused",
                count,
                inviter,
            )


def _keep(
    news: list[tuple[Room, RoomNews]],
    me: str,
    moments: dict[str, datetime],
    ask: Callable[[Kept], None] | None = None,
) -> int:
    kept = [
        _ignored(room, said, "It was said before the bot came into the room.")
        for room, each in news
        for said in _spoken(each.earlier, me)
        if not _is_too_old(said)
    ]
    kept += kept_of([(room, said) for room, each in news for said in _spoken(each.events, me)], me)
    for each in kept:
        each.row.created_at = moments.get(each.row.event_id, each.row.created_at)
    pending = [each for each in kept if each.row.state == RoomEvent.State.PENDING]
    if ask and _are_few_questions(pending) and _keep_and_ask(kept, pending, ask):
        return 0
    if kept:
        # Of the same event, the row that is there stays.
        RoomEvent.objects.bulk_create([each.row for each in kept], ignore_conflicts=True)
    return len(pending)


def _are_few_questions(pending: list[Kept]) -> bool:
    return 0 < len(pending) <= MAX_AT_ONCE and all(
        each.row.kind == RoomEvent.Kind.MESSAGE for each in pending
    )


def _keep_and_ask(kept: list[Kept], pending: list[Kept], ask: Callable[[Kept], None]) -> bool:
    """False when nothing of it could be done: one of the events is there already, or a question
    cannot be asked, which must not hold up the rest."""
    try:
        with transaction.atomic():
            for each in pending:
                each.row.state = RoomEvent.State.HANDLED
            RoomEvent.objects.bulk_create([each.row for each in kept])
            for each in pending:
                ask(each)
    except TRANSIENT_ERRORS:
        raise  # the database is away, and the batch comes again
    except Exception as error:
        logger.debug("Not asked at once: %s", error)
        for each in kept:
            each.row.pk = None
        for each in pending:
            each.row.state = RoomEvent.State.PENDING
        return False
    return True


def _spoken(events: Iterable[Any], me: str) -> list[TimelineEvent]:
    """What people say, among the events of a timeline: bots leave no trace."""
    found = filter(None, map(TimelineEvent.parse, events))
    return [said for said in found if said.type in SPOKEN and not is_own_or_other_bots(said, me)]


def kept_of(spoken: list[tuple[Room, TimelineEvent]], me: str) -> list[Kept]:
    """As what the events are kept. What is for the bot waits to be acted upon; of anything else there
    stays that it was said, not what, and why it is not for the bot."""
    if not spoken:
        return []
    rules = RuleSet({said.sender for _, said in spoken}, me)
    targets = [target for _, said in spoken if (target := said.redacts or said.edits)]
    questions = RoomEvent.objects.messages_among(targets) if targets else set()
    found = []
    for room, said in spoken:
        kept = _kept_of(room, said, rules, questions)
        if kept.row.kind in RoomEvent.MESSAGES:
            questions.add(said.event_id)
        found.append(kept)
    return found


def _kept_of(room: Room, said: TimelineEvent, rules: RuleSet, questions: set[str]) -> Kept:
    if _is_too_old(said):
        age = settings.BOT_RUNNER_MAX_EVENT_AGE
        return _ignored(
            room,
            said,
            f"Too old: said at {format_time(said.sent_at)}, BOT_RUNNER_MAX_EVENT_AGE is {age:g} s.",
        )
    kind = _kind(said)
    if kind == RoomEvent.Kind.ENCRYPTED:
        logger.warning("Event %s in room %s cannot be decrypted yet", said.event_id, room.room_id)
        return _pending(room, said, kind, note="It cannot be read until its key comes.")
    if kind in (RoomEvent.Kind.EDIT, RoomEvent.Kind.REDACTION):
        if (said.redacts or said.edits) in questions:
            return _pending(room, said, kind)
        verb = "edits" if kind == RoomEvent.Kind.EDIT else "takes back"
        return _ignored(room, said, f"It {verb} nothing that is known as a question here.")
    if order := control_of(said, rules.me):
        is_forget = order == FORGET
        return _pending(room, said, RoomEvent.Kind.FORGET if is_forget else RoomEvent.Kind.CANCEL)
    match = rules.match(said)
    verdicts = stored(match.verdicts)
    if match.fired:
        return _pending(room, said, RoomEvent.Kind.MESSAGE, match.fired, verdicts=verdicts)
    return _ignored(room, said, match.reason, verdicts=verdicts)


def _pending(
    room: Room,
    said: TimelineEvent,
    kind: RoomEvent.Kind,
    fired: Iterable[tuple[Rule, EventFilter]] = (),
    **reasons: Any,
) -> Kept:
    source = storable(said.source)
    row = _row(room, said, kind=kind, source=source, **reasons)
    # The words as they are kept: what is asked goes into the database too.
    return Kept(row, TimelineEvent.parse(source) or said, list(fired))


def _ignored(room: Room, said: TimelineEvent, note: str, **reasons: Any) -> Kept:
    state = RoomEvent.State.IGNORED
    return Kept(_row(room, said, kind=_kind(said), state=state, note=note, **reasons), said)


def _row(room: Room, said: TimelineEvent, **values: Any) -> RoomEvent:
    return RoomEvent(
        room=room,
        event_id=said.event_id,
        sender=said.sender,
        type=said.type,
        content_type=storable(said.content_type[:MAX_TYPE_LENGTH]),
        sent_at=said.sent_at,
        **values,
    )


def _kind(said: TimelineEvent) -> RoomEvent.Kind:
    """As which it concerns the bot, as far as it tells itself."""
    if said.type == ENCRYPTED:
        return RoomEvent.Kind.ENCRYPTED
    if said.type == REDACTION:
        return RoomEvent.Kind.REDACTION
    return RoomEvent.Kind.EDIT if said.edits else RoomEvent.Kind.OTHER


def is_own_or_other_bots(said: TimelineEvent, me: str) -> bool:
    return (
        said.sender == me
        or REPLY_FIELD in said.content
        or said.content.get("msgtype") == "m.notice"
        or matches_any(said.sender, settings.BOT_RUNNER_IGNORED_SENDERS)
    )


def _is_too_old(said: TimelineEvent) -> bool:
    return timezone.now() - said.sent_at > timedelta(seconds=settings.BOT_RUNNER_MAX_EVENT_AGE)
