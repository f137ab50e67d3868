"""Join rooms that the bot is invited to."""

import asyncio
import logging
import random
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta

from django.db.models import F
from django.db.models.functions import Now
from django.utils import timezone

from botrunner.aio import database_sync_to_async
from botrunner.incoming.invitations import INVITER_DEACTIVATED
from botrunner.matrix.client import Homeserver
from botrunner.matrix.errors import MatrixError, MatrixTimeout
from botrunner.matrix.events import server_of
from botrunner.models import Room, Session
from realm.models import User

logger = logging.getLogger(__name__)

# The inviter's server may not have reached ours yet, so even a refusal is retried.
MAX_ATTEMPTS = 12
MAX_PAUSE_SECONDS = 300.0
# For some hours, if the room's server does not answer.
MAX_ATTEMPTS_UNANSWERED = 16
MAX_PAUSE_UNANSWERED_SECONDS = 3600.0
# The timeout of each attempt doubles, up to a limit.
FIRST_SECONDS = 5.0
MAX_SECONDS = 30.0
POSTPONE_SECONDS = 5.0
# Concurrent joins: all, retries, of one inviter, of one other server.
MAX_JOINS = 16
MAX_RETRIES = 8
MAX_OF_INVITER = 4
MAX_OF_SERVER = 8
MAX_DUE = 500
# An accepted join shows in a sync at once; otherwise it is retried.
PATIENCE = timedelta(seconds=60)


@dataclass(frozen=True)
class Due:
    """A room whose join is due."""

    pk: int
    room_id: str
    inviter: str
    attempts: int

    @property
    def server(self) -> str:
        return server_of(self.inviter)

    @property
    def seconds(self) -> float:
        """The timeout, short for a first attempt: of many rooms one may answer."""
        return min(FIRST_SECONDS * 2.0**self.attempts, MAX_SECONDS)


class Joiner:
    """Joins rooms concurrently: first attempts before retries, and a limited number for each
    inviter and server, so that unresponsive ones do not hold up the others."""

    def __init__(self, homeserver: Homeserver, session: Session, freed: asyncio.Event) -> None:
        self.homeserver = homeserver
        self.session = session
        self._freed = freed  # set once another join may start
        self._tasks: dict[Due, asyncio.Task[None]] = {}
        self._error: Exception | None = None

    async def start_due(self) -> None:
        """Start as many joins as may run concurrently. Raises errors that are not about a room: the
        homeserver or the database is unavailable, or the token was refused."""
        if self._error:
            error, self._error = self._error, None
            raise error
        if len(self._tasks) >= MAX_JOINS:
            return
        for due in _interleave(
            await database_sync_to_async(_due)(self.session, [due.pk for due in self._tasks])
        ):
            if self._has_slot_for(due):
                self._tasks[due] = asyncio.create_task(self._join(due))

    def _has_slot_for(self, due: Due) -> bool:
        own = server_of(self.homeserver.user_id)
        retries = sum(bool(other.attempts) for other in self._tasks)
        return (
            len(self._tasks) < MAX_JOINS
            and (not due.attempts or retries < MAX_RETRIES)
            and sum(other.inviter == due.inviter for other in self._tasks) < MAX_OF_INVITER
            and (
                due.server == own
                or sum(other.server == due.server for other in self._tasks) < MAX_OF_SERVER
            )
        )

    async def _join(self, due: Due) -> None:
        try:
            await self._attempt(due)
        except Exception as error:  # raised by the next `start_due`
            self._error = error
        finally:
            del self._tasks[due]
            self._freed.set()

    async def _attempt(self, due: Due) -> None:
        try:
            await self.homeserver.join(due.room_id, seconds=due.seconds)
        except MatrixError as error:
            if _is_about_the_room(error, self.session):
                await database_sync_to_async(_record_failure)(due.pk, error)
            else:
                await database_sync_to_async(_postpone)(due.pk)
                if not isinstance(error, MatrixTimeout):
                    raise
        else:
            await database_sync_to_async(_record_accepted)(due.pk)

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _is_about_the_room(error: MatrixError, session: Session) -> bool:
    if isinstance(error, MatrixTimeout):
        # If syncs fail too, it is about the homeserver.
        return session.connected_since is not None
    return error.status not in (0, 401)


def _due(session: Session, active: list[int]) -> list[Due]:
    rooms = Room.objects.filter(
        session=session, membership=Room.Membership.INVITED, join_due_at__lte=Now()
    ).exclude(pk__in=active)
    columns = ("pk", "room_id", "inviter", "join_attempts")
    rows = rooms.order_by("join_attempts", "join_due_at").values_list(*columns)
    due_rooms = [Due(*row) for row in rows[:MAX_DUE]]
    # A join may wait for hours, and the account may be deactivated meanwhile.
    deactivated: set[str] = set()
    if due_rooms:
        deactivated = User.objects.deactivated_among(due.inviter for due in due_rooms)
    if deactivated:
        rooms.filter(inviter__in=deactivated).update(
            membership=Room.Membership.REFUSED,
            join_due_at=None,
            leave_due_at=Now(),
            error=INVITER_DEACTIVATED,
        )
    return [due for due in due_rooms if due.inviter not in deactivated]


def _interleave(due_rooms: list[Due]) -> list[Due]:
    """Sort first attempts first; within these one of each inviter, then one more of each."""
    of_inviter: Counter[str] = Counter()
    turns = {}
    for due in due_rooms:
        turns[due] = bool(due.attempts), of_inviter[due.inviter]
        of_inviter[due.inviter] += 1
    return sorted(due_rooms, key=lambda due: turns[due])


def _record_accepted(pk: int) -> None:
    """Wait for the sync that shows the join, which changes the membership."""
    Room.objects.filter(pk=pk, membership=Room.Membership.INVITED).update(
        join_due_at=timezone.now() + PATIENCE, join_attempts=F("join_attempts") + 1
    )


def _postpone(pk: int) -> None:
    """Retry later without counting the attempt."""
    Room.objects.filter(pk=pk, membership=Room.Membership.INVITED).update(
        join_due_at=timezone.now() + timedelta(seconds=POSTPONE_SECONDS)
    )


def _record_failure(pk: int, error: MatrixError) -> None:
    room = Room.objects.get(pk=pk)
    room.error = str(error)
    if error.status != 429:
        room.join_attempts += 1
    limit = MAX_ATTEMPTS if error.permanent else MAX_ATTEMPTS_UNANSWERED
    if room.join_attempts >= limit:
        room.membership, room.join_due_at = Room.Membership.REFUSED, None
        room.leave_due_at = timezone.now()
        room.error = f"Given up after {limit} attempts: {error}"
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
        leave_due_at=room.leave_due_at,
        updated_at=room.updated_at,
    )
    logger.warning("Could not join room %s: %s", room.room_id, room.error)
