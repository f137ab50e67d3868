"""Leave rooms: decline invitations that are refused, and leave rooms that all others have left."""

import asyncio
import logging
from collections.abc import Callable
from datetime import timedelta

from django.conf import settings
from django.db.models import Exists, OuterRef, Q
from django.db.models.functions import Now
from django.utils import timezone

from agents.runs import actions
from botrunner.aio import database_sync_to_async
from botrunner.matrix import rooms
from botrunner.matrix.client import LOOKUP_SECONDS, Homeserver
from botrunner.matrix.errors import MatrixError, TokenRefused
from botrunner.models import Reply, Room, RoomMember, Session

logger = logging.getLogger(__name__)

# At once, and rooms that are read from the database for that.
MAX_LEAVES = 8
# Time for the last member to come back.
GRACE = timedelta(seconds=3)
PAUSE = timedelta(minutes=5)
# Then it is given up.
PATIENCE = timedelta(days=1)
DECLINED = "The operator of this bot does not allow this invitation."
GIVEN_UP = "The bot could not join the room."
EMPTY = "Everyone else has left the room."

IS_ALONE = ~Exists(
    RoomMember.objects.filter(room=OuterRef("pk")).exclude(user_id=OuterRef("session__user_id"))
)


class Leaver:
    """Leaves the rooms whose `leave_due_at` is reached."""

    def __init__(
        self, homeserver: Homeserver, session: Session, on_left: Callable[[str], None]
    ) -> None:
        self.homeserver = homeserver
        self.session = session
        self._on_left = on_left
        self._has_looked = False

    async def leave_due(self) -> None:
        """Leave some rooms. Raises `MatrixError` if the token was refused."""
        if not self._has_looked:
            # Rooms that were empty before this process watched them.
            await database_sync_to_async(mark_empty)(self.session)
            self._has_looked = True
        due = await database_sync_to_async(_due)(self.session)
        await asyncio.gather(*(self._leave(room) for room in due))

    async def _leave(self, room: Room) -> None:
        is_declined = room.membership == Room.Membership.REFUSED
        try:
            if not is_declined and await rooms.may_be_joined_by_others(
                self.homeserver, room.room_id
            ):
                await database_sync_to_async(_stay)(room.pk)
                return
            reason = EMPTY
            if is_declined:
                reason = GIVEN_UP if room.join_attempts else DECLINED
            await self.homeserver.leave(room.room_id, reason, seconds=LOOKUP_SECONDS)
        except TokenRefused:
            raise
        except MatrixError as error:
            if not error.permanent or error.status == 429:
                logger.info("Leaving room %s failed, retrying: %s", room.room_id, error)
                await database_sync_to_async(_postpone)(room.pk, error.retry_after)
                return
            # The bot is not in the room, or its invitation was taken back.
            logger.info("Could not leave room %s: %s", room.room_id, error)
        await database_sync_to_async(_record_left)(room)
        self._on_left(room.room_id)


def mark_empty(session: Session, room_ids: list[str] | None = None) -> None:
    """Have the bot leave those of its rooms that have no other member."""
    if not settings.BOT_RUNNER_LEAVE_EMPTY_ROOMS:
        return
    joined = Room.objects.filter(
        session=session, membership=Room.Membership.JOINED, members_known=True, leave_due_at=None
    )
    if room_ids is not None:
        joined = joined.filter(room_id__in=room_ids)
    joined.filter(IS_ALONE).update(leave_due_at=timezone.now() + GRACE)


def _due(session: Session) -> list[Room]:
    due = Room.objects.filter(session=session, leave_due_at__lte=Now())
    # Someone may have joined since.
    is_due = Q(membership=Room.Membership.REFUSED) | Q(
        IS_ALONE, membership=Room.Membership.JOINED, members_known=True
    )
    due.exclude(is_due).update(leave_due_at=None)
    return list(due.filter(is_due).order_by("leave_due_at")[:MAX_LEAVES])


def _stay(pk: int) -> None:
    Room.objects.filter(pk=pk).update(leave_due_at=None)


def _postpone(pk: int, seconds: float | None) -> None:
    pause = timedelta(seconds=seconds) if seconds else PAUSE
    now = timezone.now()
    rows = Room.objects.filter(pk=pk)
    rows.filter(updated_at__lt=now - PATIENCE).update(leave_due_at=None)
    rows.filter(leave_due_at__isnull=False).update(leave_due_at=now + pause)


def _record_left(room: Room) -> None:
    """Record that the bot has left; cancel the runs whose answers no one would read."""
    rows = Room.objects.filter(pk=room.pk, membership=room.membership)
    if room.membership == Room.Membership.REFUSED:
        rows.update(leave_due_at=None)
        logger.info("Declined the invitation to room %s", room.room_id)
        return
    if not rows.update(
        leave_due_at=None, membership=Room.Membership.LEFT, error=EMPTY, updated_at=Now()
    ):
        return
    logger.info("Left room %s: everyone else has left it", room.room_id)
    for reply in Reply.objects.waiting().filter(room=room).select_related("run"):
        if reply.run:
            actions.cancel(reply.run)
