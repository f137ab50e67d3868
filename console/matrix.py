"""Contexts of the Matrix pages: rooms, room events, the bot and its registrations."""

from typing import Any

from django.db.models import Count, Q
from django.utils import timezone

from botrunner.models import Reply, Room, RoomEvent, Session
from botrunner.verdicts import Verdict
from realm.models import BotCommand, BotRegistration

RECENT = 20
# A long poll takes half a minute; after this the bot counts as late.
LATE_SYNC_SECONDS = 120.0


def recent_events(registration: BotRegistration) -> list[tuple[RoomEvent, list[Verdict]]]:
    """Return its user's last room events with the verdicts of its commands; for the bot's own
    registration, the last events of all users."""
    events = RoomEvent.objects.select_related("room").defer("source")
    if not Session.objects.filter(user_id=registration.username).exists():
        events = events.filter(sender=registration.username)
    pk = str(registration.pk)
    return [
        (event, [each for each in event.command_verdicts if each.registration_id == pk])
        for event in events.order_by("-id")[:RECENT]
    ]


def event_context(event: RoomEvent) -> dict[str, Any]:
    verdicts = event.command_verdicts
    registrations = BotRegistration.objects.in_bulk({each.registration_id for each in verdicts})
    commands = BotCommand.objects.in_bulk({each.command_id for each in verdicts} - {""})
    known_registrations = {str(pk): row for pk, row in registrations.items()}
    known_commands = {str(pk): row for pk, row in commands.items()}
    return {
        "verdicts": [
            {
                "verdict": each,
                "registration": known_registrations.get(each.registration_id),
                "command": known_commands.get(each.command_id),
            }
            for each in verdicts
        ],
        "replies": list(
            event.replies.select_related("run", "registration", "room")
            .defer("parts")
            .order_by("id")
        ),
        "body": _body(event),
    }


def _body(event: RoomEvent) -> Any:
    content = (event.source or {}).get("content")
    if not isinstance(content, dict):
        return ""
    return content.get("body") or content.get("input") or ""


def room_context(room: Room) -> dict[str, Any]:
    return {
        "conversations": list(
            room.conversations.select_related("thread").order_by("-thread__updated_at")[:RECENT]
        ),
        "events": list(room.events.defer("source", "verdicts").order_by("-id")[:RECENT]),
        "replies": list(room.replies.select_related("run").defer("parts").order_by("-id")[:RECENT]),
    }


def bot_context(session: Session) -> dict[str, Any]:
    now = timezone.now()
    synced = session.last_sync_at
    ready = Reply.objects.ready().filter(room__session=session)
    return {
        "works": bool(session.holder)
        and Session.objects.held_by(session.holder).filter(pk=session.pk).exists(),
        "is_late": synced is None or (now - synced).total_seconds() > LATE_SYNC_SECONDS,
        "memberships": session.rooms.aggregate(
            **{state.value: Count("pk", filter=Q(membership=state)) for state in Room.Membership}
        ),
        "stuck": list(
            ready.filter(attempts__gt=0).select_related("room", "run").defer("parts")[:RECENT]
        ),
        "refused": list(session.rooms.exclude(error="").order_by("-updated_at")[:RECENT]),
    }
