"""Invitations: read from a sync, kept with its position, and followed."""

import asyncio
import logging
import random
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from django.db.models import F
from django.db.models.functions import Now
from django.utils import timezone

from botrunner.aio import database_sync_to_async
from botrunner.incoming.recording import INVITER_DEACTIVATED, Invite
from botrunner.matrix.client import Homeserver
from botrunner.matrix.errors import MatrixError, MatrixTimeout
from botrunner.matrix.events import is_id, server_of
from botrunner.models import Room, Session
from realm.models import User

logger = logging.getLogger(__name__)

# The server that invited may not have told ours yet, so even a refusal is tried again.
MAX_ATTEMPTS = 12
MAX_PAUSE_SECONDS = 300.0
# Where the room's server does not answer, for some hours.
MAX_ATTEMPTS_UNANSWERED = 16
MAX_PAUSE_UNANSWERED_SECONDS = 3600.0
# So long each try is waited for: twice as long as the one before it.
FIRST_SECONDS = 5.0
MAX_SECONDS = 30.0
PUT_OFF_SECONDS = 5.0
# Joins at once: of all, of those that were tried before, of an inviter, of one other server.
AT_ONCE = 16
AT_ONCE_AGAIN = 8
AT_ONCE_INVITER = 4
AT_ONCE_SERVER = 8
LOOKED_AT = 500
# A join that was accepted shows in a sync at once; if it does not, it is asked for again.
PATIENCE = timedelta(seconds=60)


def invites(rooms: dict[str, Any], me: str) -> list[Invite]:
    """Who invited `me` where, from the `invite` section of a sync. Its events are stripped: they have
    no id and no time, and some are about others."""
    return [
        Invite(room_id, event["sender"])
        for room_id, room in rooms.items()
        for event in room["invite_state"]["events"]
        if _is_invitation(event, me)
    ]


def _is_invitation(event: dict[str, Any], me: str) -> bool:
    content = event.get("content")
    return (
        isinstance(content, dict)
        and content.get("membership") == "invite"
        and is_id(event.get("sender"))
        and event.get("type") == "m.room.member"
        and event.get("state_key") == me
    )


@dataclass(frozen=True)
class Due:
    """A room that is to be joined now."""

    pk: int
    room_id: str
    inviter: str
    attempts: int

    @property
    def server(self) -> str:
        return server_of(self.inviter)

    @property
    def seconds(self) -> float:
        """For a first try little: of many there may be one that is good."""
        return min(FIRST_SECONDS * 2.0**self.attempts, MAX_SECONDS)


class Joiner:
    """Joins rooms side by side: those without a try first, and never so many of one inviter
    or of one other server that theirs, when they do not answer, keep the others waiting."""

    def __init__(self, homeserver: Homeserver, session: Session, freed: asyncio.Event) -> None:
        self.homeserver = homeserver
        self.session = session
        self._freed = freed  # set once another may begin
        self._tasks: dict[Due, asyncio.Task[None]] = {}
        self._broken: Exception | None = None

    async def start_due(self) -> None:
        """Begin with as many as may be tried at once. Raises what is not about a room: that the
        homeserver is away, the token is refused, or the database is away."""
        if self._broken:
            broken, self._broken = self._broken, None
            raise broken
        if len(self._tasks) >= AT_ONCE:
            return
        for due in _in_turn(
            await database_sync_to_async(_due)(self.session, [due.pk for due in self._tasks])
        ):
            if self._has_room_for(due):
                self._tasks[due] = asyncio.create_task(self._join(due))

    def _has_room_for(self, due: Due) -> bool:
        own = server_of(self.homeserver.user_id)
        again = sum(bool(other.attempts) for other in self._tasks)
        return (
            len(self._tasks) < AT_ONCE
            and (not due.attempts or again < AT_ONCE_AGAIN)
            and sum(other.inviter == due.inviter for other in self._tasks) < AT_ONCE_INVITER
            and (
                due.server == own
                or sum(other.server == due.server for other in self._tasks) < AT_ONCE_SERVER
            )
        )

    async def _join(self, due: Due) -> None:
        try:
            await self._try(due)
        except Exception as error:  # raised by the next `start_due`
            self._broken = error
        finally:
            del self._tasks[due]
            self._freed.set()

    async def _try(self, due: Due) -> None:
        try:
            await self.homeserver.join(due.room_id, seconds=due.seconds)
        except MatrixError as error:
            if _is_about_the_room(error, self.session):
                await database_sync_to_async(_failed)(due.pk, error)
            else:
                await database_sync_to_async(_put_off)(due.pk)
                if not isinstance(error, MatrixTimeout):
                    raise
        else:
            await database_sync_to_async(_accepted)(due.pk)

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _is_about_the_room(error: MatrixError, session: Session) -> bool:
    if isinstance(error, MatrixTimeout):
        # If no sync comes through either, it is about the homeserver.
        return session.connected_since is not None
    return error.status not in (0, 401)


def _due(session: Session, known: list[int]) -> list[Due]:
    rooms = Room.objects.filter(
        session=session, membership=Room.Membership.INVITED, join_due_at__lte=Now()
    ).exclude(pk__in=known)
    columns = ("pk", "room_id", "inviter", "join_attempts")
    rows = rooms.order_by("join_attempts", "join_due_at").values_list(*columns)
    found = [Due(*row) for row in rows[:LOOKED_AT]]
    # It may wait for hours, and the account be deactivated meanwhile.
    gone = User.objects.deactivated_among(due.inviter for due in found) if found else set()
    if gone:
        rooms.filter(inviter__in=gone).update(
            membership=Room.Membership.REFUSED, join_due_at=None, error=INVITER_DEACTIVATED
        )
    return [due for due in found if due.inviter not in gone]


def _in_turn(found: list[Due]) -> list[Due]:
    """New ones first; of them one of each inviter, then one more of each."""
    of_inviter: Counter[str] = Counter()
    turns = {}
    for due in found:
        turns[due] = bool(due.attempts), of_inviter[due.inviter]
        of_inviter[due.inviter] += 1
    return sorted(found, key=lambda due: turns[due])


def _accepted(pk: int) -> None:
    """The sync that shows the bot in the room makes it a joined one."""
    Room.objects.filter(pk=pk, membership=Room.Membership.INVITED).update(
        join_due_at=timezone.now() + PATIENCE, join_attempts=F("join_attempts") + 1
    )


def _put_off(pk: int) -> None:
    """As if it had not been tried."""
    Room.objects.filter(pk=pk, membership=Room.Membership.INVITED).update(
        join_due_at=timezone.now() + timedelta(seconds=PUT_OFF_SECONDS)
    )


def _failed(pk: int, error: MatrixError) -> None:
    room = Room.objects.get(pk=pk)
    room.error = str(error)
    if error.status != 429:
        room.join_attempts += 1
    most = MAX_ATTEMPTS if error.permanent else MAX_ATTEMPTS_UNANSWERED
    if room.join_attempts >= most:
        room.membership, room.join_due_at = Room.Membership.REFUSED, None
        room.error = f"Given up after {most} tries: {error}"
    else:
        longest = MAX_PAUSE_SECONDS if error.permanent else MAX_PAUSE_UNANSWERED_SECONDS
        pause = random.uniform(0.5, 1) * min(longest, 2.0**room.join_attempts)  # noqa: S311
        room.join_due_at = timezone.now() + timedelta(seconds=error.retry_after or pause)
    room.updated_at = timezone.now()
    # A sync may have shown the bot in the room meanwhile.
    Room.objects.filter(pk=pk, membership=Room.Membership.INVITED).update(
        membership=room.membership,
        error=room.error,
        join_attempts=room.join_attempts,
        join_due_at=room.join_due_at,
        updated_at=room.updated_at,
    )
    logger.warning("Could not join room %s: %s", room.room_id, room.error)
