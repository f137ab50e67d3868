"""The Matrix client: nio for HTTP, parsing and crypto, with its results checked.

nio does not handle failures safely: it repeats refused requests without end, sleeps through rate limits
within a call, and sends plain text into encrypted rooms when its keys are not loaded.
"""

import asyncio
import json
import logging
import sqlite3
from collections.abc import Awaitable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import aiohttp
import orjson
from nio import (
    AsyncClient,
    AsyncClientConfig,
    ErrorResponse,
    Event,
    KeysUploadResponse,
    MatrixRoom,
    MegolmEvent,
    SyncResponse,
)
from nio.crypto.attachments import encrypt_attachment
from nio.exceptions import EncryptionError, LocalProtocolError, OlmUnverifiedDeviceError
from peewee import OperationalError
from vodozemac import LibolmPickleException, PickleException

from botrunner.matrix import responses
from botrunner.matrix.errors import (
    AnswerTooLong,
    KeysOutdated,
    LoginRefused,
    MatrixError,
    MatrixTimeout,
    TokenRefused,
)
from botrunner.matrix.events import sanitize_decrypted, storable, text_of
from botrunner.matrix.keystore import Store, writes_of
from botrunner.models import Session
from lib.secrets import Unreadable

logger = logging.getLogger(__name__)

API = "/_matrix/client/v3"
DEVICE_NAME = "Botrealm"
REQUEST_SECONDS = 30
# Of a request that others wait for.
LOOKUP_SECONDS = 5.0
MAX_RETRY_AFTER_SECONDS = 15 * 60
# Many times the size of a usual answer; a longer one is not held in memory.
MAX_ANSWER_BYTES = 64 * 1024 * 1024
CHUNK_BYTES = 64 * 1024
# Raised by nio for malformed events, which its checks do not cover completely.
UNREADABLE = (AssertionError, AttributeError, KeyError, TypeError, ValueError, RecursionError)


@dataclass(frozen=True)
class SyncUpdate:
    """A checked answer of /sync (botrunner.matrix.responses), and its decrypted events by id."""

    data: dict[str, Any]
    decrypted: dict[str, dict[str, Any]]

    @property
    def next_batch(self) -> str:
        return str(self.data["next_batch"])

    def rooms(self, membership: str) -> dict[str, Any]:
        rooms: dict[str, Any] = self.data["rooms"][membership]
        return rooms

    @property
    def has_keys(self) -> bool:
        return bool((self.data.get("to_device") or {}).get("events"))


class Client(AsyncClient):
    """A client that survives malformed events: a sync would repeat them and stop the bot for good."""

    async def parse_body(self, transport_response: aiohttp.ClientResponse) -> dict[Any, Any]:
        """Parse an answer for nio; return {} if it is not JSON. Raises `AnswerTooLong`."""
        try:
            body: dict[Any, Any] = orjson.loads(await _body(transport_response))
        except orjson.JSONDecodeError:
            return {}
        return body

    def _handle_timeline_event(self, event: Any, room_id: str, *rest: Any) -> Any:
        try:
            if isinstance(event, MegolmEvent) and self.olm:
                event.room_id = room_id
                # Without nio's own room state: any member can encrypt an event that looks like a join.
                return self.olm._decrypt_megolm_no_error(event)
            return super()._handle_timeline_event(event, room_id, *rest)
        except UNREADABLE as error:
            event_id = getattr(event, "event_id", "")
            kind = type(error).__name__
            logger.warning("nio cannot parse event %s in room %s: %s", event_id, room_id, kind)
            return None

    def _handle_decrypt_to_device(self, to_device_event: Any) -> Any:
        try:
            return super()._handle_decrypt_to_device(to_device_event)
        except UNREADABLE as error:
            sender, kind = to_device_event.sender, type(error).__name__
            logger.warning("nio cannot parse a to-device event from %s: %s", sender, kind)
            return None


class Homeserver:
    """The bot's account on the homeserver. Every method raises `MatrixError`."""

    def __init__(self, url: str, username: str, store: Path) -> None:
        store.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.store = store
        self.nio = Client(
            url,
            username,
            store_path=str(store),
            config=AsyncClientConfig(
                store=Store,
                encryption_enabled=True,
                max_limit_exceeded=0,
                max_timeouts=0,
                request_timeout=REQUEST_SECONDS,
            ),
        )
        self._checked_plain: set[str] = set()
        self._key_counts: Any = None  # of one-time keys, from the last sync
        # Set when a call is refused because of its token, until the next login.
        self.token_refused = asyncio.Event()

    @property
    def user_id(self) -> str:
        return str(self.nio.user_id)

    @property
    def device_id(self) -> str:
        return str(self.nio.device_id)

    def unlock_store(self, key: str) -> None:
        """Set the key of the key store, before the first login. nio has one key for all stores."""
        self.nio.config = replace(self.nio.config, pickle_key=key)

    async def close(self) -> None:
        await self.nio.close()
        if self.nio.store is not None:
            self.nio.store.database.close()

    async def login(self, password: str, device_id: str) -> None:
        """Get a new token, for the same device if there is one."""
        self.nio.access_token = ""
        self.nio.device_id = device_id
        try:
            await self._call(self.nio.login(password, device_name=DEVICE_NAME))
            self.token_refused.clear()
        except MatrixError as error:
            if error.status in (400, 401, 403):
                raise LoginRefused(error.code, str(error), status=error.status) from None
            raise

    def restore(self, session: Session) -> None:
        try:
            self.nio.restore_login(session.user_id, session.device_id, session.access_token)
        except OperationalError as error:
            raise MatrixError("STORE", f"The key store cannot be opened: {error}") from error
        except (PickleException, LibolmPickleException):
            raise Unreadable(
                f"The key store of device {session.device_id} in BOT_RUNNER_STORE is encrypted with a "
                "different key than the one in the database. Restore both from the same backup, or "
                "delete the store's *.db files to start as a new device."
            ) from None

    def has_keys_of(self, session: Session) -> bool:
        """Return whether the store has the current keys of the session's device, not those of a
        backup. Without them the device can never decrypt: the server has its latest keys and
        accepts no others."""
        path = self.store / f"{session.user_id}_{session.device_id}.db"
        try:
            writes = writes_of(path)
        except sqlite3.OperationalError as error:
            raise MatrixError("STORE", f"The key store cannot be read: {error}") from error
        return writes is not None and writes >= session.key_writes

    @property
    def key_writes(self) -> int:
        return self.nio.store.writes if self.nio.store else 0

    def know_room(self, room_id: str, *, encrypted: bool) -> None:
        """Register a room with nio, which learns of rooms only from syncs with their state."""
        if room_id not in self.nio.rooms:
            encrypted = encrypted or room_id in self.nio.encrypted_rooms
            self.nio.rooms[room_id] = MatrixRoom(room_id, self.user_id, encrypted)
            if encrypted:
                self.nio.encrypted_rooms.add(room_id)

    def forget_members(self, room_id: str) -> None:
        """Fetch the members again before the next encryption: after a gap they may be outdated."""
        if room := self.nio.rooms.get(room_id):
            room.members_synced = False
            self.nio.invalidate_outbound_session(room_id)

    def is_encrypted(self, room_id: str) -> bool:
        room = self.nio.rooms.get(room_id)
        return room is not None and bool(room.encrypted)

    async def sync(self, since: str, *, seconds: float, filter_: dict[str, Any]) -> SyncUpdate:
        """Wait up to `seconds` for events after `since` that pass the filter."""
        query = {"timeout": str(int(seconds * 1000)), "filter": orjson.dumps(filter_).decode()}
        if since:
            query["since"] = since
        path = f"{API}/sync?{urlencode(query)}"
        body = await self.request("GET", path, seconds=seconds + REQUEST_SECONDS)
        if not isinstance(body.get("next_batch"), str):
            raise MatrixError("NO_NEXT_BATCH", "The homeserver's answer is not that of /sync.")
        body = responses.sync(body)
        crypto_part = self._crypto_part(body)
        if crypto_part is None:
            return SyncUpdate(body, {})
        response = _parsed(crypto_part)
        if response is None:
            return SyncUpdate(body, {})
        # nio ignores an answer with the position of the one before, even if that was not recorded.
        self.nio.next_batch = ""
        # The keys of one answer are stored together or not at all: after a crash in between, the
        # one-time key of a repeated message would be used up already.
        with self.nio.store.database.atomic():
            await self.nio.receive_response(response)
            if response.to_device_events:
                # nio removes a used one-time key from the account after it has stored the account.
                self.nio.olm.save_account()
        self._key_counts = body.get("device_one_time_keys_count")
        self._refill_keys(response)
        return SyncUpdate(body, _decrypted(response))

    def _crypto_part(self, body: dict[str, Any]) -> dict[str, Any] | None:
        """Return the part of an answer that nio needs: keys and encrypted rooms; None if that has
        nothing new. nio validates all its input against schemas and writes to its store, which
        costs more than the rest of a sync."""
        names = ("next_batch", "to_device", "device_lists", "device_one_time_keys_count")
        rooms = {
            room_id: room
            for room_id, room in body["rooms"]["join"].items()
            if self.is_encrypted(room_id) or is_about_encryption(room)
        }
        counts = body.get("device_one_time_keys_count")
        is_new = rooms or any(any(body.get(key, {}).values()) for key in names[1:3])
        if not is_new and counts == self._key_counts:
            return None
        part = {key: body[key] for key in names if key in body}
        return part | ({"rooms": {"join": rooms}} if rooms else {})

    def _refill_keys(self, response: SyncResponse) -> None:
        """Report that no one-time keys are left: nio mistakes 0 for a missing count and uploads
        none."""
        if self.nio.olm and response.device_key_count.signed_curve25519 == 0:
            self.nio.olm.uploaded_key_count = 0

    async def maintain_keys(self) -> None:
        """Upload, query, claim and share keys between syncs."""
        nio = self.nio
        if nio.should_upload_keys:
            await self._upload_keys()
        if nio.should_query_keys:
            await self._call(nio.keys_query())
        if nio.should_claim_keys:
            await self._call(nio.keys_claim(nio.get_users_for_key_claiming()))
        if nio.outgoing_to_device_messages:
            await nio.send_to_device_messages()

    async def _upload_keys(self) -> None:
        """Upload keys as nio does, but store them first: after a crash the server would have
        one-time keys that cannot be used, and would always refuse others with the same ids."""
        olm = self.nio.olm
        keys = olm.share_keys()
        olm.save_account()
        try:
            body = await self.request("POST", f"{API}/keys/upload", keys)
        except MatrixError as error:
            if error.status == 400 and "already exists" in str(error):
                raise KeysOutdated(str(error)) from None
            raise
        answer = KeysUploadResponse.from_dict(body)
        if not isinstance(answer, KeysUploadResponse):
            raise MatrixError("UNREADABLE", "The answer is not that of /keys/upload.")
        await self.nio.receive_response(answer)

    def decrypt(self, room_id: str, source: dict[str, Any]) -> dict[str, Any] | None:
        """Decrypt an event; return None if its key is missing or it is not encrypted."""
        try:
            event = Event.parse_event(json.loads(json.dumps(source)))
            if not isinstance(event, MegolmEvent):
                return None
            event.room_id = room_id
            return sanitize_decrypted(self.nio.decrypt_event(event).source)
        except (EncryptionError, *UNREADABLE):
            return None

    async def messages(
        self, room_id: str, start: str, end: str | None
    ) -> tuple[list[dict[str, Any]], str]:
        """Return up to 100 events before `start` (or now, if empty) and after `end`, newest first,
        and the start of the next page."""
        query = {"dir": "b", "limit": "100"}
        query |= {"from": start} if start else {}
        query |= {"to": end} if end else {}
        path = f"{API}/rooms/{quote(room_id, safe='')}/messages?{urlencode(query)}"
        body = await self.request("GET", path)
        return responses.events(body.get("chunk")), str(body.get("end") or "")

    async def members(
        self, room_id: str, at: str, *, seconds: float, membership: str = "join"
    ) -> list[dict[str, Any]]:
        """Return the events of all who have a membership, at a sync's position or (if empty) now."""
        query = urlencode({"membership": membership} | ({"at": at} if at else {}))
        path = f"{API}/rooms/{quote(room_id, safe='')}/members?{query}"
        body = await self.request("GET", path, seconds=seconds)
        if not isinstance(body.get("chunk"), list):
            raise MatrixError("UNREADABLE", "The answer is not that of /members.")
        return responses.events(body["chunk"])

    async def event(self, room_id: str, event_id: str, *, seconds: float) -> dict[str, Any]:
        """Return an event as `event`, and the room's history visibility at it in `state`."""
        types = {"lazy_load_members": True, "types": ["m.room.history_visibility"]}
        query = urlencode({"limit": "0", "filter": orjson.dumps(types).decode()})
        room, event_id = quote(room_id, safe=""), quote(event_id, safe="")
        path = f"{API}/rooms/{room}/context/{event_id}?{query}"
        return await self.request("GET", path, seconds=seconds)

    async def state(self, room_id: str, kind: str, *, seconds: float) -> dict[str, Any]:
        """Return the state event of this type with an empty key; {} if there is none."""
        path = f"{API}/rooms/{quote(room_id, safe='')}/state/{kind}/?format=event"
        try:
            return await self.request("GET", path, seconds=seconds)
        except MatrixError as error:
            if error.code == "M_NOT_FOUND":
                return {}
            raise

    async def display_name(self) -> str:
        """Return the display name of the bot; empty if it has none."""
        path = f"{API}/profile/{quote(self.user_id, safe='')}/displayname"
        try:
            body = await self.request("GET", path, seconds=LOOKUP_SECONDS)
        except MatrixError as error:
            if error.code == "M_NOT_FOUND":
                return ""
            raise
        return storable(text_of(body, "displayname") or "")

    async def join(self, room_id: str, *, seconds: float = REQUEST_SECONDS) -> None:
        """Join a room. The homeserver continues a join after a timeout."""
        await self.request("POST", f"{API}/join/{quote(room_id, safe='')}", {}, seconds=seconds)

    async def leave(self, room_id: str, reason: str, *, seconds: float) -> None:
        """Leave a room, or decline the invitation to it."""
        path = f"{API}/rooms/{quote(room_id, safe='')}/leave"
        await self.request("POST", path, {"reason": reason}, seconds=seconds)

    async def typing(self, room_id: str, is_typing: bool, seconds: float) -> None:
        await self._call(self.nio.room_typing(room_id, is_typing, int(seconds * 1000)))

    async def send(self, room_id: str, content: dict[str, Any], transaction: str) -> str:
        """Send a message, encrypted if the room is; return its event id. Raises `LeaseLost`."""
        if self.nio.store:
            self.nio.store.check_holder()
        self.know_room(room_id, encrypted=False)
        if not self.is_encrypted(room_id):
            await self._check_plain(room_id)
        if not self.is_encrypted(room_id):
            return await self._send_plain(room_id, content, transaction)
        await self._know_members(room_id)
        response = await self._call(
            self.nio.room_send(
                room_id, "m.room.message", content, transaction, ignore_unverified_devices=True
            )
        )
        return str(response.event_id)

    async def _send_plain(self, room_id: str, content: dict[str, Any], transaction: str) -> str:
        room, transaction = quote(room_id, safe=""), quote(transaction, safe="")
        path = f"{API}/rooms/{room}/send/m.room.message/{transaction}"
        answer = await self.request("PUT", path, content)
        if not isinstance(answer.get("event_id"), str):
            raise MatrixError("UNREADABLE", "The answer is not that of a message sent.")
        return str(answer["event_id"])

    def recheck_plain(self) -> None:
        """Check plain rooms again: encryption may have been enabled while no sync arrived."""
        self._checked_plain.clear()

    async def _check_plain(self, room_id: str) -> None:
        if room_id in self._checked_plain:
            return
        path = f"{API}/rooms/{quote(room_id, safe='')}/state/m.room.encryption/"
        try:
            await self.request("GET", path)
        except MatrixError as error:
            if error.code != "M_NOT_FOUND":
                raise
            self._checked_plain.add(room_id)
        else:
            self.nio.rooms[room_id].encrypted = True
            self.nio.encrypted_rooms.add(room_id)

    async def _know_members(self, room_id: str) -> None:
        """Load the members and their keys: without them no recipient could decrypt the message."""
        if not self.nio.rooms[room_id].members_synced:
            await self._call(self.nio.joined_members(room_id))
        if self.nio.should_query_keys:
            await self._call(self.nio.keys_query())

    async def request(
        self, method: str, path: str, body: Any = None, *, seconds: float = REQUEST_SECONDS
    ) -> dict[str, Any]:
        """Send a request and return the JSON object of the answer; `path` begins with /_matrix."""
        data = None if body is None else orjson.dumps(body).decode()
        return await self._exchange(method, path, data, "application/json", seconds=seconds)

    async def upload(
        self, room_id: str, data: bytes, name: str, content_type: str
    ) -> dict[str, Any]:
        """Upload a file for a room, encrypted if the room is; return the fields of a message that
        refer to it."""
        self.know_room(room_id, encrypted=False)
        if not self.is_encrypted(room_id):
            await self._check_plain(room_id)
        if not self.is_encrypted(room_id):
            return {"url": await self._upload(data, content_type, name)}
        encrypted, keys = encrypt_attachment(data)
        # Neither its name nor its type is for the homeserver.
        return {"file": {**keys, "url": await self._upload(encrypted, "application/octet-stream")}}

    async def _upload(self, data: bytes, content_type: str, name: str = "") -> str:
        query = f"?{urlencode({'filename': name})}" if name else ""
        answer = await self._exchange(
            "POST", f"/_matrix/media/v3/upload{query}", data, content_type
        )
        if not isinstance(answer.get("content_uri"), str):
            raise MatrixError("UNREADABLE", "The answer is not that of a file uploaded.")
        return str(answer["content_uri"])

    async def _exchange(
        self,
        method: str,
        path: str,
        data: str | bytes | None,
        content_type: str,
        *,
        seconds: float = REQUEST_SECONDS,
    ) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self.nio.access_token}"}
        if data is not None:
            headers["Content-Type"] = content_type
        limit = aiohttp.ClientTimeout(total=seconds)
        try:
            async with await self.nio.send(method, path, data, headers, timeout=limit) as answer:
                text = await _body(answer)
        except aiohttp.ConnectionTimeoutError as error:
            raise MatrixError("UNREACHABLE", _words(error)) from error
        except TimeoutError as error:
            raise MatrixTimeout("UNREACHABLE", f"No answer within {seconds:g} s.") from error
        except (aiohttp.ClientError, OSError) as error:
            raise MatrixError("UNREACHABLE", _words(error)) from error
        try:
            content = orjson.loads(text)
        except orjson.JSONDecodeError:
            content = None
        if not isinstance(content, dict):
            raise MatrixError("UNREADABLE", "The answer is not JSON.", status=answer.status)
        if answer.status >= 300:
            raise self._refusal(
                str(content.get("errcode") or "M_UNKNOWN"),
                str(content.get("error") or ""),
                status=answer.status,
                retry_after_ms=content.get("retry_after_ms"),
                session=str(content.get("session") or ""),
            )
        return content

    async def _call(self, call: Awaitable[Any]) -> Any:
        """Await a call of nio; raise its error responses as `MatrixError`."""
        try:
            response = await call
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise MatrixError("UNREACHABLE", _words(error)) from error
        except (EncryptionError, LocalProtocolError, OlmUnverifiedDeviceError) as error:
            raise MatrixError("CRYPTO", _words(error)) from error
        if isinstance(response, ErrorResponse):
            transport = response.transport_response
            raise self._refusal(
                str(response.status_code or "M_UNKNOWN"),
                str(response.message),
                status=transport.status if transport is not None else 0,
                retry_after_ms=response.retry_after_ms,
            )
        return response

    def _refusal(
        self, code: str, message: str, *, status: int, retry_after_ms: Any, session: str = ""
    ) -> MatrixError:
        wait = None
        if isinstance(retry_after_ms, int | float):
            wait = min(max(retry_after_ms / 1000, 0.1), MAX_RETRY_AFTER_SECONDS)
        if code in ("M_UNKNOWN_TOKEN", "M_MISSING_TOKEN"):
            self.token_refused.set()
            return TokenRefused(code, message, status=status, retry_after=wait)
        return MatrixError(code, message, status=status, retry_after=wait, session=session)


async def _body(answer: aiohttp.ClientResponse) -> bytes:
    """Read the whole body, decompressed. Raises `AnswerTooLong`."""
    pieces, size = [], 0
    async for piece in answer.content.iter_chunked(CHUNK_BYTES):
        size += len(piece)
        if size > MAX_ANSWER_BYTES:
            answer.close()
            raise AnswerTooLong(answer.url.path, answer.status, MAX_ANSWER_BYTES)
        pieces.append(piece)
    return b"".join(pieces)


def _words(error: BaseException) -> str:
    return str(error) or type(error).__name__


def is_about_encryption(room: dict[str, Any]) -> bool:
    """Return whether a room's update shows that it is or becomes encrypted."""
    return any(
        event.get("type") in ("m.room.encryption", "m.room.encrypted")
        for part in ("state", "timeline")
        for event in room.get(part, {}).get("events", [])
    )


def _parsed(body: dict[str, Any]) -> SyncResponse | None:
    """Parse an answer with nio, without the rooms that it cannot parse: one malformed event must
    not stop the bot for good."""
    response = _parse(body)
    if response is not None:
        return response
    valid: dict[str, Any] = {}
    for room_id, room in (body.get("rooms") or {}).get("join", {}).items():
        if _parse({"next_batch": "x", "rooms": {"join": {room_id: room}}}) is not None:
            valid[room_id] = room
        else:
            logger.warning("nio cannot parse the update of room %s", room_id)
    response = _parse({**body, "rooms": {"join": valid}})
    if response is None:
        logger.error("nio cannot parse the homeserver's answer: keys in it are lost")
    return response


def _parse(body: dict[str, Any]) -> SyncResponse | None:
    try:
        # nio changes what it parses.
        response = SyncResponse.from_dict(orjson.loads(orjson.dumps(body)))
    except UNREADABLE:
        return None
    return response if isinstance(response, SyncResponse) else None


def _decrypted(response: SyncResponse) -> dict[str, dict[str, Any]]:
    return {
        event.event_id: sanitize_decrypted(event.source)
        for room in response.rooms.join.values()
        for event in room.timeline.events
        if getattr(event, "decrypted", False) and hasattr(event, "event_id")
    }
