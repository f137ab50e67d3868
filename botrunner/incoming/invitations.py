"""Invitations: parsed from a sync and recorded with its position."""

import logging
from collections import Counter
from collections.abc import Collection
from typing import Any

from django.conf import settings
from django.db.models import Count
from django.utils import timezone

from botrunner.incoming.batch import Invitation
from botrunner.incoming.matching import matches_any
from botrunner.matrix.events import MEMBER, is_id, server_of
from botrunner.models import Room, Session
from realm.models import User

logger = logging.getLogger(__name__)

# Pending, or refused, of one inviter and of one other server, which can create any number of
# inviters.
MAX_INVITATIONS = 50
MAX_INVITATIONS_SERVER = 200
INVITER_DEACTIVATED = "The inviter's account is deactivated."


def parse_invitations(rooms: dict[str, Any], me: str) -> list[Invitation]:
    """Parse the `invite` section of a sync. Its events are stripped: they have no id and no time, and
    some are about other users."""
    return [
        Invitation(room_id, event["sender"])
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
        and event.get("type") == MEMBER
        and event.get("state_key") == me
    )


def record_invitations(session: Session, invitations: list[Invitation]) -> None:
    """Record invitations up to the limits of an inviter and of a server. Those beyond leave no row,
    only a line in the log."""
    rooms = Room.objects.filter(session=session)
    known = {
        room.room_id: room
        for room in rooms.filter(room_id__in=[invitation.room_id for invitation in invitations])
    }
    limits = _InvitationLimits(session)
    deactivated = User.objects.deactivated_among([invitation.inviter for invitation in invitations])
    for invitation in invitations:
        refusal = _refusal(invitation, deactivated)
        room = known.get(invitation.room_id)
        waits = room is not None and room.membership == Room.Membership.INVITED
        if not waits and not limits.allow(invitation.inviter, refused=bool(refusal)):
            continue
        attempts = room.join_attempts if room and waits else 0
        _record_invitation(session, invitation, attempts=attempts, refusal=refusal)
    limits.log()


def _refusal(invitation: Invitation, deactivated: Collection[str]) -> str:
    """Return the reason to refuse an invitation; empty if it is accepted."""
    if not matches_any(invitation.inviter, settings.BOT_RUNNER_ALLOWED_INVITERS):
        return "BOT_RUNNER_ALLOWED_INVITERS does not name the inviter."
    if invitation.inviter in deactivated:
        return INVITER_DEACTIVATED
    return ""


def _record_invitation(
    session: Session, invitation: Invitation, *, attempts: int, refusal: str
) -> None:
    Room.objects.update_or_create(
        session=session,
        room_id=invitation.room_id,
        defaults={
            "membership": Room.Membership.REFUSED if refusal else Room.Membership.INVITED,
            "inviter": invitation.inviter,
            "join_attempts": attempts,
            "join_due_at": None if refusal else timezone.now(),
            # A pending invitation could not be repeated.
            "leave_due_at": timezone.now() if refusal else None,
            "error": refusal,
            "updated_at": timezone.now(),
        },
    )
    outcome = ": refused" if refusal else ""
    logger.info("Invited to room %s by %s%s", invitation.room_id, invitation.inviter, outcome)


class _InvitationLimits:
    """Counts of the recorded invitations by inviter and server."""

    def __init__(self, session: Session) -> None:
        self._own_server = server_of(session.user_id)
        self._waiting: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._waiting_of_server: Counter[str] = Counter()
        self._refused_of_server: Counter[str] = Counter()
        self._ignored: Counter[str] = Counter()
        recorded = Room.objects.filter(
            session=session, membership__in=[Room.Membership.INVITED, Room.Membership.REFUSED]
        )
        counts = recorded.values_list("inviter", "membership").annotate(rooms=Count("pk"))
        for inviter, membership, rooms in counts:
            of_inviter, of_server = self._counters(refused=membership == Room.Membership.REFUSED)
            of_inviter[inviter] += rooms
            of_server[server_of(inviter)] += rooms

    def _counters(self, *, refused: bool) -> tuple[Counter[str], Counter[str]]:
        """Return the counters by inviter and by server."""
        if refused:
            return self._refused, self._refused_of_server
        return self._waiting, self._waiting_of_server

    def allow(self, inviter: str, *, refused: bool) -> bool:
        """Count one more invitation; return False if it is beyond a limit."""
        server = server_of(inviter)
        of_inviter, of_server = self._counters(refused=refused)
        is_too_many = of_inviter[inviter] >= MAX_INVITATIONS or (
            server != self._own_server and of_server[server] >= MAX_INVITATIONS_SERVER
        )
        if is_too_many:
            self._ignored[inviter] += 1
            return False
        of_inviter[inviter] += 1
        of_server[server] += 1
        return True

    def log(self) -> None:
        for inviter, count in self._ignored.most_common(10):
            logger.warning(
                "Ignored %d invitations from %s: the inviter or the server has too many that are "
                "pending or refused",
                count,
                inviter,
            )
