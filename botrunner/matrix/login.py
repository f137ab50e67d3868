"""The bot's account: its session, login and device, and its filter for /sync."""

import logging
import secrets
from typing import Any

from django.conf import settings
from django.db.models.functions import Now
from django.utils import timezone

from botrunner.aio import database_sync_to_async
from botrunner.matrix import cross_signing
from botrunner.matrix.client import API, Homeserver
from botrunner.matrix.errors import MatrixError, TokenRefused
from botrunner.matrix.events import ENCRYPTED, REDACTION
from botrunner.models import Room, Session
from realm import filters

logger = logging.getLogger(__name__)

EVENT_TYPES = [
    *filters.EVENT_TYPES,
    ENCRYPTED,
    REDACTION,
    "m.room.member",
    "m.room.encryption",
    # Not read, but answered with a sentence.
    "m.sticker",
    "m.poll.start",
    "org.matrix.msc3381.poll.start",
    "org.matrix.msc3381.v2.poll.start",
]
# Events beyond the limit are fetched with /messages.
TIMELINE_LIMIT = 100


def session() -> Session:
    """Return the session of the account in the settings, created if missing."""
    session, _ = Session.objects.get_or_create(
        homeserver=settings.MATRIX_URL, username=settings.BOT_RUNNER_USERNAME
    )
    return session


async def connect(homeserver: Homeserver, session: Session) -> None:
    """Restore the stored device and token, or log in. Raises `MatrixError`, `LoginRefused`, and
    `lib.secrets.Unreadable`: an unreadable token or key must not lead to a new device."""
    token = session.access_token
    homeserver.unlock_store(await database_sync_to_async(session.get_or_create_store_key)())
    if token and homeserver.has_keys_of(session):
        homeserver.restore(session)
        try:
            await _prepare_device(homeserver)
        except TokenRefused:
            await log_in_again(homeserver, session)
            await _prepare_device(homeserver)
        return
    if token:
        await _give_up_device(homeserver, session)
    if not session.device_id:
        # Stored before it is used: a crash in between leaves no unused device.
        session.device_id = f"BOTREALM{secrets.token_hex(4).upper()}"
        await database_sync_to_async(session.save)(update_fields=["device_id", "key_writes"])
    await _log_in(homeserver, session)
    logger.info("Logged in as %s, device %s", homeserver.user_id, homeserver.device_id)
    await _prepare_device(homeserver)


async def _prepare_device(homeserver: Homeserver) -> None:
    if homeserver.nio.should_upload_keys:
        await homeserver.maintain_keys()
    await cross_signing.sign_own_device(homeserver, settings.BOT_RUNNER_PASSWORD)


async def _give_up_device(homeserver: Homeserver, session: Session) -> None:
    """Log out a device whose keys are lost or outdated: it could not decrypt, and the server accepts no
    other keys for it."""
    logger.error(
        "The keys of device %s are missing in BOT_RUNNER_STORE, or restored from a backup: it is "
        "replaced by a new device, which cannot decrypt earlier messages",
        session.device_id,
    )
    await database_sync_to_async(session.record_error)(
        f"The keys of device {session.device_id} were lost."
    )
    # Removed from the account, so that clients stop encrypting for it.
    homeserver.nio.access_token = session.access_token
    try:
        await homeserver.request("POST", f"{API}/logout", {})
    except MatrixError as error:
        logger.info("Logging out the lost device failed: %s", error)
    homeserver.nio.access_token = session.device_id = session.access_token = ""
    session.key_writes = 0
    homeserver.token_refused.clear()


async def log_in_again(homeserver: Homeserver, session: Session) -> None:
    """Get a new token for the same device. Raises `MatrixError`."""
    await _log_in(homeserver, session)
    logger.info("Logged in again as %s, device %s", homeserver.user_id, homeserver.device_id)


async def _log_in(homeserver: Homeserver, session: Session) -> None:
    await homeserver.login(settings.BOT_RUNNER_PASSWORD, session.device_id)
    await database_sync_to_async(session.set_login)(
        homeserver.user_id, homeserver.device_id, homeserver.nio.access_token
    )


async def learn_name(homeserver: Homeserver, session: Session) -> None:
    """Remember the display name of the bot, by which messages may address it. Not worth a delay: a
    name is also in the events of each room. Raises `TokenRefused`."""
    try:
        name = await homeserver.display_name()
    except TokenRefused:
        raise
    except MatrixError as error:
        logger.info("Fetching the display name of the bot failed: %s", error)
        return
    await database_sync_to_async(session.remember_name)(name)


def connected(session: Session) -> None:
    session.connected_since = timezone.now()
    Session.objects.filter(pk=session.pk).update(connected_since=Now())
    logger.info("Connected as %s", session.user_id)


def rooms(session: Session, homeserver: Homeserver) -> set[str]:
    """Return the rooms that the bot has joined, and register them with the client."""
    joined = dict(
        Room.objects.filter(session=session, membership=Room.Membership.JOINED).values_list(
            "room_id", "is_encrypted"
        )
    )
    for room_id, is_encrypted in joined.items():
        homeserver.know_room(room_id, encrypted=is_encrypted)
    return set(joined)


def rooms_without_members(session: Session) -> list[str]:
    rows = Room.objects.filter(
        session=session, membership=Room.Membership.JOINED, members_known=False
    )
    return list(rows.values_list("room_id", flat=True))


def sync_filter(*, is_first: bool) -> dict[str, Any]:
    """Return the filter of a sync. It includes own events: the own join marks the start of a room."""
    return {
        "presence": {"types": []},
        "account_data": {"types": []},
        "room": {
            "ephemeral": {"types": []},
            "account_data": {"types": []},
            "state": {
                "types": ["m.room.member", "m.room.encryption"],
                "lazy_load_members": True,
            },
            "timeline": {"limit": 0 if is_first else TIMELINE_LIMIT, "types": EVENT_TYPES},
        },
    }
