"""Invitations: read from a sync, kept with its position, and followed."""

import logging
import random
from datetime import timedelta
from typing import Any

from django.db.models.functions import Now
from django.utils import timezone

from botrunner.client import Homeserver, MatrixError
from botrunner.models import Room, Session
from botrunner.said import is_id
from botrunner.timeline import Invite
from botrunner.units import unit

logger = logging.getLogger(__name__)

# The server that invited may not have told ours yet, so even a refusal is tried again.
MAX_ATTEMPTS = 12
MAX_PAUSE_SECONDS = 300.0
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


async def join_due(homeserver: Homeserver, session: Session) -> int:
    """Join the rooms that are due. How many were tried. Raises `MatrixError` when it is not about
    the room: the homeserver is away, or the token is refused."""
    rooms = await unit(_due)(session)
    for pk, room_id in rooms:
        try:
            await homeserver.join(room_id)
        except MatrixError as error:
            await unit(_failed)(pk, error)
            if error.status in (0, 401):
                raise
        else:
            await unit(_accepted)(pk)
    return len(rooms)


def _due(session: Session) -> list[tuple[int, str]]:
    rooms = Room.objects.filter(
        session=session, membership=Room.Membership.INVITED, join_due_at__lte=Now()
    )
    return list(rooms.order_by("join_due_at").values_list("pk", "room_id")[:50])


def _accepted(pk: int) -> None:
    """The sync that shows the bot in the room makes it a joined one."""
    Room.objects.filter(pk=pk, membership=Room.Membership.INVITED).update(
        join_due_at=timezone.now() + PATIENCE
    )


def _failed(pk: int, error: MatrixError) -> None:
    room = Room.objects.get(pk=pk)
    room.error = str(error)
    if error.status != 429:
        room.join_attempts += 1
    if error.permanent and room.join_attempts >= MAX_ATTEMPTS:
        room.membership, room.join_due_at = Room.Membership.REFUSED, None
    else:
        pause = random.uniform(0.5, 1) * min(MAX_PAUSE_SECONDS, 2.0**room.join_attempts)  # noqa: S311
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
    logger.warning("Could not join room %s: %s", room.room_id, error)
